"""What the recorded decode steps of a method do. The base class decodes as full attention does.

A step that does the same work on the device whatever the tokens are may be recorded once, as a CUDA graph, and replayed
for every token. While it is recorded these hooks run, once; they must neither wait for the device nor make shapes, or
decisions of the host, that depend on what is in a tensor. All that changes from token to token lies on the device.

A method hands its object out after each prefill (`Method.replay`), prepared for the request. The object stays the same
over all requests, since a recorded step holds the addresses of what is in it; it knows the method's tensors, and not
the method.

Requests that are decoded together share an object with a seat for each (`Replay.seats`), in whose hooks every request
has a row: what the object has on the device has one axis more. So who comes or goes changes what lies in memory, and
nothing of what is recorded.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from torch import Tensor

from harness.engine.cache import LayerCache
from harness.engine.replay.decode_table import DecodeTable
from harness.engine.replay.overlap import Overlap
from harness.engine.step import Heads, Rows


class Replay:
    """One new token a step attends to all that the caches hold; override a hook where a method does something else.

    Attributes:
        cuts: layers before which the step is cut, since how many rows go on there is known on the device alone. Behind
            a cut the newest token's row may be joined by others; see `arriving` and `enter`.
    """

    cuts: Sequence[int] = ()

    # Once a request, from the host.

    def key(self) -> Hashable:
        """Changes with the addresses of this object's tensors that a recorded step uses."""
        return None

    def load(self, caches: Sequence[LayerCache], table: DecodeTable) -> None:
        """Tells the kernels where the caches lie that they are to work on, and how long these are."""
        table.load(caches)

    def take(self, caches: Sequence[LayerCache], *, rehearsal: bool) -> None:
        """Brings what this object has on the device up to the request.

        Args:
            caches: a layer each, as the last step left them.
            rehearsal: steps are about to run only to be recorded, and may do no harm.
        """

    def undo(self, table: DecodeTable) -> None:
        """Takes back what one step did to this object's memory: it ran only to be recorded.

        Keys and values that it stored need no care, since the step runs again with the same token.
        """

    def give_back(self, caches: Sequence[LayerCache], count: int, position: int) -> None:
        """Takes note of `count` steps, from `position` on, that were replayed: kernels have filled the caches.

        Others may follow, launched anew: a further turn of the conversation, which is to find nothing of a step that
        was begun and that nobody asked for.
        """
        for cache in caches:
            cache.extended(count, position)

    # Several requests at once.

    def seats(self, count: int) -> Replay | None:
        """An object that does what this one does for so many requests, each at a seat.

        None where there is no such object: then requests' steps stand side by side in one recording, which is for them
        alone. Asked behind the prefill. Not inherited by what overrides a hook.
        """
        return Replay() if type(self) is Replay else None

    def serves(self, other: Replay) -> bool:
        """Whether a request may sit here whose own object is `other`."""
        return type(other) is type(self)

    def sit(self, seat: int, other: Replay | None, caches: Sequence[LayerCache], table: DecodeTable) -> None:
        """A request takes a seat.

        Args:
            seat: which.
            other: its own object, as the prefill or the last step left it. None for nobody: whatever steps do to the
                caches then harms no one, and they hold as many steps as there may be until somebody else sits there.
            caches: a layer each.
            table: with a row for each seat and layer.
        """
        table.sit(seat, caches)

    def seated(self, table: DecodeTable) -> Sequence[Tensor]:
        """All that steps change of a request apart from its caches, [seats, ...] each; moves along with it."""
        return [table.seated]

    def rise(self, seat: int, other: Replay, table: DecodeTable) -> None:
        """The request's own object learns what steps have done, ahead of its `give_back`."""

    # In a step that is being recorded.

    def enter(self, layer: int, rows: Rows, count: int, *, last: bool) -> Rows:
        """The rows that go on at the cut before a layer: `count` of those that arrive and are not through yet.

        Args:
            layer: the first behind the cut.
            rows: the newest token's.
            count: as many as the step is recorded for.
            last: they are all that are left, the newest token's last, with padding ahead if that is fewer; otherwise
                the newest is not among them.
        """
        return rows

    def attend(self, layer: int, heads: Heads, table: DecodeTable) -> Tensor:
        """Stores the rows' keys and values and attends.

        Returns:
            [rows, heads * head_dim].
        """
        return table.attend(layer, heads)

    def after_attention(self, layer: int, heads: Heads, table: DecodeTable, *, last: bool) -> None:
        """Called before the feed forward; `last` as in `enter`, and true in steps without cuts."""

    def after_layer(self, layer: int, rows: Rows, *, last: bool) -> None:
        """Called between layers; `last` as in `enter`."""

    def end_step(self) -> Overlap | None:
        """Waits for what runs beside the step, and returns its marks; None where nothing does."""
        return None

    # While steps are replayed, from the host.

    def arriving(self, layer: int, caches: Sequence[LayerCache], table: DecodeTable) -> int:
        """How many rows, the newest token's included, the step takes in at the cut before a layer.

        Asked once a step and cut, when all before it has been launched: the place to wait for the device, and to make
        room for the rows' keys and values.
        """
        return 1
