"""SlimInfer (Long et al., arXiv 2508.06447): what the paper reports, and the run that measures it again.

Speed-ups: abstract and Figure 4, LLaMA-3.1-8B-Instruct on one RTX 4090, 32K prompt. Prompt KV: the paper's memory
table, which its pruning schedule explains to every digit. LongBench averages (48.08 full, 47.65 SlimInfer, for LLaMA)
are not part of this: they need trained weights (`harness run --tasks longbench/en`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from harness.engine.shape import ModelShape
from harness.errors import InputError
from harness.reproduce.claims import Claim
from methods.common.schedule import scaled_layers

LENGTHS = (8192, 16384, 24576, 32768)
NEW_TOKENS = (1, 64)
LONGEST = LENGTHS[-1]
LEAST_BUDGET = 128
"""What slim's sink and tail need."""

TTFT = Claim("TTFT speed-up of slim over full, 32K prompt", 2.53, "x")
E2E = Claim("end-to-end speed-up of slim over full, 32K prompt + 64 new tokens", 1.88, "x")


@dataclass(frozen=True)
class Setting:
    """The paper's schedule for one model.

    Attributes:
        name: the model.
        shape: its numbers.
        layers: first layer to hold each pruned set, 0-based.
        budgets: tokens of that set.
        kv_gib: prompt length -> GiB of prompt KV (full, slim), as published; empty where nothing is.
        speed: whether the published speed-ups are this model's.
    """

    name: str
    shape: ModelShape
    layers: tuple[int, ...]
    budgets: tuple[int, ...]
    kv_gib: Mapping[int, tuple[float, float]]
    speed: bool

    def label(self) -> str:
        """The schedule as options of slim."""
        return f"budgets={_slashed(self.budgets)}:layers={_slashed(self.layers)}"


LLAMA = Setting(
    "LLaMA-3.1-8B",
    ModelShape("llama", 32, 4096, 14336, 32, 8, 128, 128256, 131072),
    (10, 20, 30),
    (8192, 4096, 2048),
    MappingProxyType({8192: (1.00, 0.80), 16384: (2.00, 1.11), 24576: (3.00, 1.42), 32768: (4.00, 1.73)}),
    speed=True,
)
QWEN = Setting(
    "Qwen2.5-7B",
    ModelShape("qwen2", 28, 3584, 18944, 28, 4, 128, 152064, 131072),
    (9, 18, 26),
    (12288, 6144, 4096),
    MappingProxyType({}),
    speed=False,
)
SETTINGS = (LLAMA, QWEN)


def setting_for(shape: ModelShape, longest: int) -> Setting:
    """The paper's setting for a model of this shape; for any other, LLaMA's with its layers scaled to the depth.

    Where the longest prompt is shorter than the paper's, budgets shrink with it: the paper's would prune nothing.

    Args:
        shape: of the model.
        longest: tokens of the longest prompt that is to be run.
    """
    known = next((setting for setting in SETTINGS if _same(setting.shape, shape)), None)
    if known is not None:
        return known
    layers = scaled_layers(LLAMA.layers, LLAMA.shape.layers, shape.layers)
    share = min(1.0, longest / LONGEST)
    budgets = tuple(max(LEAST_BUDGET, round(budget * share)) for budget in LLAMA.budgets)
    return Setting("another shape", shape, layers, budgets, MappingProxyType({}), speed=False)


def run_options(
    setting: Setting, lengths: Sequence[int], new_tokens: Sequence[int], repeats: int, slim: str = ""
) -> dict[str, Any]:
    """Methods and tasks of the paper's table, as `harness.runner.spec.RunSpec` takes them.

    Args:
        setting: schedule.
        lengths: prompt tokens.
        new_tokens: tokens to generate; TTFT is read at the fewest, end to end at the most.
        repeats: samples for each length and number of new tokens.
        slim: more options of slim, such as `score=absdot:w=4`.
    """
    schedule = setting.label()
    lazy = schedule.replace("budgets=", "keep=")
    methods = ["full", f"lazyllm:{lazy}:revive=true", ":".join(filter(None, ["slim", schedule, slim]))]
    tasks = [f"speed:lengths={_slashed(lengths)}:new_tokens={count}:repeats={repeats}" for count in new_tokens]
    return {"methods": ",".join(methods), "tasks": ",".join(tasks)}


def numbers(option: str, text: str, least: int) -> tuple[int, ...]:
    """The whole numbers of `8192/16384` or `1,64`, ascending.

    Raises:
        InputError: something else, a number twice, or one below `least`.
    """
    parts = text.replace(",", "/").split("/")
    if not all(part.strip().isdecimal() for part in parts):
        raise InputError(f"{option} {text!r}: expected whole numbers with slashes between them, such as 8192/16384")
    found = sorted(int(part) for part in parts)
    if found[0] < least or len(set(found)) < len(found):
        raise InputError(f"{option} {text!r}: each number once, and none below {least}")
    return tuple(found)


def _same(one: ModelShape, other: ModelShape) -> bool:
    return (one.family, one.layers, one.linear_params, one.head_params, one.kv_heads) == (
        other.family,
        other.layers,
        other.linear_params,
        other.head_params,
        other.kv_heads,
    )


def _slashed(values: Sequence[int]) -> str:
    return "/".join(map(str, values))
