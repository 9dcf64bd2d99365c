"""From a model's name to a file of its gates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from harness.calibrate.gate_file import write_gates, write_losses
from harness.calibrate.gates import Training
from harness.calibrate.passkeys import SHORTEST
from harness.calibrate.train import Held, Losses, Settings, Trainer
from harness.engine.shape import ModelShape
from harness.errors import InputError
from harness.measuring.provenance import environment
from harness.models.load import LoadedModel, describe, load
from harness.runner.spec import public_name

_PACKAGES = ("harness", "torch", "transformers")


def calibrate(
    settings: Settings,
    make: Callable[[ModelShape, torch.device], Training],
    out: Path,
    model: str,
    device: str,
    dtype: str,
    tell: Callable[[int, Losses], Any],
) -> list[str]:
    """Trains, and writes `out`, and beside it `out`.losses.csv; on the way `out`.state, which a run goes on from.

    Args:
        settings: of the training.
        make: fresh gates for a model of some shape on some device.
        out: the file of gates.
        model, device, dtype: as `harness.models.load.load` takes them.
        tell: hears of every step.

    Returns:
        Lines that say what came out.

    Raises:
        InputError: there is no such model, its context is too short, or `out` cannot be written.
    """
    _check(settings, describe(model))
    _make_room(out)
    loaded = load(model, device, dtype)
    trainer = Trainer(loaded, make(loaded.shape, loaded.model.device), settings)
    state = out.with_name(f"{out.name}.state")
    trainer.run(state, tell)
    held, gates = trainer.held_out(), trainer.training.values()
    write_gates(out, gates, _provenance(settings, loaded, trainer, held))
    report = out.with_name(f"{out.name}.losses.csv")
    write_losses(report, trainer.losses)
    state.unlink(missing_ok=True)
    above = f"gates above one half: {int((gates > 0.5).sum())} of {gates.numel()}"
    return [above, f"held-out answers: {_in_words(held)}", f"wrote {out}", f"wrote {report}"]


def _check(settings: Settings, shape: ModelShape) -> None:
    if not SHORTEST <= settings.length <= shape.max_context:
        raise InputError(
            f"--length {settings.length}: want at least {SHORTEST} tokens, and the model has {shape.context_words}"
        )


def _make_room(out: Path) -> None:
    """Minutes of training should not end in a folder that is not there."""
    if out.is_dir():
        raise InputError(f"cannot write {out}: it is a folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}") from None


def _in_words(held: Held) -> str:
    return (
        f"{held.full:.1%} of their tokens right under full attention, "
        f"{held.kept:.1%} with {held.share:.1%} of the heads attending to everything (error {held.error:.4f})"
    )


def _provenance(settings: Settings, model: LoadedModel, trainer: Trainer, held: Held) -> dict[str, Any]:
    """What the file says ahead of its rows; names no path."""
    dtype = str(model.model.dtype).removeprefix("torch.")
    of = {"model": public_name(model.name), **asdict(settings), "device": model.model.device.type, "dtype": dtype}
    options = " ".join(f"--{key} {value}" for key, value in of.items() if key != "method" and value is not None)
    packages = environment()["packages"]
    return {
        "gates of": f"{settings.method}, a row a layer, a number for each KV head",
        "trained by": f"harness calibrate {settings.method} {options}",
        "weights": model.weights_hash,
        "versions": ", ".join(f"{name} {packages[name] or 'from its sources'}" for name in _PACKAGES),
        "loss": f"error {trainer.losses[0].error:.4f} at first, {trainer.losses[-1].error:.4f} in the last step",
        "held-out answers": _in_words(held),
    }
