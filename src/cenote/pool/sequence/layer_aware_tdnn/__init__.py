"""Layer-aware TDNN: one vector of a clip from all hidden states of a speech model."""
