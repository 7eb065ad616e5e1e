"""Segments that are encoded apart in the first layers of an encoder, and together in the others."""
