"""The command `harness predict`: parses and prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.flags import OUTPUT


def predict_command(
    run: Annotated[Path, typer.Argument(help="results folder whose requests are to run on the device")],
    device: Annotated[str, typer.Option(help="rtx-4090, a100-80g, h100, h200, l40s, orin, or FILE.yaml")],
    fit: Annotated[
        list[Path] | None,
        typer.Option(help="run to learn from, the run itself if none is named; may be given repeatedly"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(*OUTPUT, help="folder of table and plot; RUN/predicted-DEVICE if none is named")
    ] = None,
) -> None:
    """Predict times, energy and what fits on another device. From the work that a run recorded."""
    from harness.predict.checks import check
    from harness.predict.device import find_device
    from harness.predict.model import fit as fitted
    from harness.predict.model import together
    from harness.predict.page import write
    from harness.predict.prediction import predict_run
    from harness.predict.work import read_run
    from harness.report.written import wrote

    chosen, work = find_device(device), read_run(run)
    known = [read_run(folder) for folder in fit or [run]]
    errors = check(known)
    found = predict_run(work, together([fitted(each) for each in known]), known[0].gpu, chosen, errors)
    folder = output or run / f"predicted-{Path(device).stem}"
    text, paths = write(work, chosen, found, errors, folder)
    print(text)
    print(wrote(paths))
