"""Tasks whose samples may arrive over time, as requests arrive at a server."""

from __future__ import annotations

import random
from itertools import accumulate
from typing import Annotated, NamedTuple, Self

from pydantic import Field, model_validator

from harness.grammar import Item
from harness.options import OptionSet
from tasks.base import Task

MOST = 16


class Load(NamedTuple):
    """How requests arrive.

    Attributes:
        rate: requests a second; infinite: all are there at once.
        most: how many are served at the same time; the others wait, first come, first served.
    """

    rate: float
    most: int

    def arrivals(self, count: int, seed: int) -> list[float]:
        """Seconds at which so many requests arrive: a Poisson process, whose first one comes at 0.

        With one seed requests come in the same rhythm at every rate, faster or slower.
        """
        draw = random.Random(seed)
        gaps = [0.0, *(draw.expovariate(1.0) / self.rate for _ in range(count - 1))]
        return list(accumulate(gaps))


class LoadOptions(OptionSet):
    """At what rate, and how many at once."""

    rate: tuple[Annotated[float, Field(gt=0, allow_inf_nan=True)], ...] = Field(
        (), description="requests a second, arriving at random; inf: all at once; none: one is sent after the other"
    )
    most: Annotated[int, Field(ge=1)] = Field(MOST, description="requests served at once, where there is a rate")

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if "most" in self.model_fields_set and not self.rate:
            raise ValueError("most limits requests that arrive at a rate, and there is none")
        return self


class UnderLoad(Task):
    """A task whose `Options` are `LoadOptions` and more; every rate is a task of its own."""

    class Options(LoadOptions):
        """How they arrive."""

    options: LoadOptions

    def load(self) -> Load | None:
        """How its samples arrive; None where one is sent after the other."""
        return Load(self.options.rate[0], self.options.most) if self.options.rate else None

    @classmethod
    def by_length(cls, item: Item) -> list[Item]:
        """The item once for each of its lengths and rates."""
        rates = item.options["rate"].split("/") if "rate" in item.options else []
        parts = super().by_length(item)
        if len(rates) < 2:
            return parts
        return [part._replace(options=part.options | {"rate": rate}) for part in parts for rate in rates]


def load_of(task: Task) -> Load | None:
    """How a task's samples arrive; None where one is sent after the other."""
    return task.load() if isinstance(task, UnderLoad) else None
