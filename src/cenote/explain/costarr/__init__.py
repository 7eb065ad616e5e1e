"""COSTARR: whether an input is of a class that a classifier knows, by what its last layer keeps and by what it attenuates."""
