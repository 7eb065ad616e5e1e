"""Joint attention: a group of people pooled into a map of where they look together."""
