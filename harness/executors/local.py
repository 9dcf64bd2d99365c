"""Processes of this machine, one for each of its GPUs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread

from harness.errors import InputError
from harness.executors.executor import Event
from harness.measuring.provenance import gpus, usable_cpus

_COMMAND = (sys.executable, "-m", "harness.executors.process")


class LocalExecutor:
    """An `Executor` with a fixed number of places; each has a GPU, or a share of the CPU."""

    def __init__(self, answer: str, device: str, places: Sequence[str | None], note: str = "") -> None:
        """
        Args:
            answer: `package.module:function`.
            device: "cpu" or "cuda".
            places: UUID of a GPU, or None, for each.
            note: see `Executor`.
        """
        self.device, self.note = device, note
        self.threads = None if device == "cuda" else max(1, (usable_cpus() or 1) // len(places))
        self._answer, self._places, self._free = answer, len(places), list(places)
        self._running: dict[int, tuple[subprocess.Popen[bytes], str | None]] = {}
        self._events: SimpleQueue[Event] = SimpleQueue()

    def slots(self) -> int:
        """See `Executor`."""
        return self._places

    def start(self, number: int, order: bytes) -> None:
        """See `Executor`."""
        place = self._free.pop(0)
        # What can be imported here can be imported there, whatever put it onto the path.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        environment |= {} if place is None else {"CUDA_VISIBLE_DEVICES": place}
        process = subprocess.Popen(
            [*_COMMAND, self._answer], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._running[number] = process, place
        Thread(target=self._listen, args=(number, process, order), daemon=True).start()

    def next(self) -> Event:
        """See `Executor`."""
        event = self._events.get()
        if event.message is None:
            process, place = self._running.pop(event.number)
            _close(process)
            self._free.append(place)
        return event

    def avoid(self, number: int) -> None:
        """There is only this machine."""

    def processes(self) -> list[int]:
        """Numbers of the processes that are running."""
        return [process.pid for process, _ in self._running.values()]

    def close(self) -> None:
        """See `Executor`."""
        running = [process for process, _ in list(self._running.values())]
        for process in running:
            process.kill()
        for process in running:
            process.wait()

    def _listen(self, number: int, process: subprocess.Popen[bytes], order: bytes) -> None:
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.write(order + b"\n")
            process.stdin.flush()
        for line in process.stdout:
            if line.endswith(b"\n"):  # a process that is killed may leave half a line
                self._events.put(Event(number, line[:-1]))
        self._events.put(Event(number, None, _death(process.wait())))


def local_executor(
    answer: str, device: str, *, alone: bool, workers: int | None, accelerator: str | None
) -> LocalExecutor:
    """One place a GPU, or one on a CPU.

    Args:
        answer: `package.module:function`.
        device: "cpu" or "cuda".
        alone: an order shares the machine with no other, unless `workers` says so.
        workers: places, if not as many as that.
        accelerator: a part of the GPUs' name, where there are several kinds.

    Raises:
        InputError: more places than GPUs, or GPUs of several kinds.
    """
    cards: list[str | None] = [None] * (workers or 1) if device == "cpu" else [*_cards(accelerator)]
    if workers is not None and workers > len(cards):
        raise InputError(f"--workers: {workers} are more than the {len(cards)} GPUs that are visible")
    count = workers or (1 if alone else len(cards))
    note = f"timed requests have the machine to themselves; --workers {len(cards)} or --no-timing uses all its GPUs"
    return LocalExecutor(answer, device, cards[:count], note if count < len(cards) and workers is None else "")


def _cards(accelerator: str | None) -> list[str]:
    """UUIDs of the visible GPUs, which are of one kind."""
    found = [card for card in gpus() or [] if accelerator is None or accelerator.lower() in str(card["name"]).lower()]
    kinds = sorted({str(card["name"]) for card in found})
    if len(kinds) > 1:
        raise InputError(f"GPUs of {len(kinds)} kinds: {', '.join(kinds)}; choose one with --accelerator")
    if not found:
        raise InputError(f"no GPU is visible{f' that is called {accelerator}' if accelerator else ''}")
    return [str(card["uuid"]) for card in found]


def _death(code: int) -> str:
    if code >= 0:
        return f"exit code {code}" if code else ""
    return f"killed by {signal.Signals(-code).name}"


def _close(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):
                pipe.close()
