"""Pruning or pooling, whichever an image's scores ask for."""
