"""What the device can do that the choice of kernels depends on."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor


def dependent_launch(device: torch.device) -> bool:
    """Whether kernels of one stream may overlap their start (programmatic dependent launch: Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def kernels_run(device: torch.device) -> bool:
    """Whether the kernels of `harness.engine.kernels` run there."""
    return device.type == "cuda" and find_spec("triton") is not None


def kernels_take(heads: Tensor) -> bool:
    """Whether the kernels that multiply heads take these, [..., head_dim]: 16 bits each, channels a power of two."""
    d = heads.shape[-1]
    return kernels_run(heads.device) and heads.element_size() == 2 and d >= 16 and d & (d - 1) == 0
