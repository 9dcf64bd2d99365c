"""What cannot be asked of one run together, and why."""

from __future__ import annotations

from harness.runner.spec import RunSpec, WrongOption

_EXCLUDED = (
    ("ledger", "batch", "accounts for a request that has the device to itself, so not with --batch"),
    ("batch", "rate", "requests that arrive at a rate are served together as they come: see most="),
    ("ledger", "rate", "is of requests that have the device to themselves, so not with a rate"),
    ("parts", "rate", "is of requests that have the device to themselves, so not with a rate"),
    ("timing", "rate", "a rate is a matter of times, so not with --no-timing"),
    ("executor", "rate", "requests that arrive at a rate are served by one process"),
    ("tensor_parallel", "rate", "requests that arrive at a rate are served by one device"),
    ("tensor_parallel", "executor", "takes the devices of this process, so not with --executor"),
    ("batch", "tensor_parallel", "decodes together what one device holds, so not with --tensor-parallel"),
    ("ledger", "tensor_parallel", "is of one device, so not with --tensor-parallel"),
)
"""The option that is at fault, what it does not go with, the reason."""


def check_turns(batch: int, task: str, *, turns: bool) -> None:
    """Raises `WrongOption` for a batch of conversations: what comes in at a later turn are many rows of one request."""
    if batch > 1 and turns:
        raise WrongOption("batch", f"{task} asks several questions over one cache, which are not decoded with others")


def check_exclusions(spec: RunSpec, *, loaded: bool, elsewhere: bool) -> None:
    """Looks for the first two that do not go together.

    Args:
        spec: what the user asks for.
        loaded: requests of one of its tasks arrive at a rate.
        elsewhere: other processes answer.

    Raises:
        WrongOption: there are two.
    """
    asked = {
        "batch": spec.batch > 1,
        "ledger": spec.ledger,
        "parts": spec.parts,
        "timing": not spec.timing,
        "tensor_parallel": spec.tensor_parallel > 1,
        "rate": loaded,
        "executor": elsewhere,
    }
    for option, other, reason in _EXCLUDED:
        if asked[option] and asked[other]:
            raise WrongOption(option, reason)
