"""Devices by their data sheets, and the rates that the work of this harness meets on them.

A data sheet's matrix rate is a burst at the highest clock; what a long prefill gets is less, and how much less differs
from card to card. Where a device file says what was measured (`lasting_tflops`, `copy_gb_per_s`), that is taken.
Elsewhere the device gets the shares of its data sheet that the fitted device reached, and times are as uncertain as
those shares are among cards. Ratios of times are not: both sides have the same rates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness.errors import InputError, unknown

MATRIX_SHARES = (0.60, 0.95)
"""Lasting matrix rate over the data sheet's: from cards at their power limit (H200: 0.66) to cards that are not."""
MEMORY_SHARES = (0.80, 0.95)
"""Copy rate over the data sheet's; H200: 0.89."""
READING = 1.12
"""What reading alone reaches, over a copy's rate, since the bus does not turn around: an H200's data sheet rate."""
BUS_SHARE = 0.85
"""Of a host link's data sheet rate that large copies reach (PCIe's packet headers take the rest)."""

Amount = Annotated[float, Field(ge=1e-6, le=1e9)]
"""Of a data sheet, in its units; what lies beyond was meant in others, and makes times that no float holds."""


class Device(BaseModel):
    """One entry of a device file; units are in the names, GB are 1e9 bytes.

    Attributes:
        title: for people.
        matches: part of the name under which the driver knows it; "" if it is never to be recognised.
        matrix_tflops, memory_gb_per_s, bus_gb_per_s, memory_gib, power_w: the data sheet's.
        lasting_tflops, copy_gb_per_s: measured, see `harness env --measure`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    title: str
    matches: str = ""
    matrix_tflops: Amount
    memory_gb_per_s: Amount
    bus_gb_per_s: Amount
    memory_gib: Amount
    power_w: Amount
    lasting_tflops: Amount | None = None
    copy_gb_per_s: Amount | None = None

    @property
    def measured(self) -> bool:
        """Whether its rates are known by more than the data sheet."""
        return self.lasting_tflops is not None and self.copy_gb_per_s is not None


@dataclass(frozen=True)
class Rates:
    """What work meets: FLOP/s that last, bytes a second of memory (a copy's, read plus written) and of the host link.

    `reads` is what reading alone gets of memory (`reading`), `power` the board's limit in watts, NaN where unknown.
    """

    matrix: float
    memory: float
    bus: float
    reads: float
    power: float = math.nan


def reading(copy: float, device: Device | None) -> float:
    """Bytes a second that reading alone gets where a copy gets these; the data sheet's at most."""
    return min(copy * READING, device.memory_gb_per_s * 1e9 if device else math.inf)


def known_devices() -> dict[str, Device]:
    """Name -> device, of all that come with the harness."""
    return _parse("devices.yaml", files("harness.predict").joinpath("devices.yaml").read_text(encoding="utf-8"))


def find_device(name: str) -> Device:
    """A device by its name, or the one that a YAML file describes.

    Raises:
        InputError: no such name or file, or a field is missing, unknown or no number within reach.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        known = known_devices()
        if name not in known:
            raise unknown("device", name, known)
        return known[name]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not a text'}") from None
    found = _parse(str(path), text)
    if len(found) != 1:
        raise InputError(f"{path}: one device is needed, name: {{title: ..., matrix_tflops: ...}}; it has {len(found)}")
    return next(iter(found.values()))


def recognised(gpu: str) -> Device | None:
    """The device whose name a driver's name contains."""
    return next((device for device in known_devices().values() if device.matches and device.matches in gpu), None)


def _parse(where: str, text: str) -> dict[str, Device]:
    try:
        entries = yaml.safe_load(text)
        if not isinstance(entries, dict) or not all(isinstance(fields, dict) for fields in entries.values()):
            raise InputError(f"{where}: not a mapping of names to devices, name: {{title: ..., matrix_tflops: ...}}")
        return {str(name): Device.model_validate(fields) for name, fields in entries.items()}
    except yaml.YAMLError as error:
        raise InputError(f"{where}: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise InputError(f"{where}: {_first(error.errors())}") from None


def _first(errors: list[Any]) -> str:
    place = ".".join(map(str, errors[0]["loc"])) or "device"
    return f"{place}: {errors[0]['msg'][:1].lower()}{errors[0]['msg'][1:]}"
