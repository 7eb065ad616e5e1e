"""Attentive temporal pooling: streams pooled frame by frame, and classifiers adapted to another domain."""
