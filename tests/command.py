"""The command line as a user meets it, without a process of its own."""

from __future__ import annotations

from harness.cli import main


def run(*arguments: object) -> int:
    """Exit code of `harness ARGUMENTS`."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0
