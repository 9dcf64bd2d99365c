"""What measuring costs: the same requests under `measure` and under a bare clock.

    python -m harness.runner.overhead                                             # embedded model, 512 tokens, 40 pairs
    python -m harness.runner.overhead --model random:llama-3.1-8b --tokens 32768 --device cuda --method slim

Two readings, because each has what the other lacks:

- *cost*: seconds that `measure` takes of itself, clocked with an engine that answers at once from the caches of a real
  prefill. Exact to microseconds on any machine; it holds everything before and after the clock, so it is more than
  what can be inside a TTFT.
- *ratio*: TTFT as `measure` reports it over that of a bare clock around the same engine, in interleaved pairs, with a
  95 % interval. It has everything in it, also what nobody thought of, and the noise of the machine.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from harness.engine.engine import Engine
from harness.engine.generation import Generation, Work
from harness.engine.method import Method
from harness.engine.request import Request
from harness.measuring.clock import measure, synchronize
from harness.runner.catalog import parse_methods
from harness.statistics.estimators import pairs, speed_effect

PAIRS = 40
_CLOCKED = 200


@dataclass(frozen=True)
class Overhead:
    """What measuring one request costs.

    Attributes:
        ttft_s: median TTFT under the bare clock.
        cost_s: median seconds that `measure` takes of itself, inside and outside of its interval.
        ratio: TTFT reported by `measure` over the bare one, trimmed geometric mean.
        low, high: its 95 % interval.
        pairs: how many were timed.
    """

    ttft_s: float
    cost_s: float
    ratio: float
    low: float
    high: float
    pairs: int

    @property
    def share(self) -> float:
        """`cost_s` over `ttft_s`."""
        return self.cost_s / self.ttft_s

    def __str__(self) -> str:
        return (
            f"TTFT {self.ttft_s:.4g} s; measuring costs {self.cost_s * 1e3:.3g} ms, {self.share:.3%} of it; TTFT as "
            f"measured over a bare clock's: {self.ratio:.4f} [{self.low:.4f}, {self.high:.4f}], {self.pairs} pairs"
        )


def overhead(engine: Engine, method: Method, request: Request, count: int = PAIRS) -> Overhead:
    """Times one request `count` times under either clock, in the runner's order, A B B A.

    Args:
        engine: of a loaded model.
        method: what is measured.
        request: of one new token, or the rest is not looked at.
        count: pairs; one pair runs before, unrecorded.
    """
    clocks: list[Callable[[], float]] = [
        lambda: bare_ttft(engine, method, request),
        lambda: measure(engine, method, request).ttft_s,
    ]
    found = np.empty((count + 1, 2))
    for number, row in enumerate(found):
        for index in (number % 2, 1 - number % 2):
            row[index] = clocks[index]()
    cost = own_cost(engine, method, request)
    logs = np.log(found[1:, 1] / found[1:, 0])
    effect = speed_effect([pairs(list(logs), list(range(count)))])
    ratio, low, high = (math.exp(value) for value in (effect.estimate, effect.low, effect.high))
    return Overhead(float(np.median(found[1:, 0])), cost, ratio, low, high, count)


def bare_ttft(engine: Engine, method: Method, request: Request) -> float:
    """Seconds to the first token id on the host, and nothing else."""
    synchronize(request.prompt.device)
    start = time.perf_counter()
    next(engine.stream(method, request))
    return time.perf_counter() - start


def own_cost(engine: Engine, method: Method, request: Request, times: int = _CLOCKED) -> float:
    """Median seconds of `measure` with an engine that takes no time, after one real prefill filled the caches."""
    next(real := engine.stream(method, request))
    instant: Any = _Instant(engine, real.work)
    return statistics.median(_clocked(lambda: measure(instant, method, request)) for _ in range(times))


def _clocked(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class _Instant:
    """Answers one token at once; what was computed is what a real engine computed."""

    def __init__(self, engine: Engine, work: Work) -> None:
        self.context, self._work = engine.context, work

    def stream(self, method: Method, request: Request) -> Generation:
        """One token."""
        return Generation((token for token in (0,)), self._work)


def main(arguments: Sequence[str] | None = None) -> int:
    """Loads a model, prints the two readings; exit code 1 where measuring costs 1 % of TTFT or more."""
    parser = argparse.ArgumentParser(description="What measuring costs, beside a bare clock.")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--method", default="full")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tokens", type=int, default=512, help="of the prompt")
    parser.add_argument("--pairs", type=int, default=PAIRS)
    asked = parser.parse_args(arguments)
    from harness.models.load import load

    model = load(asked.model, asked.device)
    engine = Engine(model.model, model.shape)
    ids = torch.randint(100, 1000, (asked.tokens,), generator=torch.Generator().manual_seed(0))
    method = parse_methods(asked.method)[0].build(engine.context)
    found = overhead(engine, method, Request(ids.to(model.model.device), 1, frozenset()), asked.pairs)
    print(f"{asked.method}, {asked.tokens} tokens on {model.model.device}: {found}")
    return int(found.share >= 0.01)


if __name__ == "__main__":
    sys.exit(main())
