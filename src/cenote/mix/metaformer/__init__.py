"""A skeleton of norm, mixer, skip, norm, perceptron, skip, in which any mixer may stand; average pooling stands in PoolFormer."""
