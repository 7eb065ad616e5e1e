"""Tokens that a projector is sensitive to, and that differ from each other."""
