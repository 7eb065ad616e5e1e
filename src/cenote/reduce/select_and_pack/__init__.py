"""Attention among the tokens that a gate selects, those of all images packed into containers of one length."""
