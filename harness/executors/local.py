"""Processes of this machine, one for each of its GPUs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from queue import SimpleQueue
from threading import Thread

from harness.errors import InputError
from harness.executors.executor import Event
from harness.executors.place import Died, Place
from harness.measuring.provenance import gpus, usable_cpus


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
        told = device == "cuda" or "OMP_NUM_THREADS" in os.environ
        self.threads = None if told else max(1, (usable_cpus() or 1) // len(places))
        self._places = [Place(answer, {} if card is None else {"CUDA_VISIBLE_DEVICES": card}) for card in places]
        self._free = list(self._places)
        self._running: dict[int, Place] = {}
        self._events: SimpleQueue[Event] = SimpleQueue()

    def slots(self) -> int:
        """See `Executor`."""
        return len(self._places)

    def start(self, number: int, order: bytes) -> None:
        """See `Executor`."""
        for place in self._free:  # the other places prepare for the next orders while this one is carried out
            place.start(order)
        self._running[number] = place = self._free.pop(0)
        Thread(target=self._listen, args=(number, place, order), daemon=True).start()

    def next(self) -> Event:
        """See `Executor`."""
        event = self._events.get()
        if event.message is None:
            self._free.append(self._running.pop(event.number))
        return event

    def avoid(self, number: int) -> None:
        """There is only this machine."""

    def close(self) -> None:
        """See `Executor`."""
        for place in self._places:
            place.close()

    def _listen(self, number: int, place: Place, order: bytes) -> None:
        death = ""
        try:
            for message in place.carry_out(order):
                self._events.put(Event(number, message))
        except Died as error:
            death = str(error)
        self._events.put(Event(number, None, death))


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
