"""Rank in attention: heads as wide as one likes, the task that needs them wide, and whether a model's are wide enough."""
