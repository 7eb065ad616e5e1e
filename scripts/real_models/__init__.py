"""Real pretrained models, carried by ordinary Python packages, as transformers folders."""
