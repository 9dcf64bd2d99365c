"""Method names -> method classes."""

from __future__ import annotations

from dataclasses import dataclass

from harness.grammar import parse_items
from harness.options import OptionSet
from harness.registry import Registry
from harness.shape import ModelShape
from methods.base import Method, ModelContext

METHODS: Registry[Method] = Registry("method", "methods", Method)


@dataclass(frozen=True)
class MethodSpec:
    """A method with its options, not yet tied to a model.

    Attributes:
        label: how the user wrote it; its row in the results table.
        kind: the class.
        options: validated options.
    """

    label: str
    kind: type[Method]
    options: OptionSet

    def check(self, shape: ModelShape) -> None:
        """Raises `InputError` where the options do not fit the model."""
        self.kind.check(self.options, shape)

    def build(self, model: ModelContext) -> Method:
        """The method, ready for requests to that model."""
        return self.kind(self.options, model)


def parse_methods(text: str) -> list[MethodSpec]:
    """Every method of a `--methods` value.

    Raises:
        InputError: an unknown method or option, a member where there are none.
    """
    return [_spec(str(item), item.name, item.member, item.options) for item in parse_items(text)]


def _spec(label: str, name: str, member: str | None, options: dict[str, str]) -> MethodSpec:
    kind = METHODS.get(f"{name}/{member}" if member else name)
    return MethodSpec(label, kind, kind.Options.read(f"method {kind.name}", options))
