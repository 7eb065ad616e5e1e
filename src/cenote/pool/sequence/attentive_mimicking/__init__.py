"""Attentive Mimicking: vectors of rare words from their letters and contexts."""
