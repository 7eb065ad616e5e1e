"""Probabilistic attention: a mixture of Gaussians whose keys and values adapt to what is seen and told."""
