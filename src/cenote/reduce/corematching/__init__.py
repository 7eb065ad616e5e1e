"""Core neurons and core tokens of vision-language models."""
