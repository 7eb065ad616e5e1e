"""Extremal perturbations: the mask of a given area that keeps the score of a class highest."""
