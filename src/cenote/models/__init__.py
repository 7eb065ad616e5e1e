"""Adapters of model libraries: tokens, hidden states, attentions, and how they lie."""

from cenote.models.base import Backbone, Identity, Layout, Prepared, States, chosen_layers
from cenote.models.load import load

__all__ = ["Backbone", "Identity", "Layout", "Prepared", "States", "chosen_layers", "load"]
