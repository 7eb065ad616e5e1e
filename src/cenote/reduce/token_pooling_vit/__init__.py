"""Token pooling of vision transformers: the few vectors from which all can be rebuilt best."""
