"""Group generalized mean pooling, of whole sets and of windows."""
