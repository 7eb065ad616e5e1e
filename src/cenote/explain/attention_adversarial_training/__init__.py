"""Adversarial training on attention scores, and what it does to attention as an explanation."""
