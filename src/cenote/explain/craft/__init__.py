"""CRAFT: what a classifier sees, as concepts, and how much each of them drives a class."""
