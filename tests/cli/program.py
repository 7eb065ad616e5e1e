"""The program as the tests call it."""

from collections.abc import Callable

Run = Callable[..., tuple[int, str, str]]
"""Arguments in; exit code, stdout and stderr out."""
