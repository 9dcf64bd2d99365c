"""The command `harness`, and `python -m harness`: from its first import on, Ctrl-C is one line."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the command."""
    try:
        from harness.cli import main as command

        command()
    except KeyboardInterrupt:
        print("harness: interrupted", file=sys.stderr, flush=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
