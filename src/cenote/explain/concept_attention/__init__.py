"""ConceptAttention: where in its image a diffusion transformer sees a word."""
