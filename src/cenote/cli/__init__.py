"""The command line: one small file per command; parses, calls, prints."""

from cenote.cli import interrupts


def main() -> None:
    """Entry point of the `cenote` program."""
    # before the commands are imported
    interrupts.heed()
    from cenote.cli.app import main as run

    run()


__all__ = ["main"]
