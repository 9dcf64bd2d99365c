"""Whether a model's weights fit into the memory that is free, asked before they are loaded."""

from __future__ import annotations

import psutil
import torch

from harness.engine.parallel import ALONE, Ranks
from harness.engine.shape import ModelShape
from harness.errors import InputError


def check_memory(
    name: str, shape: ModelShape, tied: bool, device: torch.device, dtype: torch.dtype, ranks: Ranks = ALONE
) -> None:
    """Refuses a model that is larger than the device's free memory.

    Args:
        name: the model's, for the error.
        shape: its shape.
        tied: whether the output matrix is the embedding.
        device, dtype: where the weights would go, and as what.
        ranks: of which each has its part.

    Raises:
        InputError: says both sizes.
    """
    needed, free = weight_bytes(shape, tied, dtype, ranks), free_bytes(device)
    each = "" if ranks.size == 1 else " on each device"
    if needed > free:
        kind = str(dtype).removeprefix("torch.")
        raise InputError(
            f"model {name!r} takes {needed / 2**30:.1f} GiB as {kind}{each}; {free / 2**30:.1f} GiB of {device.type} "
            "memory are free"
        )


def weight_bytes(shape: ModelShape, tied: bool, dtype: torch.dtype, ranks: Ranks = ALONE) -> int:
    """Bytes of a model's weights on one device; see `check_memory`."""
    own = ranks.part(shape)
    params = own.layers * own.linear_params + shape.head_params + (0 if tied else own.head_params)
    return params * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on the device, PyTorch's own reserve included."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused
