"""Which executor a user asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from harness.errors import InputError, unknown
from harness.executors.cluster import RayExecutor, connect
from harness.executors.executor import Executor
from harness.executors.local import local_executor
from harness.models.load import resolve_device

KINDS = ("local", "ray")


@dataclass(frozen=True)
class Fleet:
    """Where a run's requests go, if not into the process that was asked.

    Attributes:
        kind: one of `KINDS`.
        workers: units a machine at a time, if not one a GPU, or one on a CPU.
        address: of a Ray cluster; None starts one of this machine.
        accelerator: kind of the GPUs, where there are several.
    """

    kind: str
    workers: int | None = None
    address: str | None = None
    accelerator: str | None = None

    @classmethod
    def read(
        cls, executor: str | None, workers: int | None, ray_address: str | None, accelerator: str | None
    ) -> Self | None:
        """What the options say; None where no executor is named.

        Raises:
            InputError: an executor that there is not, or an option that means nothing to it.
        """
        given = {"--workers": workers, "--ray-address": ray_address, "--accelerator": accelerator}
        useless = [name for name, value in given.items() if value is not None and executor is None]
        if executor == "local" and ray_address is not None:
            useless.append("--ray-address")
        if useless:
            raise InputError(f"{useless[0]} needs --executor {'ray' if useless[0] == '--ray-address' else 'local|ray'}")
        if executor is None:
            return None
        if executor not in KINDS:
            raise unknown("executor", executor, KINDS)
        return cls(executor, workers, ray_address, accelerator)

    def open(self, answer: str, device: str, *, alone: bool) -> Executor:
        """The executor.

        Args:
            answer: `package.module:function`.
            device: "auto", "cpu" or "cuda".
            alone: an order shares its machine with no other, unless `workers` says so.

        Raises:
            InputError: no such place here, or no such cluster.
        """
        if self.kind == "local":
            kind = resolve_device(device).type
            return local_executor(answer, kind, alone=alone, workers=self.workers, accelerator=self.accelerator)
        ray = connect(self.address, self.workers)
        return RayExecutor(answer, device, alone=alone, workers=self.workers, accelerator=self.accelerator, ray=ray)
