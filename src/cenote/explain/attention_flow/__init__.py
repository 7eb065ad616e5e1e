"""Attention rollout and attention flow."""
