"""Gramian attention heads: class tokens made from the Gramian of the features, and the loss that keeps them apart."""
