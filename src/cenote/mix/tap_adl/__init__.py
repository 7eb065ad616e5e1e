"""Token-aware average pooling before attention, and a loss that keeps rows of attention apart."""
