"""Adaptive noise pooling: a query made of the tokens, the transformer before it, and sets that hide signal in noise."""
