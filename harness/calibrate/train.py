"""The loop: a text a step, Adam on the gates, a state on the disk that a run goes on from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from harness.calibrate.distill import Distillation, Lesson
from harness.calibrate.gates import Training
from harness.calibrate.passkeys import passkeys
from harness.errors import InputError
from harness.models.load import LoadedModel

_SAVED_EVERY = 10
"""Steps."""
_HELD_OUT = 4
"""Texts that are never trained on."""


@dataclass(frozen=True)
class Settings:
    """What shapes the gates beside the model.

    Attributes:
        method: "duo" or "lychee".
        length: tokens a text.
        texts: how many are met in turn.
        steps: of training.
        rate: of Adam, at its highest.
        seed: of texts and draws.
        share: of KV heads that are to be full, or retrieval heads.
        sinks, recent, penalty: of duo, else None. topk: of lychee, else None.
    """

    method: str
    length: int
    texts: int
    steps: int
    rate: float
    seed: int
    share: float
    sinks: int | None = None
    recent: int | None = None
    penalty: float | None = None
    topk: int | None = None


@dataclass(frozen=True)
class Losses:
    """One step's error and penalty, and the mean gate behind it."""

    error: float
    penalty: float
    mean_gate: float


@dataclass(frozen=True)
class Held:
    """Held-out texts: the share of the answers' tokens that is right, and the error, both means.

    Attributes:
        share: of the heads, those whose gate is 1.
        full: accuracy of full attention.
        kept: of the heads as the method would have them. error: theirs.
    """

    share: float
    full: float
    kept: float
    error: float


class Trainer:
    """Trains one model's gates."""

    def __init__(self, model: LoadedModel, training: Training, settings: Settings) -> None:
        """
        Args:
            model: its weights stay as they are.
            training: fresh gates.
            settings: theirs.
        """
        self.training, self.settings = training, settings
        self.losses: list[Losses] = []
        self._distillation, self._model = Distillation(model), model
        self._optimizer = torch.optim.Adam(training.groups(settings.rate))
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, self._rate)
        self._lesson = cache(self._read)

    def run(self, state: Path, tell: Callable[[int, Losses], None]) -> None:
        """Takes the steps that are left.

        Args:
            state: file to go on from, if it is there, and to write to on the way.
            tell: hears of every step.

        Raises:
            InputError: the state is of other settings or another model.
        """
        if state.exists():
            self._load(state)
        while len(self.losses) < self.settings.steps:
            self.losses.append(self._step(len(self.losses)))
            tell(len(self.losses), self.losses[-1])
            if len(self.losses) % _SAVED_EVERY == 0:
                self._save(state)

    @torch.no_grad()
    def held_out(self) -> Held:
        """How the gates do on other texts, made 0 and 1."""
        lessons = [self._read(-1 - number) for number in range(_HELD_OUT)]
        gates, of = self.training.roles(), self._distillation
        hidden = [of.hidden(lesson, gates, self.training.sparse) for lesson in lessons]
        full = [of.accuracy(lesson, lesson.hidden) for lesson in lessons]
        kept = [of.accuracy(*pair) for pair in zip(lessons, hidden, strict=True)]
        errors = [float(of.error_of(*pair)) for pair in zip(lessons, hidden, strict=True)]
        return Held(float(gates.mean()), *(sum(each) / _HELD_OUT for each in (full, kept, errors)))

    def _step(self, number: int) -> Losses:
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + number)
        lesson = self._lesson(number % self.settings.texts)
        gates = self.training.draw(generator)
        error = self._distillation.error_of(lesson, self._distillation.hidden(lesson, gates, self.training.sparse))
        penalty = self.training.penalty()
        self._optimizer.zero_grad()
        (error + penalty).backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        self._schedule.step()
        self.training.settle()
        return Losses(float(error.detach()), float(penalty.detach()), float(self.training.values().mean()))

    def _read(self, number: int) -> Lesson:
        text = passkeys(self._model.tokenizer, self.settings.length, f"{self.settings.seed} {number}")
        return self._distillation.lesson(text)

    def _rate(self, step: int) -> float:
        """Up in the first fifth and down in the last, as the authors of DuoAttention have it."""
        fifth = max(1, self.settings.steps // 5)
        return min(1.0, max((step + 1) / fifth, 0.1), max((self.settings.steps - step) / fifth, 0.1))

    def _facts(self) -> dict[str, Any]:
        return asdict(self.settings) | {"weights_hash": self._model.weights_hash}

    def _save(self, state: Path) -> None:
        losses = [asdict(one) for one in self.losses]
        parts = {"optimizer": self._optimizer.state_dict(), "schedule": self._schedule.state_dict()}
        gates = [group["params"] for group in self._optimizer.param_groups]
        written = state.with_name(f"{state.name}.tmp")
        torch.save({"facts": self._facts(), "losses": losses, "gates": gates, **parts}, written)
        written.replace(state)

    def _load(self, state: Path) -> None:
        try:
            saved = torch.load(state, map_location=self._distillation.device, weights_only=True)
            known = saved["facts"]
        except Exception:  # whatever a broken file makes of unpickling
            raise InputError(f"{state} is no state of a calibration; delete it to begin anew") from None
        if known != self._facts():
            raise InputError(f"{state} is the state of another calibration; delete it to begin anew")
        self._optimizer.load_state_dict(saved["optimizer"])
        self._schedule.load_state_dict(saved["schedule"])
        self.losses = [Losses(**one) for one in saved["losses"]]
        for group, theirs in zip(self._optimizer.param_groups, saved["gates"], strict=True):
            for mine, other in zip(group["params"], theirs, strict=True):
                mine.data.copy_(other.data)
