"""One request on its way: its tokens as they come, and what was done for them."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

from harness.engine.replay.recorded import RecordedDecode
from harness.engine.replay.recorded_prefill import RecordedPrefill


@dataclass
class Work:
    """What was done for a request.

    Attributes:
        projected: rows that went through norm and q/k/v in the prefill, layer after layer, pass after pass.
        fed: rows that went through output projection and MLP, likewise.
        past: tokens before those rows that they attended to as well, likewise.
        eager: every kernel is launched anew, even where it could be replayed.
        recorded: what replays the decode steps; None while every step is launched anew.
        prefill: what ran the prefill, if that could be replayed.
        captures: parts of the prefill that had to be recorded first, so that its time says nothing.
        start: position of the first new token, once what is ahead of it is in.
    """

    projected: list[int] = field(default_factory=list)
    fed: list[int] = field(default_factory=list)
    past: list[int] = field(default_factory=list)
    eager: bool = False
    recorded: RecordedDecode | None = None
    prefill: RecordedPrefill | None = field(default=None, compare=False)
    captures: int = field(default=0, compare=False)
    start: int = 0


class Generation(Iterator[int]):
    """New token ids, each once it is on the host: the first `next` is the prefill (TTFT), later ones decode (TPOT).

    Attributes:
        work: complete as to the prefill with the first token.
        tokens: handed out so far; the last of them is not in the caches.
    """

    def __init__(self, tokens: Generator[int], work: Work) -> None:
        """
        Args:
            tokens: makes the tokens. When it is closed, or let go, caches hold what was handed out.
            work: what it does; the generator may hold this, but not the object that is made here.
        """
        self._made, self.work = tokens, work
        self.tokens: list[int] = []

    def __next__(self) -> int:
        self.tokens.append(token := next(self._made))
        return token

    def close(self) -> None:
        """No further token is wanted; caches hold what was handed out."""
        self._made.close()

    def overlap(self) -> dict[str, float] | None:
        """`Overlap.read` of the last decode step; None if nothing ran beside it."""
        overlap = self.work.recorded.overlap if self.work.recorded is not None else None
        return overlap.read() if overlap is not None else None
