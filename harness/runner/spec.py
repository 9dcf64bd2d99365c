"""What a run is: a strict, typed description from which every cell follows, and the content hashes that identify it.

A cell is one model x method x task. It is described by values alone, never by live objects, so that another executor
can run the same cells, and a record is reused only where everything that shapes its answer is equal.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from harness.engine.batch import Batch
from harness.engine.continuous import Continuous
from harness.engine.engine import Engine
from harness.engine.parallel import RankGroup
from harness.errors import InputError
from harness.grammar import parse_items, parse_sums, sum_without_paths, without_paths
from harness.measuring.provenance import source_hash
from harness.runner.catalog import MethodSpec
from tasks.base import Task
from tasks.common.load import load_of


class WrongOption(InputError):
    """A value that a run cannot have; says which as an option of the command line.

    Attributes:
        option: the field of `RunSpec`.
        reason: what is wrong with its value.
    """

    def __init__(self, option: str, reason: str) -> None:
        super().__init__(f"--{option.replace('_', '-')}: {reason}")
        self.option, self.reason = option, reason


_LATER = frozenset({"batch", "timing", "tensor_parallel"})
"""Options that runs of earlier versions do not know; those who leave them alone ask for the same run as then."""


class RunSpec(BaseModel):
    """Everything the user may decide about a run.

    `limit`, `data_dir` and `redo` say how much is asked, where the data lies, and of which methods that changed the
    answers are asked again; they do not shape a single answer, so a run may be extended or moved. All else is part of
    the run's identity.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[str, Field(min_length=1)] = "smollm2"
    methods: str = "full,slim,lazyllm"
    tasks: str = "needle"
    data_dir: Path | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    max_length: Annotated[int, Field(ge=16)] | None = None
    seed: int = 0
    question: Literal["prompt", "after"] = "prompt"
    parts: bool = False
    ledger: bool = False
    noise_floor: bool = False
    batch: Annotated[int, Field(ge=1)] = 1
    tensor_parallel: Annotated[int, Field(ge=1)] = 1
    timing: bool = True
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    memory_limit: Annotated[float, Field(gt=0)] | None = None
    attention: Literal["auto", "fa3", "fa2", "cudnn", "flash", "sdpa"] = "auto"
    engine: Literal["auto", "graphed", "fused", "stock"] = "auto"
    redo: str = ""

    @field_validator("methods", "tasks")
    @classmethod
    def _follows_the_grammar(cls, items: str, option: ValidationInfo) -> str:
        try:
            (parse_sums if option.field_name == "methods" else parse_items)(items)
        except InputError as error:
            raise ValueError(str(error)) from None
        return items

    @field_validator("timing")
    @classmethod
    def _leaves_something(cls, timing: bool, others: ValidationInfo) -> bool:
        if not timing and others.data.get("parts"):
            raise ValueError("--parts are parts of a time")
        return timing

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Self:
        """The specification that a user, a file or a manifest gives as option -> value.

        Raises:
            WrongOption: a value that does not fit.
        """
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors()[0]
            reason = first["msg"].removeprefix("Value error, ")
            raise WrongOption(str(first["loc"][0]), f"{reason} (got {first['input']!r})") from None

    def identity(self) -> dict[str, Any]:
        """The part that shapes answers, as JSON values."""
        methods = ",".join(map(sum_without_paths, parse_sums(self.methods)))
        named = {"methods": methods, "tasks": without_paths(self.tasks)}
        fields = type(self).model_fields
        left_out = {"limit", "data_dir", "redo"} | {
            name for name in _LATER if getattr(self, name) == fields[name].default
        }
        return self.model_dump(mode="json", exclude=left_out) | named | {"model": public_name(self.model)}

    def run_hash(self) -> str:
        """Hash of what the user asked for; equal hashes may share a results folder."""
        return content_hash(self.identity())

    def default_folder(self, name: str = "") -> Path:
        """Where the run goes if nobody says where: `results/NAME-HASH`, with the model's name unless one is given."""
        return Path("results") / f"{folder_name(name or Path(self.model).name)}-{self.run_hash()[:8]}"


def public_name(model: str) -> str:
    """A model's name without the path to it, which may say whose machine this is; the weights' hash identifies it."""
    kind, colon, path = model.rpartition(":")
    is_path = Path(path).expanduser().exists() or path.startswith(("/", "~", "."))
    return f"{kind}{colon}{Path(path).name}" if is_path else model


def folder_name(text: str) -> str:
    """The text in characters that every file system takes."""
    return "".join(letter if letter.isalnum() or letter in "-.=" else "-" for letter in text.lower())


class Code(NamedTuple):
    """The code that shapes a cell's answers.

    Attributes:
        engine, method, task: hashes of their sources (`harness.storage.source`); see `method_source`.
        versions: package -> version.
    """

    engine: str
    method: str
    task: str
    versions: Mapping[str, str]


def cell_hash(
    spec: RunSpec, method: MethodSpec, task: Task, weights_hash: str, dtype: str, kernel: str, code: Code | None = None
) -> str:
    """Hash of everything that shapes one cell's answers: two methods can never share one.

    Args:
        spec: the run.
        method: with its options.
        task: with its options.
        weights_hash: of the model's weights.
        dtype: that the weights really have.
        kernel: of attention, and of the engine around it.
        code: if not what is here.
    """
    code = code or Code(source_of(Engine), method_source(method), source_of(type(task)), versions())
    together: dict[str, Any] = {} if spec.batch == 1 else {"batch": [spec.batch, source_of(Batch)]}
    together |= {"load": source_of(Continuous)} if load_of(task) else {}
    if spec.tensor_parallel > 1:
        together["tensor_parallel"] = [spec.tensor_parallel, source_of(RankGroup)]
    return content_hash(
        {
            "model": weights_hash,
            "dtype": dtype,
            "kernel": kernel,
            "engine": code.engine,
            "device": spec.device,
            "method": _identity(method, code.method),
            "task": [task.label, task.options.model_dump(mode="json"), code.task, task.fingerprint()],
            "max_length": spec.max_length,
            "question": spec.question,
            "seed": spec.seed,
            "versions": code.versions,
            **together,
        }
    )


def source_of(kind: type) -> str:
    """`source_hash` when it is first asked for: what is edited while a process runs is not what it runs."""
    if kind not in _SOURCES:
        _SOURCES[kind] = source_hash(kind)
    return _SOURCES[kind]


_SOURCES: dict[type, str] = {}


def method_source(method: MethodSpec) -> str:
    """Hash of a method's source; of one with a sparse prefill both, with a plus between them."""
    own = source_of(method.kind)
    return own if method.sparse is None else f"{own}+{method_source(method.sparse)}"


@cache
def versions() -> Mapping[str, str]:
    """Of what answers; looked up once, for a grid has hundreds of cells."""
    return {name: version(name) for name in ("torch", "transformers")}


def _identity(method: MethodSpec, source: str) -> list[Any]:
    own, _, beside = source.partition("+")
    whole = [method.label, method.kind.name, method.options.model_dump(mode="json"), own]
    return whole if method.sparse is None else [*whole, _identity(method.sparse, beside)]


def content_hash(value: Any) -> str:
    """First 16 hex digits of the sha256 of a JSON value's canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
