"""A classifier of images that explains itself: a mask that must hold all evidence of the class."""
