"""CrossLMM: few visual tokens in a decoder's sequence, and cross-attention to all the others outside of it."""
