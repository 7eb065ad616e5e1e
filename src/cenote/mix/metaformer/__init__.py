"""A skeleton of norm, mixer, skip, norm, perceptron, skip, for any mixer; average pooling stands in PoolFormer."""
