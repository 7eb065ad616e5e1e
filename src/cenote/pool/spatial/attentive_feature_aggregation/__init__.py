"""Attentive feature aggregation: maps of several layers and scales, fused by where and what to trust."""
