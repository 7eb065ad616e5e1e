"""Logits as sums of what heads, source tokens and feed-forward parts give, and how facts are recalled by such sums."""
