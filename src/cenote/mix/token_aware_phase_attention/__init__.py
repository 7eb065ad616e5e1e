"""Token-aware phase attention: an amplitude times the cosine of a phase that grows with the distance."""
