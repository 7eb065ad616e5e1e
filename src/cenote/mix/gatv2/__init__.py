"""Graph attention in which each node can rank its neighbours in an order of its own."""
