"""Pooled views of a sequence in place of attention: of all of it, of a token's segment, of its neighbours."""
