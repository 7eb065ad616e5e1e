"""A convolution whose kernels each image makes for itself, in place of attention."""
