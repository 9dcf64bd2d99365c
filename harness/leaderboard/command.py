"""The command `harness leaderboard`: parses and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.flags import OUTPUT


def leaderboard_command(
    runs: Annotated[list[Path], typer.Argument(help="results folders of runs, or folders of runs")],
    output: Annotated[Path, typer.Option(*OUTPUT, help="folder of the pages")] = Path("reports/leaderboard"),
    title: Annotated[str, typer.Option(help="heading")] = "Leaderboard",
    points: Annotated[float, typer.Option(min=0.1, help="loss in points that is still acceptable")] = 3.0,
) -> None:
    """One page from anybody's runs: which method for what.

    What cannot be compared stands apart, with the reason.
    """
    from harness.leaderboard.board import Board
    from harness.leaderboard.entries import read_entries
    from harness.leaderboard.pages import Made, first_screen, write
    from harness.reproduce.published.judge import judge_all
    from harness.runner.terminal import show
    from harness.storage.runs import run_folders

    folders = run_folders(runs)
    entries, left_out = read_entries(folders)
    made = Made(title, Board(entries), points, judge_all(folders), notes=left_out)
    show(first_screen(made), write(made, output))
