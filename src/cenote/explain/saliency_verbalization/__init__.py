"""Scores of words made into sentences."""
