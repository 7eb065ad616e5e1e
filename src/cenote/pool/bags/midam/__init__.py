"""MIDAM: bags scored, and trained for their ranking on a few instances of each."""
