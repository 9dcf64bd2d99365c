"""What the orders of a run share and needs no device: their samples.

Samples that are cut to the token take as long as tokenising them all, whichever of them a process is to answer. So the
process that orders are forked from makes them, once, and what is forked finds them there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from harness.models.load import load_tokenizer
from harness.runner.catalog import build_tasks
from harness.runner.orders import Order, answer, settled
from harness.runner.plan import Made, context_of
from harness.runner.spec import RunSpec


@contextmanager
def _one_thread() -> Iterator[None]:
    """Threads that PyTorch computes with are not there behind a fork, which would wait for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _made(spec: RunSpec) -> Made:
    tokenizer, tasks = load_tokenizer(spec.model), build_tasks(spec.tasks, context_of(spec))
    return {task.label: (task, list(task.samples(tokenizer))) for task in tasks}


class Answering:
    """Answers orders (`harness.executors.executor.Answer`), with the samples that were made ahead."""

    def __init__(self) -> None:
        self._run: Order | None = None
        self._made: Made = {}

    def ahead(self, line: bytes) -> bool:
        """Makes the samples of an order's run, unless they are there from the order before.

        Returns:
            Whether it did.

        Raises:
            Exception: whatever tasks and tokenizers raise; who answers the order meets it, too, and tells.
        """
        order = Order.model_validate_json(line)
        run = order.model_copy(update={"terms": None, "samples": None, "done": []})
        if run == self._run:
            return False
        self._run, self._made = run, {}
        settled(order)
        with _one_thread():
            self._made = _made(order.spec)
        return True

    def __call__(self, line: bytes) -> Iterator[bytes]:
        """Carries out the order of a line."""
        return answer(line, self._made)
