"""Train a text classifier on which words should matter, and where that is known from."""
