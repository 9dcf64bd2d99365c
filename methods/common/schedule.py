"""Progressive schedules: at which layers the set of tokens shrinks, and to how many."""

from __future__ import annotations

from collections.abc import Sequence

from harness.engine.shape import ModelShape
from harness.errors import InputError
from harness.options import budget_tokens


def scaled_layers(points: Sequence[int], depth_there: int, depth: int) -> tuple[int, ...]:
    """Pruning layers published for a model of `depth_there` layers, moved to a model of `depth`."""
    return tuple(min(round(point * depth / depth_there), depth - 1) for point in points)


def pruning_layers(given: tuple[int, ...] | None, depth: int) -> tuple[int, ...]:
    """The layers that the options name, or SlimInfer's 10, 20 and 30 of 32 moved to a model of `depth` layers."""
    return given if given is not None else scaled_layers((10, 20, 30), 32, depth)


def check_schedule(owner: str, given: tuple[int, ...] | None, budgets: Sequence[float], shape: ModelShape) -> None:
    """Raises `InputError` unless every pruning layer exists, they ascend, and each has its budget.

    Args:
        owner: the method, as messages call it.
        given: layers that the options name, None for the default schedule.
        budgets: what each keeps.
        shape: of the model.
    """
    layers = pruning_layers(given, shape.layers)
    ascending = list(layers) == sorted(set(layers))
    if given is None and not ascending:
        raise InputError(
            f"{owner}: the model is too shallow ({shape.layers} layers) for the default schedule; name layers"
        )
    if len(layers) != len(budgets):
        raise InputError(f"{owner}: {len(budgets)} budgets for {len(layers)} pruning layers; give one for each")
    if not ascending:
        raise InputError(f"{owner}: pruning layers must ascend, not {'/'.join(map(str, layers))}")
    if layers and (layers[0] < 1 or layers[-1] >= shape.layers):
        raise InputError(f"{owner}: pruning layers must lie in 1..{shape.layers - 1}, not {'/'.join(map(str, layers))}")


def requested_tokens(layers: Sequence[int], tokens: Sequence[int], prompt_len: int, depth: int) -> list[int]:
    """Prompt tokens for each of `depth` layers when layer `layers[i]` is the first to hold at most `tokens[i]`."""
    counts, now = [], prompt_len
    for layer in range(depth):
        if layer in layers:
            now = min(now, tokens[layers.index(layer)])
        counts.append(now)
    return counts


def budgets_in_tokens(budgets: Sequence[int | float], prompt_len: int) -> list[int]:
    """Each budget in tokens of this prompt."""
    return [budget_tokens(budget, prompt_len) for budget in budgets]
