"""GlobEnc: norms of what each token contributes to each, over the whole encoder layer."""
