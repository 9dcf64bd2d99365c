"""The test bench of the statistics: how often do they cry wolf, and how often do they sleep?

    python -m harness.statistics.bench real       # times a real workload against itself, and against itself made slower
    python -m harness.statistics.bench simulate   # the same with simulated clocks, so that it can be repeated exactly
    python -m harness.statistics.bench coverage   # share of 95 % intervals that hold the truth, for 5 to 200 samples

A repeat is one comparison as a report makes it: interleaved pairs of runs, `speed_effect`, `verdict`. It is an alarm
where the verdict is better or worse. In half of the repeats B is A itself and every alarm is false; in the other half B
does 5 % more work, and the verdict has to be worse.

Real runs here last a fraction of a millisecond, less than the slices in which a scheduler hands out a shared core. A
fixed order (A B B A) can fall into step with those slices: measured under load, neighbouring pairs were correlated (up
to 0.1; 0.6 at a distance of three) and 95 % intervals held the truth 76 to 100 % of the time. So a coin decides which
run of a pair is first. Requests that last seconds contain hundreds of slices and have no such problem.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from harness.statistics.estimators import SPEED_ALPHA, Effect, Floats, pairs, score_effect, speed_effect
from harness.statistics.paired import MARGIN_RATIO, Verdict, verdict
from harness.statistics.power import pairs_needed

REPEATS = 100
PAIRS = 100
SLOWDOWN = 0.05

Workload = Callable[[int], object]


@dataclass(frozen=True)
class BenchResult:
    """What came out of `repeats` comparisons of a thing with itself, and as many with a slower one.

    Attributes:
        repeats: comparisons of each kind.
        pairs: interleaved pairs of runs in each comparison.
        slowdown: injected, as a fraction of the time.
        false_alarms: comparisons of a thing with itself that were called better or worse.
        caught: slower things that were called worse.
        covered: intervals of both kinds that held the truth.
        spread: median standard deviation of the log ratio of a pair, as its trimmed mean sees it.
        measured: median estimate of the injected slowdown.
        run_s: median seconds of a run; NaN where clocks are simulated.
    """

    repeats: int
    pairs: int
    slowdown: float
    false_alarms: int
    caught: int
    covered: int
    spread: float
    measured: float
    run_s: float = math.nan

    @property
    def false_alarm_rate(self) -> float:
        """Share of comparisons of a thing with itself; `SPEED_ALPHA` is expected."""
        return self.false_alarms / self.repeats

    @property
    def power(self) -> float:
        """Share of slower things that were called worse."""
        return self.caught / self.repeats

    def __str__(self) -> str:
        run = "" if math.isnan(self.run_s) else f", runs of {self.run_s * 1e3:.2f} ms"
        return (
            f"{self.pairs} pairs{run}, spread {self.spread:.1%}: false alarms {self.false_alarms} of {self.repeats}; "
            f"slowdown of {self.slowdown:.0%} (measured {self.measured:.1%}) caught {self.caught} of {self.repeats}; "
            f"95 % intervals that hold the truth {self.covered / self.repeats / 2:.1%}; "
            f"pairs needed at this spread {pairs_needed(self.spread, 1 + self.slowdown)}"
        )


def run_bench(
    repeats: int = REPEATS, pairs: int = PAIRS, slowdown: float = SLOWDOWN, workload: Workload | None = None
) -> BenchResult:
    """Times a real workload on this machine, repeats x pairs x 4 runs of it.

    The slower one is not asked to sleep, it does more: 21 steps instead of 20 are 5 % more work of the same kind.

    Args:
        repeats: comparisons of each kind.
        pairs: interleaved pairs in each.
        slowdown: injected; 1 / slowdown is rounded to whole steps.
        workload: does as many steps as it is told; by default a step is a product of two 64 x 64 matrices, which
            no BLAS spreads over threads.
    """
    work = workload or _matrices()
    steps = round(1 / slowdown)
    work(50 * steps)
    clocks: list[float] = []
    coin = np.random.default_rng(0)

    def logs(slower: bool) -> Floats:
        turned = coin.integers(0, 2, pairs).tolist()
        times = np.array([_timed_pair(work, steps, steps + slower, bool(turn)) for turn in turned])
        clocks.append(float(np.median(times[:, 0])))
        return np.asarray(np.log(times[:, 0] / times[:, 1]))

    return _bench(logs, repeats, pairs, 1 / steps, clocks)


def simulate_bench(
    repeats: int = REPEATS, pairs: int = PAIRS, slowdown: float = SLOWDOWN, noise: float = 0.05, seed: int = 0
) -> BenchResult:
    """The same on simulated clocks; equal arguments give equal results.

    Args:
        repeats: comparisons of each kind.
        pairs: interleaved pairs in each.
        slowdown: injected.
        noise: standard deviation of the log of one run's time; see `simulated_logs` for what is added to it.
        seed: of the clocks.
    """
    generator = np.random.default_rng(seed)

    def logs(slower: bool) -> Floats:
        return simulated_logs(generator, pairs, slowdown if slower else 0.0, noise)

    return _bench(logs, repeats, pairs, slowdown, [math.nan])


def simulated_logs(
    generator: np.random.Generator, pairs: int, slowdown: float = 0.0, noise: float = 0.05, interrupted: float = 0.03
) -> Floats:
    """[pairs] log ratios of a machine with lognormal noise, a drift and runs that something else interrupts.

    Args:
        generator: of randomness.
        pairs: how many.
        slowdown: of the second of a pair, as a fraction.
        noise: standard deviation of the log of a run's time.
        interrupted: share of runs that take 1.2 to 3 times as long.
    """
    logs = generator.normal(0, noise, (pairs, 2))
    hit = generator.random((pairs, 2)) < interrupted
    logs += hit * np.log(generator.uniform(1.2, 3, (pairs, 2)))
    # The machine gets 20 % slower while it is measured; the order of a pair turns around each time.
    place = np.arange(2 * pairs).reshape(pairs, 2)
    place[1::2] = place[1::2, ::-1]
    logs += 0.2 * place / (2 * pairs)
    return np.asarray(logs[:, 0] - logs[:, 1] - math.log1p(slowdown))


def call(logs: Floats) -> tuple[Effect, Verdict]:
    """One comparison of times as a report makes it: its effect and its verdict."""
    found = speed_effect([pairs(logs)])
    word = verdict(
        found.estimate, found.low, found.high, found.p, margin=math.log(MARGIN_RATIO), alpha=SPEED_ALPHA, mde=0.0
    )
    return found, word


def speed_coverage(number: int, noise: float, interrupted: float, repeats: int = 4000, seed: int = 0) -> float:
    """Share of 95 % intervals of `number` pairs that hold the true ratio; see `simulated_logs`."""
    generator = np.random.default_rng([seed, number])
    draws = (simulated_logs(generator, number, noise=noise, interrupted=interrupted) for _ in range(repeats))
    effects = [speed_effect([pairs(draw)]) for draw in draws]
    return sum(effect.low <= 0 <= effect.high for effect in effects) / repeats


def score_coverage(
    number: int, lost: float, won: float, sizes: Sequence[float] = (1.0,), repeats: int = 2000, seed: int = 0
) -> float:
    """Share of 95 % intervals of `number` samples that hold the true difference.

    Args:
        number: samples.
        lost: share of which the method's score is lower than the reference's.
        won: share of which it is higher.
        sizes: by how much, each as often as the others; 1 alone is right or wrong.
        repeats: simulated runs.
        seed: of the samples.
    """
    generator = np.random.default_rng([seed, number])
    draws = generator.choice([-1.0, 1.0, 0.0], (repeats, number), p=[lost, won, 1 - lost - won])
    draws *= generator.choice(sizes, draws.shape)
    effects = [score_effect([pairs(draw, label=str(index))]) for index, draw in enumerate(draws)]
    truth = (won - lost) * float(np.mean(sizes))
    return sum(effect.low - 1e-9 <= truth <= effect.high + 1e-9 for effect in effects) / repeats


def _bench(
    logs: Callable[[bool], Floats], repeats: int, pairs: int, slowdown: float, clocks: list[float]
) -> BenchResult:
    # The two kinds alternate, so that a bad minute of the machine falls on both.
    calls = [(call(logs(False)), call(logs(True))) for _ in range(repeats)]
    same, slow = zip(*calls, strict=True)
    truths = [(effect, 0.0) for effect, _ in same] + [(effect, -math.log1p(slowdown)) for effect, _ in slow]
    return BenchResult(
        repeats=repeats,
        pairs=pairs,
        slowdown=slowdown,
        false_alarms=sum(word in ("better", "worse") for _, word in same),
        caught=sum(word == "worse" for _, word in slow),
        covered=sum(effect.low <= truth <= effect.high for effect, truth in truths),
        spread=float(np.median([effect.se for effect, _ in same])) * math.sqrt(pairs),
        measured=math.expm1(-float(np.median([effect.estimate for effect, _ in slow]))),
        run_s=float(np.median(clocks)),
    )


def _timed_pair(work: Workload, first: int, second: int, turned: bool) -> tuple[float, float]:
    if turned:
        later = _timed(work, second)
        return _timed(work, first), later
    return _timed(work, first), _timed(work, second)


def _timed(work: Workload, steps: int) -> float:
    start = time.perf_counter()
    work(steps)
    return time.perf_counter() - start


def _matrices(size: int = 64) -> Workload:
    matrix = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)

    def work(steps: int) -> None:
        for _ in range(steps):
            matrix @ matrix

    return work


# Noise of a run and share of interrupted runs.
_MACHINES = {"quiet": (0.01, 0.0), "usual": (0.05, 0.03), "busy": (0.1, 0.1)}
_ANSWERS = {"2 % lost, 2 % won": (0.02, 0.02), "5 % lost": (0.05, 0.0), "20 % lost, 10 % won": (0.2, 0.1)}
# By how much graded answers change: anything alike, and mostly little.
EVEN, SKEWED = tuple(np.linspace(0.05, 1, 20).tolist()), (0.1, 0.1, 0.1, 0.1, 1.0)
_GRADED = {
    "10 % worse": (0.1, 0.0, EVEN),
    "30 % worse": (0.3, 0.0, EVEN),
    "10 % worse, mostly little": (0.1, 0.0, SKEWED),
}


def _coverage_report() -> Iterator[str]:
    sizes = (5, 6, 8, 10, 15, 20, 30, 50)
    yield _row("times, pairs", sizes)
    for name, machine in _MACHINES.items():
        yield _row(name, [f"{speed_coverage(size, *machine):.1%}" for size in sizes])
    sizes = (5, 10, 15, 20, 30, 50, 100, 200)
    yield _row("scores, samples", sizes)
    for name, (lost, won) in _ANSWERS.items():
        yield _row(name, [f"{score_coverage(size, lost, won):.1%}" for size in sizes])
    for name, graded in _GRADED.items():
        yield _row(name, [f"{score_coverage(size, *graded):.1%}" for size in sizes])


def _row(name: str, cells: Iterable[object]) -> str:
    return f"| {name} | " + " | ".join(map(str, cells)) + " |"


def _simulated_report() -> Iterator[str]:
    for noise in (0.02, 0.05, 0.07):
        for number in (10, 20, 50, 100):
            yield str(simulate_bench(1000, number, noise=noise))


def main(arguments: list[str]) -> int:
    """Prints one of the three reports; the number after `real` is of pairs."""
    kind, *rest = arguments or ["real"]
    if kind == "real":
        print(run_bench(pairs=int(rest[0]) if rest else PAIRS))
        return 0
    for line in {"simulate": _simulated_report, "coverage": _coverage_report}[kind]():
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
