"""Tree Cross Attention: queries that read a logarithmic part of the tokens."""
