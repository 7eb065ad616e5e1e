"""Result objects -> one self-contained HTML page."""

from cenote.report.attention import Attention
from cenote.report.page import render, write
from cenote.report.table import render_table

__all__ = ["Attention", "render", "render_table", "write"]
