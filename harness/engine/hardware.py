"""What the device can do that the choice of kernels depends on."""

from __future__ import annotations

import torch


def dependent_launch(device: torch.device) -> bool:
    """Whether kernels of one stream may overlap their start (programmatic dependent launch: Hopper and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
