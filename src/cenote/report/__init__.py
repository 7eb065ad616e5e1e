"""Result objects -> one self-contained HTML page."""

from cenote.report.attention import Attention
from cenote.report.page import render, write

__all__ = ["Attention", "render", "write"]
