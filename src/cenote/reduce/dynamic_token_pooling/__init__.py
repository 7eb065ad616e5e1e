"""A language model whose middle layers run on segments of characters, cut where the content says."""
