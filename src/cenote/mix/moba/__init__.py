"""Mixture of block attention: each query reads its own block of keys and the past ones whose mean key it likes best."""
