"""A plan beside its loaded model, where a cell's description becomes a method that can be asked."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch

from harness.engine.engine import Engine, build_engine
from harness.engine.method import Method
from harness.engine.parallel import ALONE, Ranks
from harness.errors import InputError
from harness.models.load import LoadedModel, load
from harness.runner.plan import CellSpec, Plan, Sources
from harness.runner.spec import RunSpec, cell_hash
from tasks.base import Task


@dataclass(frozen=True)
class Cell:
    """One method of one task, ready to be asked.

    Attributes:
        hash: content hash of everything that shapes its answers.
        label: the method's row in tables.
        method: bound to the model.
        task: which scores.
    """

    hash: str
    label: str
    method: Method
    task: Task


@dataclass(frozen=True)
class LoadedRun:
    """A plan, its model and the engine around it; methods are made once and serve all tasks."""

    plan: Plan
    model: LoadedModel
    engine: Engine
    _methods: dict[tuple[str, int], Method] = field(default_factory=dict)
    _hashes: dict[tuple[str, str], str] = field(default_factory=dict)

    @property
    def spec(self) -> RunSpec:
        """What the user asked for."""
        return self.plan.spec

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = self.model.model.device
        return device

    def under(self, plan: Plan) -> LoadedRun:
        """The same model, engine and methods under another plan, of which the cells have other hashes."""
        return replace(self, plan=plan, _hashes={})

    def facts(self) -> dict[str, Any]:
        """What is known of the run only now; the same whenever and wherever it goes on, or it is another run."""
        return {
            "weights_hash": self.model.weights_hash,
            "dtype": str(self.model.model.dtype).removeprefix("torch."),
            "attention": self.engine.context.attention.kernel,
            "engine": self.engine.kind,
            "context": self.model.shape.max_context,
            "shape": asdict(self.model.shape),
            "method_sources": self._sources.methods,
            "task_sources": self._sources.tasks,
        }

    @cached_property
    def _sources(self) -> Sources:
        return self.plan.sources()

    def bind(self, cell: CellSpec, slot: int = 0) -> Cell:
        """The cell that is described.

        Args:
            cell: which.
            slot: of the request, where several are there at once: each has a method of its own.
        """
        method, task = self.plan.method(cell), self.plan.task(cell)
        if (name := (method.label, task.label)) not in self._hashes:
            dtype, kernel = str(self.model.model.dtype), f"{self.engine.context.attention.kernel}, {self.engine.kind}"
            code = self._sources.of(*name)
            self._hashes[name] = cell_hash(self.spec, method, task, self.model.weights_hash, dtype, kernel, code)
        if (place := (method.label, slot)) not in self._methods:
            self._methods[place] = method.build(self.engine.context)
        return Cell(self._hashes[name], method.label, self._methods[place], task)


def load_run(plan: Plan, ranks: Ranks = ALONE) -> LoadedRun:
    """Loads a plan's model.

    Args:
        plan: of the run.
        ranks: over which it spreads the model; this one's part is loaded.

    Raises:
        InputError: it cannot be loaded, or the kernels that are asked for do not serve it.
    """
    if plan.spec.tensor_parallel != ranks.size:
        raise InputError("a model is spread over devices by 'harness run' alone")
    model = load(plan.spec.model, plan.spec.device, plan.spec.dtype, ranks)
    encode = partial(model.tokenizer.encode, add_special_tokens=False)
    engine = build_engine(model.model, model.shape, plan.spec.attention, plan.spec.engine, encode, ranks)
    # Weights that are cut and joined leave as much behind; NCCL, cuBLAS and graphs that are recorded cannot ask for it.
    if plan.device.type == "cuda":
        torch.cuda.empty_cache()
    return LoadedRun(plan, model, engine)
