"""Attention with one of its principles taken out at a time, and statistics of its maps."""
