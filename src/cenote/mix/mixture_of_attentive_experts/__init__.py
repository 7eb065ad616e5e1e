"""Attention as a mixture of experts, each of which is all heads but a few."""
