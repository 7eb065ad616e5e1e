"""A vision transformer whose blocks may reduce their tokens between attention and MLP, with its cost and its training."""
