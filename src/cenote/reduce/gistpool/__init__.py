"""Long contexts of a decoder, compressed into a few activations: GistPool, average pooling, plain gisting."""
