"""Token pooling of multi-vector indexes."""
