"""Which places of two items make them similar: an exact decomposition of the cosine of pooled features."""
