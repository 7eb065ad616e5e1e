"""Feature interactions by self-attention over the fields of a table."""
