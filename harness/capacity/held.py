"""What was found out about each method, kept in one file that is replaced whole, so that the same command goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness.errors import InputError
from harness.storage.record import Count, Elapsed, Rate, Share

FILE = "capacity.json"


class Held(BaseModel):
    """The largest batch that a device held under one method; what was not measured is null."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str = Field(description="content hash of everything that shapes the answers of such requests")
    method: str = Field(description="the method with its options, as asked for")
    batch: Count = Field(description="requests that were prefilled and then decoded together; 0 if not even one")
    bound: Literal["memory", "most"] = Field(description="what kept it from being larger: memory, or --most")
    predicted: Count | None = Field(
        default=None, description="the same, by what the first request left of the memory and how much it kept of it"
    )
    tokens_per_s: Rate | None = Field(default=None, description="batch over step_s")
    step_s: Elapsed | None = Field(default=None, description="median seconds of the decode steps behind the first")
    floor_s: Elapsed | None = Field(
        default=None, description="weights once and every cache of the batch, over the device's measured copy rate"
    )
    ttft_s: Elapsed | None = Field(default=None, description="median seconds of a prefill, with nothing queued")
    kv_bytes: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="bytes on the device for keys and values, the reserve for new tokens included, mean"
    )
    kv_bytes_host: Annotated[float, Field(ge=0)] | None = Field(default=None, description="the same in host memory")
    extra_bytes: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="bytes of the method's own stores on the device, mean over requests"
    )
    kept: Share | None = Field(
        default=None, description="share of prompt tokens x layers whose keys and values were kept, mean over requests"
    )
    peak_bytes: Count | None = Field(default=None, description="most memory that was allocated, weights included")
    failed: str | None = Field(default=None, description="what went wrong, if the method failed")


class Capacity(BaseModel):
    """Everything that a command found out.

    Attributes:
        asked: what was asked, apart from methods and `--most`, which may change from one command to the next.
        memory_bytes: of the device, or as many as it was limited to.
        environment: `harness.measuring.provenance.environment` of the last command.
        methods: in the order in which they were found out.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    model: str
    length: int
    new_tokens: int
    asked: dict[str, Any]
    memory_bytes: int
    environment: dict[str, Any]
    methods: list[Held] = []

    def known(self, key: str, most: int) -> Held | None:
        """What is known of a method that need not be found out again: not where it could go further now."""
        return next((held for held in self.methods if held.key == key and _is_final(held, most)), None)

    def with_held(self, held: Held) -> Capacity:
        """The same with one method more, or known better."""
        others = [other for other in self.methods if other.key != held.key]
        return self.model_copy(update={"methods": [*others, held]})

    def write(self, folder: Path) -> Path:
        """Replaces the file in one step.

        Raises:
            InputError: it cannot be written.
        """
        path = folder / FILE
        scratch = path.with_name(path.name + ".tmp")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            scratch.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
            scratch.replace(path)
        except OSError as error:
            raise InputError(f"cannot write {folder}: {error.strerror}") from None
        return path


def _is_final(held: Held, most: int) -> bool:
    return held.failed is None and (held.bound == "memory" and held.batch <= most or held.batch == most)


def resumed(folder: Path, begun: Capacity) -> Capacity:
    """What the folder holds already of what is asked, or `begun` where it holds nothing.

    Raises:
        InputError: the file is of something else, or corrupt.
    """
    if not (folder / FILE).is_file():
        return begun
    found = stored(folder)
    if (found.asked, found.memory_bytes) != (begun.asked, begun.memory_bytes):
        raise InputError(f"{folder} holds the capacity of something else; choose another --output")
    return found.model_copy(update={"environment": begun.environment})


def stored(folder: Path) -> Capacity:
    """What the folder holds.

    Raises:
        InputError: nothing, or the file is corrupt.
    """
    path = folder / FILE
    try:
        return Capacity.model_validate_json(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        raise InputError(f"{path} is corrupt: {error.errors()[0]['msg']}") from None
