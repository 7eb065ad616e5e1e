"""Arms measured on the same items: cells that resume, paired statistics, the Pareto set, the verdict in words."""
