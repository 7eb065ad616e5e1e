"""Attention that hides what a classifier uses: the penalty, models that deceive, and the bench that finds them out."""
