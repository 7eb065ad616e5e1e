"""The generalised attention of a survey: alignments, distributions, positions, representations, architectures by name."""
