"""A learned gate beside each attention layer of a frozen decoder, which tells which blocks of the cache a new token needs."""
