"""Set Transformer: sets encoded by attention, and the mixtures that it learns to cluster."""
