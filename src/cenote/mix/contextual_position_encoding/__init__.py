"""Contextual position encoding: positions that count what the query wants counted."""
