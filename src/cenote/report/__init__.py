"""Result objects -> one self-contained HTML page."""

from cenote.report.attention import Attention
from cenote.report.beside import render_beside, write_beside
from cenote.report.page import render, write
from cenote.report.table import render_table

__all__ = ["Attention", "render", "render_beside", "render_table", "write", "write_beside"]
