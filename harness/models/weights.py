"""Weights into a model: every tensor that it asks for, no other, each in its shape, and all of them numbers.

Transformers fills in what a checkpoint lacks with random numbers and passes over what it does not know; an answer of
such a model looks like any other. So names and shapes are compared before the first weight is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.engine.parallel import ALONE, Ranks
from harness.errors import InputError
from harness.models.division import cut_head, part_config, part_of
from harness.models.weightless import empty_model, finish, last_line

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Old checkpoints carry what follows from their configuration.
_DERIVED = re.compile(r"rotary_emb\.inv_freq$")
_KINDS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def fill(
    owner: str,
    config: Any,
    shapes: Mapping[str, Sequence[int]],
    read: Callable[[str], Tensor],
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks = ALONE,
) -> Any:
    """The model of a configuration with the weights that a file holds.

    Args:
        owner: whose weights they are, for errors ("model 'x'").
        config: the transformers configuration.
        shapes: what there is, by transformers' names.
        read: gives the tensor of a name.
        device, dtype: where the weights go, and as what.
        ranks: of whose weights this one's part is wanted.

    Raises:
        InputError: tensors are missing, unexpected, of another shape or type, or not finite.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in empty_model(config, dtype).state_dict().items()}
    found = {name: tuple(shape) for name, shape in shapes.items() if not _DERIVED.search(name)}
    tied = bool(config.tie_word_embeddings)
    _compare(owner, wanted, found, optional={_HEAD} if tied else set())
    state = {name: _numbers(owner, name, part_of(name, read(name), ranks), device, dtype) for name in found}
    if tied:
        _check_tie(owner, state)
        state[_HEAD] = state[_EMBEDDING]
    model = empty_model(part_config(config, ranks), dtype)
    model.load_state_dict(state, assign=True)
    return cut_head(finish(model, device), ranks)


def fill_from_safetensors(
    owner: str,
    config: Any,
    files: Iterable[Path],
    device: torch.device,
    dtype: torch.dtype,
    ranks: Ranks = ALONE,
) -> Any:
    """The model of a configuration with the weights of safetensors files; see `fill`.

    Raises:
        InputError: as `fill`, or a file that is no safetensors file.
    """
    from safetensors import safe_open

    with ExitStack() as stack:
        holders: dict[str, Any] = {}
        for path in files:
            try:
                reader = stack.enter_context(safe_open(path, "pt"))
            except Exception as error:  # safetensors has errors of its own
                raise InputError(f"{owner}: {path.name} is not readable: {last_line(error)}") from None
            holders |= dict.fromkeys(reader.keys(), reader)
        shapes = {name: reader.get_slice(name).get_shape() for name, reader in holders.items()}
        return fill(owner, config, shapes, lambda name: holders[name].get_tensor(name), device, dtype, ranks)


def _compare(
    owner: str, wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], optional: set[str]
) -> None:
    if missing := wanted.keys() - found.keys() - optional:
        raise InputError(f"{owner}: its weights lack {_listed(missing)}, which its configuration asks for")
    if unexpected := found.keys() - wanted.keys():
        raise InputError(f"{owner}: its weights hold {_listed(unexpected)}, which its configuration has no place for")
    for name, shape in found.items():
        if shape != wanted[name]:
            raise InputError(f"{owner}: {name} has the shape {shape}; its configuration asks for {wanted[name]}")


def _listed(names: set[str]) -> str:
    first, *others = sorted(names)
    return f"{first} and {len(others)} more tensors" if others else first


def _numbers(owner: str, name: str, tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    if tensor.dtype not in _KINDS:
        raise InputError(f"{owner}: {name} is of type {str(tensor.dtype).removeprefix('torch.')}, not of floats")
    # A copy: what safetensors hands out is the file itself, which may change.
    values = tensor.to(device, dtype, copy=True)
    low, high = torch.aminmax(values)  # a NaN comes through, and nothing of the tensor's size is allocated
    if not (low.isfinite() and high.isfinite()):
        raise InputError(f"{owner}: {name} is not finite as {str(dtype).removeprefix('torch.')}")
    return values


def _check_tie(owner: str, state: Mapping[str, Tensor]) -> None:
    if _HEAD in state and not torch.equal(state[_HEAD], state[_EMBEDDING]):
        raise InputError(f"{owner}: {_HEAD} differs from {_EMBEDDING}, which its configuration ties to it")
