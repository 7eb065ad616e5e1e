"""Fine-tuning for long contexts: attention in groups, some heads shifted, first tokens that all read; low-rank weights."""
