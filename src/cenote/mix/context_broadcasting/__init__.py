"""The mean of all tokens, added to each of them in every block."""
