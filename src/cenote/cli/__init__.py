"""The command line: one small file per command; parses, calls, prints."""

from cenote.cli.app import main

__all__ = ["main"]
