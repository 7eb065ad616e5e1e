"""Graph Parsing Networks: pooling whose depth and sizes follow from each graph."""
