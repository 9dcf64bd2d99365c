"""Methods that choose by another method's scores, and by something else."""

from __future__ import annotations

from harness.engine.method import ModelContext
from harness.engine.shape import ModelShape
from harness.options import OptionSet
from methods.common.evicting import Evicting


class Wrapping(Evicting):
    """Has the budget of the method that it wraps, which fails early where that does.

    Attributes:
        inner: the other method, of which only the scores are used; it stores nothing.
    """

    @classmethod
    def wraps(cls, options: OptionSet) -> tuple[type[Evicting], OptionSet]:
        """The other method, and its options."""
        raise NotImplementedError

    def __init__(self, options: OptionSet, model: ModelContext) -> None:
        super().__init__(options, model)
        kind, of_inner = self.wraps(options)
        self.inner = kind(of_inner, model)

    @classmethod
    def check(cls, options: OptionSet, shape: ModelShape) -> None:
        """Raises `InputError` where the other method does."""
        kind, of_inner = cls.wraps(options)
        kind.check(of_inner, shape)

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        """Begins both."""
        super().begin(prompt_len, max_new_tokens)
        self.inner.begin(prompt_len, max_new_tokens)

    def budget(self, layer: int) -> int:
        """The other method's."""
        return self.inner.budget(layer)
