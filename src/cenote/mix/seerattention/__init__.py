"""A learned gate beside each attention layer of a frozen decoder, which tells which blocks of keys a prompt needs."""
