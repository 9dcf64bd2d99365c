"""The commands `harness calibrate duo` and `harness calibrate lychee`: parse and print."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from harness.flags import OUTPUT

if TYPE_CHECKING:
    import torch

    from harness.calibrate.gates import Training
    from harness.calibrate.train import Losses, Settings
    from harness.engine.shape import ModelShape

app = typer.Typer(help="Train the gates of a method on passkeys. The model's weights stay as they are.")

_Output = Annotated[Path, typer.Option(*OUTPUT, help="file of gates to write; the same command resumes")]
_Model = Annotated[str, typer.Option(help="as in 'harness run'")]
_Length = Annotated[int, typer.Option(help="tokens of a text")]
_Texts = Annotated[int, typer.Option(min=1, help="texts that are met in turn")]
_Steps = Annotated[int, typer.Option(min=1, help="a text each")]
_Rate = Annotated[float, typer.Option(min=0, help="of Adam, at its highest")]
_Seed = Annotated[int, typer.Option(help="of texts and draws")]
_Device = Annotated[str, typer.Option(help="auto, cpu, cuda")]
_Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")]


@app.command("duo")
def duo_command(
    output: _Output,
    model: _Model = "smollm2",
    length: _Length = 384,
    texts: _Texts = 16,
    steps: _Steps = 100,
    rate: _Rate = 0.04,
    seed: _Seed = 0,
    sinks: Annotated[int, typer.Option(min=0, help="first tokens of a streaming head")] = 16,
    recent: Annotated[int, typer.Option(min=1, help="last tokens of a streaming head")] = 64,
    penalty: Annotated[float, typer.Option(min=0, help="weight of the mean gate beside the error")] = 0.03,
    share: Annotated[
        float, typer.Option(min=0, max=1, help="of heads that are full, where held-out texts are read")
    ] = 0.5,
    device: _Device = "auto",
    dtype: _Dtype = "auto",
) -> None:
    """DuoAttention: which KV heads need everything. By distillation under an L1 penalty; for duo:heads=OUT."""
    from harness.calibrate.gates import Streaming
    from harness.calibrate.train import Settings

    settings = Settings("duo", length, texts, steps, rate, seed, share, sinks=sinks, recent=recent, penalty=penalty)
    _calibrate(
        settings,
        lambda shape, place: Streaming(shape, place, sinks, recent, penalty, share),
        output,
        model,
        device,
        dtype,
    )


@app.command("lychee")
def lychee_command(
    output: _Output,
    model: _Model = "smollm2",
    length: _Length = 384,
    texts: _Texts = 16,
    steps: _Steps = 100,
    rate: _Rate = 0.05,
    seed: _Seed = 0,
    topk: Annotated[int, typer.Option(min=2, help="tokens that a sparse head attends to")] = 48,
    share: Annotated[float, typer.Option(min=0, max=1, help="of KV heads that are to be retrieval heads")] = 0.125,
    device: _Device = "auto",
    dtype: _Dtype = "auto",
) -> None:
    """LycheeDecode: which KV heads choose tokens. By distillation of HardKuma gates; for lychee:heads=OUT."""
    from harness.calibrate.gates import Inheriting
    from harness.calibrate.train import Settings

    settings = Settings("lychee", length, texts, steps, rate, seed, share, topk=topk)
    _calibrate(settings, lambda shape, place: Inheriting(shape, place, topk, share), output, model, device, dtype)


def _calibrate(
    settings: Settings,
    make: Callable[[ModelShape, torch.device], Training],
    output: Path,
    model: str,
    device: str,
    dtype: str,
) -> None:
    from harness.calibrate.calibrate import calibrate

    for line in calibrate(settings, make, output, model, device, dtype, _tell(settings.steps)):
        print(line, flush=True)


def _tell(steps: int) -> Callable[[int, Losses], Any]:
    def tell(step: int, losses: Losses) -> None:
        line = f"step {step}/{steps}: error {losses.error:.4f}, mean gate {losses.mean_gate:.3f}"
        print(line, file=sys.stderr, flush=True)

    return tell
