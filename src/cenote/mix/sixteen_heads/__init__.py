"""Which heads a model needs, and what is left without the others."""
