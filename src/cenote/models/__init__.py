"""Adapters of model libraries: tokens, hidden states, attentions, and how they lie."""

from typing import TYPE_CHECKING

from cenote.core.moved import formerly
from cenote.models.base import Backbone, Identity, Layout, Prepared, States, chosen_layers
from cenote.models.load import load

__all__ = ["Backbone", "Identity", "Layout", "Prepared", "States", "chosen_layers", "load"]

if not TYPE_CHECKING:
    __getattr__ = formerly(__name__)
