"""Attention as the marginal probability of edges under a posterior over structures."""
