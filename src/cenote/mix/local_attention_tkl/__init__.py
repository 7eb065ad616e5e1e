"""Ranking of long documents by local self-attention, kernels and their best regions."""
