"""Decode with revival against loops over tokens; interpreted where there is no GPU."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference import revival
from tests.reference.interpreter import DEVICE, kernels
from tests.reference.revival import Row, Token

DecodeAttention = kernels("decode_attention").DecodeAttention
RowAttention = kernels("row_attention").RowAttention
scoring = kernels("token_scores")
reviving = kernels("revival")

# Slots that nobody uses, and columns of a list behind those that count.
SPARE = 5
# Stands where a number means nothing.
JUNK = -9
SEGMENTS = 3
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3}


@dataclass(frozen=True)
class Case:
    kv_heads: int = 2
    group: int = 4
    d: int = 16
    rows: int = 5
    listed: int = 40
    padding: int = 0
    programs: int | None = 3
    order: str = "mixed"
    dtype: torch.dtype = torch.float32

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group


CASES = [
    Case(1, 1, 16, rows=1, listed=0, programs=1),
    Case(2, 4, 64, rows=1, listed=1, programs=2),
    Case(8, 4, 128, rows=2, listed=33, programs=8),
    Case(1, 16, 16, rows=1, listed=300, programs=40),
    Case(2, 3, 64, rows=2, listed=0, padding=1),
    Case(1, 8, 16, rows=5, listed=16, programs=1),
    Case(2, 3, 16, rows=5, listed=17, padding=2, programs=7),
    Case(2, 1, 16, rows=5, listed=65, programs=None),
    Case(2, 4, 16, rows=32, listed=70, padding=31, programs=4),
    Case(1, 4, 64, rows=32, listed=129, padding=9, programs=8),
    Case(1, 16, 16, rows=32, listed=15, programs=3),
    Case(1, 3, 16, rows=32, listed=0, padding=5, programs=5),
    Case(1, 4, 16, rows=70, listed=100, padding=6, programs=6),
    Case(1, 1, 128, rows=70, listed=31, programs=2),
    Case(1, 3, 16, rows=70, listed=0, programs=1),
    Case(2, 4, 16, rows=5, listed=40, order="rows first"),
    Case(2, 4, 16, rows=32, listed=40, padding=3, order="rows first", programs=12),
    Case(2, 4, 16, rows=5, listed=40, padding=1, order="rows last"),
    Case(2, 2, 64, rows=5, listed=50, padding=1, dtype=torch.float16),
]


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN included."""
    return torch.equal(a.cpu().nan_to_num(JUNK), b.cpu().nan_to_num(JUNK))


def amid(value: int) -> Tensor:
    """One number on the device, a view into others."""
    return torch.tensor([10**6, value, 10**6], device=DEVICE)[1:2]


def on_device(tokens: list[Token], room: int, junk: Token) -> Tensor:
    """[2, room] int32: slots and positions, then junk."""
    padded = tokens + [junk] * (room - len(tokens))
    return torch.tensor(padded, dtype=torch.int32).T.contiguous().to(DEVICE)


def table_of(*layers: tuple[Tensor, Tensor], length: int = 10**6) -> Tensor:
    return torch.tensor([[keys.data_ptr(), values.data_ptr(), length] for keys, values in layers], device=DEVICE)


class Scene:
    """Cached tokens in scattered slots and rows that come between them; what nobody may read is NaN."""

    def __init__(self, case: Case, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.case = case
        room = case.listed + case.rows + SPARE
        *slots, self.unused = torch.randperm(room).tolist()
        self._place(slots, self._positions())
        self.caches = [(self._empty(room), self._empty(room)) for _ in range(2)]
        for cache in self.caches[1]:
            for token in self.listed:
                cache[token.slot] = torch.randn(case.kv_heads, case.d).to(cache)
        self.renew()

    def _empty(self, room: int) -> Tensor:
        return nan(room, self.case.kv_heads, self.case.d, dtype=self.case.dtype)

    def _positions(self) -> list[int]:
        """Of listed tokens and rows: scattered among each other, or among their own alone."""
        listed, rows = self.case.listed, self.case.rows - self.case.padding
        if self.case.order == "mixed":
            return _shuffled(0, listed + rows)
        if self.case.order == "rows first":
            return _shuffled(rows, listed) + _shuffled(0, rows)
        return _shuffled(0, listed) + _shuffled(listed, rows)

    def _place(self, slots: list[int], positions: list[int]) -> None:
        places = [Token(slot, position) for slot, position in zip(slots, positions, strict=False)]
        self.listed = places[: self.case.listed]
        self.come(places[self.case.listed :])

    def come(self, real: list[Token]) -> None:
        """These rows, behind padding that is said to be the newest of them."""
        newest = max(token.position for token in real)
        self.put([Token(-1, newest)] * self.case.padding + real)

    def put(self, places: list[Token]) -> None:
        self.places = places
        self.slots = torch.tensor([token.slot for token in self.places], dtype=torch.int32, device=DEVICE)
        self.positions = torch.tensor([token.position for token in self.places], device=DEVICE)

    def renew(self) -> None:
        """Other rows, and what is told of the cache."""
        self.case = replace(self.case, listed=len(self.listed))
        self.table = table_of(*self.caches)
        self.tokens = self.list_with_room(SPARE)
        self._fuse()

    def list_with_room(self, spare: int) -> Tensor:
        """The listed tokens, then such as all rows could see."""
        return on_device(self.listed, len(self.listed) + spare, Token(self.unused, 0))

    def _fuse(self) -> None:
        """Queries, keys and values as views into one buffer, a row's side by side."""
        case = self.case
        fused = torch.randn(case.rows, (case.heads + 2 * case.kv_heads) * case.d).to(DEVICE, case.dtype)
        apart = fused.view(case.rows, -1, case.d)
        self.q, self.k, self.v = apart.tensor_split([case.heads, case.heads + case.kv_heads], dim=1)

    def kernel(self) -> Any:
        case = self.case
        kernel = RowAttention(case.heads, case.kv_heads, case.d, DEVICE, programs=case.programs)
        kernel._plan(case.rows)
        poison(kernel)
        return kernel

    def attend(self, kernel: Any) -> Tensor:
        rows = (self.q, self.k, self.v, self.positions, self.slots)
        out = kernel.attend(*rows, self.tokens, amid(self.case.listed), self.table, 1)
        assert isinstance(out, Tensor)
        return out

    def expected(self) -> tuple[Tensor, Tensor]:
        keys, values = (cache.cpu() for cache in self.caches[1])
        return revival.attend(self.q.cpu(), self.k.cpu(), self.v.cpu(), self.places, keys, values, self.listed)

    def check(self, kernel: Any, norms: bool = True) -> None:
        """One call's result; what it returns for padding means nothing."""
        attention, expected = self.expected()
        out, real = self.attend(kernel), [row for row, place in enumerate(self.places) if place.slot >= 0]
        assert out.shape == attention.shape and out.dtype == self.case.dtype
        close(out[real], attention[real], TOLERANCE[self.case.dtype])
        assert kernel.norms.shape == expected.shape and kernel.norms.dtype == torch.float32
        if norms:
            close(kernel.norms[real], expected[real], 1e-4)


def _shuffled(first: int, count: int) -> list[int]:
    return [first + place for place in torch.randperm(count).tolist()]


def close(actual: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(actual.cpu().double(), expected, atol=atol, rtol=0)


def buffers(kernel: Any) -> list[Tensor]:
    """Also those that are kept by the number of rows."""
    holders = [kernel, *getattr(kernel, "_plans", {}).values()]
    return [value for holder in holders for value in vars(holder).values() if isinstance(value, Tensor)]


def poison(kernel: Any) -> None:
    """Spoils what a call left for the next; counters must be back at 0."""
    for buffer in buffers(kernel):
        if buffer.is_floating_point():
            buffer.fill_(torch.nan)
        else:
            assert not buffer.any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_attend_to_listed_tokens_and_each_other(case: Case) -> None:
    scene = Scene(case)
    scene.check(scene.kernel())


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("listed", [0, 37])
def test_rows_are_stored_in_their_slots_and_nothing_else_changes(listed: int, padding: int) -> None:
    scene = Scene(Case(rows=9, listed=listed, padding=padding))
    expected = [[cache.clone() for cache in pair] for pair in scene.caches]
    inputs = (scene.q, scene.k, scene.v, scene.positions, scene.slots, scene.tokens, scene.table)
    before = [tensor.clone() for tensor in inputs]
    scene.attend(scene.kernel())
    stored = scene.slots[padding:].long()
    expected[1][0][stored], expected[1][1][stored] = scene.k[padding:], scene.v[padding:]
    for old, new in zip(expected, scene.caches, strict=True):
        assert all(same(a, b) for a, b in zip(old, new, strict=True))
    assert all(torch.equal(old, new) for old, new in zip(before, inputs, strict=True))


def test_queries_that_are_no_views_of_a_common_buffer() -> None:
    scene = Scene(Case(rows=4))
    scene.q, scene.k, scene.v = scene.q.contiguous(), scene.k.contiguous(), scene.v.contiguous()
    scene.check(scene.kernel())


@pytest.mark.parametrize("listed", [0, 30])
def test_rows_before_padding(listed: int) -> None:
    scene = Scene(Case(rows=20, listed=listed, padding=7, group=3))
    scene.put(scene.places[::-1])
    scene.check(scene.kernel())


def test_row_attention_of_one_object_call_after_call() -> None:
    case = Case(kv_heads=1, programs=4)
    kernel = Scene(case).kernel()
    shapes = [(5, 70, 0), (32, 3, 30), (1, 150, 0), (32, 90, 2), (5, 0, 1), (5, 70, 4)]
    for seed, (rows, listed, padding) in enumerate(shapes):
        scene = Scene(replace(case, rows=rows, listed=listed, padding=padding), seed)
        scene.check(kernel)
        poison(kernel)


def test_rows_that_came_in_are_listed_next_time() -> None:
    scene = Scene(Case(rows=6, listed=20, padding=2))
    kernel = scene.kernel()
    free = random.Random(0).sample(range(24, 60), 12)
    for positions in (free[:4], free[4:8], free[8:]):
        scene.check(kernel)
        _next_rows(scene, positions)


def _next_rows(scene: Scene, positions: list[int]) -> None:
    """The rows join the list; others come to these places in the text, in new slots of a greater cache."""
    scene.listed = scene.listed + scene.places[scene.case.padding :]
    (keys, values), more = scene.caches[1], scene._empty(len(positions))
    scene.caches[1] = torch.cat((keys, more)), torch.cat((values, more))
    scene.come([Token(len(keys) + index, position) for index, position in enumerate(positions)])
    scene.renew()


@pytest.mark.parametrize("order", ["mixed", "rows first", "rows last"])
def test_great_logits_of_rows_neither_overflow_nor_vanish(order: str) -> None:
    scene = Scene(Case(rows=8, listed=65, padding=2, order=order, programs=8))
    scene.q.mul_(1e4)
    scene.check(scene.kernel(), norms=False)


@pytest.mark.parametrize("heads, kv_heads, d", [(3, 2, 16), (34, 2, 16), (4, 2, 48), (4, 2, 8)])
def test_shapes_that_row_attention_cannot_do(heads: int, kv_heads: int, d: int) -> None:
    with pytest.raises(ValueError):
        RowAttention(heads, kv_heads, d, DEVICE)


DENSE = [
    Case(1, 1, 16, listed=0, programs=1),
    Case(2, 4, 64, listed=15, programs=3),
    Case(2, 3, 128, listed=65, programs=5),
    Case(1, 16, 16, listed=300, programs=9),
    Case(1, 8, 16, listed=64, programs=None),
    Case(2, 2, 64, listed=100, programs=4, dtype=torch.float16),
]


class Cache:
    """All tokens of a layer, the newest not stored yet, as dense attention finds them."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(case.listed)
        self.case, length = case, case.listed
        both = torch.randn(2, length + 1 + SPARE, case.kv_heads, case.d)
        both[:, length:] = torch.nan
        self.keys, self.values = both.to(DEVICE, case.dtype)
        fused = torch.randn(case.heads + 2 * case.kv_heads, case.d).to(DEVICE, case.dtype)
        self.q, self.k, self.v = fused.tensor_split([case.heads, case.heads + case.kv_heads])
        self.table = table_of((self.keys, self.values), length=length)

    def all_keys(self) -> Tensor:
        return torch.cat((self.keys[: self.case.listed], self.k.unsqueeze(0))).cpu()

    def attend(self) -> Any:
        case = self.case
        attention = DecodeAttention(case.heads, case.kv_heads, case.d, DEVICE, case.programs)
        poison(attention)
        attention.dense(self.q, self.k, self.v, self.table, 0)
        return attention


@pytest.mark.parametrize("case", DENSE, ids=str)
def test_norms_of_dense_attention(case: Case) -> None:
    cache = Cache(case)
    norms = cache.attend().norms
    assert norms.shape == (case.heads,) and norms.dtype == torch.float32
    close(norms, revival.norms(cache.q.cpu(), cache.all_keys()), 1e-4)


def test_norms_of_dense_attention_are_those_of_the_last_call() -> None:
    first, second = Cache(Case(listed=70)), Cache(Case(listed=3))
    attention = first.attend()
    for cache in (second, first):
        attention.dense(cache.q, cache.k, cache.v, cache.table, 0)
        close(attention.norms, revival.norms(cache.q.cpu(), cache.all_keys()), 1e-4)


SCORED = [
    Case(1, 1, 16, listed=1),
    Case(2, 3, 16, listed=16),
    Case(8, 4, 128, listed=65),
    Case(1, 16, 64, listed=300),
    Case(2, 8, 16, listed=31),
    Case(2, 4, 16, listed=1100),
    Case(2, 2, 64, listed=100, dtype=torch.float16),
]


def scores_of(scene: Scene, q: Tensor, norms: Tensor) -> Tensor:
    """The kernel's scores, NaN where it wrote nothing."""
    scores, case = nan(scene.tokens.shape[1]), scene.case
    listed = (scene.tokens, amid(case.listed))
    out = scoring.token_scores(q, norms, case.kv_heads, *listed, scene.table, 1, scores)
    assert out.data_ptr() == scores.data_ptr()
    return scores


def check_scores(scores: Tensor, q: Tensor, keys: Tensor) -> None:
    """Relative to the score, since they are compared among themselves."""
    count = len(keys)
    expected = revival.scores(q.cpu(), keys.cpu())
    torch.testing.assert_close(scores[:count].cpu().double(), expected, atol=1e-7, rtol=1e-4)
    assert scores[count:].isnan().all()


def keys_of(scene: Scene) -> Tensor:
    keys, _ = scene.caches[1]
    return torch.stack([keys[token.slot] for token in scene.listed])


@pytest.mark.parametrize("case", SCORED, ids=str)
def test_scores_of_listed_tokens(case: Case) -> None:
    scene = Scene(case)
    before = [cache.clone() for pair in scene.caches for cache in pair]
    q, keys = scene.q[-1], keys_of(scene)
    norms = revival.norms(q.cpu(), keys.cpu()).float().to(DEVICE)
    check_scores(scores_of(scene, q, norms), q, keys)
    after = [cache for pair in scene.caches for cache in pair]
    assert all(same(a, b) for a, b in zip(before, after, strict=True))


def test_scores_of_few_tokens_with_room_for_many() -> None:
    scene = Scene(Case(listed=3))
    scene.tokens = scene.list_with_room(2000)
    q, keys = scene.q[0], keys_of(scene)
    check_scores(scores_of(scene, q, revival.norms(q.cpu(), keys.cpu()).float().to(DEVICE)), q, keys)


def test_scores_from_the_norms_of_row_attention() -> None:
    scene = Scene(Case(rows=5, listed=50, padding=2, order="rows last"))
    newest = max(range(2, 5), key=lambda row: scene.places[row].position)
    kernel, q = scene.kernel(), scene.q[newest]
    scene.attend(kernel)
    norms = kernel.norms[newest]
    scene.listed += scene.places[2:]
    scene.renew()
    check_scores(scores_of(scene, q, norms), q, keys_of(scene))


def test_scores_from_the_norms_of_dense_attention() -> None:
    cache, scores = Cache(Case(listed=40)), nan(50)
    norms = cache.attend().norms
    tokens = on_device([Token(slot, slot) for slot in range(41)], 50, Token(42, 0))
    scoring.token_scores(cache.q, norms, cache.case.kv_heads, tokens, amid(41), cache.table, 0, scores)
    check_scores(scores, cache.q, cache.all_keys())
    torch.testing.assert_close(scores[:41].sum().item(), 1.0, atol=1e-5, rtol=0)


class Mirror:
    """The same state twice: in plain Python, and on the device for the kernels."""

    def __init__(self, twin: revival.State) -> None:
        self.twin, room, width = twin, len(twin.depths), len(twin.hidden[0])
        self.room, self.width, dtype = room, width, twin.hidden[0].dtype
        # Hidden states lie in two tensors, in any order.
        self.aux = [nan(room, width, dtype=dtype) for _ in range(2)]
        places = random.Random(room).sample(range(2 * room), room)
        self.home = [self.aux[place % 2][place // 2] for place in places]
        self.homes = torch.tensor([home.data_ptr() for home in self.home], device=DEVICE)
        for home, hidden in zip(self.home, twin.hidden, strict=True):
            home.copy_(hidden)
        self.state = self._state()

    def _state(self) -> Any:
        twin, state = self.twin, reviving.RevivalState.empty(SEGMENTS, self.room, DEVICE)
        for row, tokens in zip(state.tokens, twin.tokens, strict=True):
            row.copy_(on_device(tokens, self.room, Token(JUNK, 0)))
        state.counts.copy_(torch.tensor(self._counts()))
        state.homes.copy_(self.homes)
        for name in ("slots", "depths", "lengths", "wanted"):
            getattr(state, name).copy_(torch.tensor(getattr(twin, name)))
        state.keys.fill_(JUNK)
        return state

    def _counts(self) -> list[tuple[int, int, int]]:
        twin = self.twin
        counts = [len(tokens) for tokens in twin.tokens]
        return list(zip(twin.done, counts, twin.arriving, strict=True))

    def choose(self, scores: list[float], segment: int) -> None:
        """What lies behind the scores that count would be chosen before them."""
        junk = [torch.inf] * (self.room - len(scores))
        reviving.choose(torch.tensor(scores + junk, device=DEVICE), self.state, segment)
        self.twin.choose(scores, segment)
        self.check()

    def enter(self, segment: int, newest: Tensor, count: int, last: bool) -> list[Row]:
        out = reviving.enter(self.state, segment, newest.to(DEVICE).unsqueeze(0), count, last=last)
        hidden, positions, slots = out
        assert hidden.dtype == newest.dtype and positions.dtype == torch.int64 and slots.dtype == torch.int32
        rows = self.twin.enter(segment, newest, count, last)
        assert positions.tolist() == [row.position for row in rows] and slots.tolist() == [row.slot for row in rows]
        assert torch.equal(hidden.cpu(), torch.stack([row.hidden for row in rows]))
        self.check()
        return rows

    def leave(self, rows: list[Row], last: bool) -> None:
        hidden = torch.stack([row.hidden for row in rows]).to(DEVICE)
        positions = torch.tensor([row.position for row in rows], device=DEVICE)
        slots = torch.tensor([row.slot for row in rows], dtype=torch.int32, device=DEVICE)
        reviving.leave(self.state, hidden, positions, slots, last=last)
        self.twin.leave(rows, last)
        self.check()

    def listed(self, segment: int, tokens: list[Token], done: int) -> None:
        """Sets what is listed, as others than these kernels do."""
        self.twin.tokens[segment] = tokens
        self.state.tokens[segment] = on_device(tokens, self.room, Token(JUNK, 0))
        self.run_so_far(segment, done)

    def run_so_far(self, segment: int, done: int) -> None:
        self.twin.done[segment] = done
        self.state.counts[segment] = torch.tensor(self._counts()[segment])

    def check(self) -> None:
        """Everything agrees, and what the twin did not touch is as before."""
        twin, state = self.twin, self.state
        assert [tuple(row) for row in state.counts.tolist()] == self._counts()
        for tokens, row in zip(twin.tokens, state.tokens, strict=True):
            assert row[:, : len(tokens)].T.tolist() == [list(token) for token in tokens]
        assert state.lengths.tolist() == twin.lengths and state.depths.tolist() == twin.depths
        assert state.slots.tolist() == twin.slots and state.wanted.tolist() == twin.wanted
        assert torch.equal(state.homes, self.homes) and not state.leads.any()
        self._check_hidden()

    def _check_hidden(self) -> None:
        expected = torch.stack(self.twin.hidden)
        assert same(torch.stack(self.home), expected)
        written = sum(int((~aux.isnan()).sum()) for aux in self.aux)
        assert written == int((~expected.isnan()).sum())


@dataclass(frozen=True)
class Choice:
    count: int
    wanted: int
    kind: str = "plain"
    arriving: float = 0.4
    segment: int = 1
    spare: int = 7


def listing(choice: Choice, generator: random.Random) -> list[Token]:
    """Of so many tokens, in any order but for the newest, whose position is not the last there could be."""
    positions = generator.sample(range(choice.count + choice.spare), choice.count)
    newest = max(positions)
    others = [position for position in positions if position != newest]
    slots = _shuffled(0, choice.count)
    return [Token(slot, position) for slot, position in zip(slots, [*others, newest], strict=True)]


def before_choice(choice: Choice) -> revival.State:
    """A state in which one segment's tokens are listed, and the next one's are to be chosen among them."""
    torch.manual_seed(choice.count)
    generator, segment = random.Random(choice.count), choice.segment
    listed, room = listing(choice, generator), choice.count + choice.spare
    depths = [generator.randrange(SEGMENTS + 1) for _ in range(room)]
    slots = [[JUNK] * room for _ in range(SEGMENTS)]
    lengths = [generator.randrange(10**5) for _ in range(SEGMENTS)]
    free = generator.sample(range(choice.count + 50), choice.count)
    lengths[segment] = choice.count + 50
    for _, position in listed[:-1]:
        waits = generator.random() < choice.arriving
        depths[position] = segment if waits else generator.randint(segment + 1, SEGMENTS)
        slots[segment][position] = JUNK if waits else free.pop()
    wanted = [[generator.randint(1, choice.count) for _ in range(room)] for _ in range(SEGMENTS)]
    wanted[segment][listed[-1].position] = choice.wanted
    tokens = [[Token(3, 0), Token(JUNK, room - 1)][: room - 1] for _ in range(SEGMENTS)]
    tokens[segment - 1] = listed
    hidden = [torch.full((8,), float(position)) for position in range(room)]
    return revival.State(tokens, [1] * SEGMENTS, [1] * SEGMENTS, slots, depths, hidden, lengths, wanted)


def scores_like(kind: str, count: int) -> list[float]:
    """Of a listing, the newest last; as a 32-bit number can have them."""
    torch.manual_seed(count)
    scores = torch.rand(count)
    if kind == "ties":
        scores = torch.randint(0, 4, (count,)) / 8
    elif kind == "equal":
        scores = torch.full((count,), 0.25)
    elif kind == "zeros":
        scores = torch.where(torch.rand(count) < 0.8, 0.0, scores)
    elif kind == "all zero":
        scores = torch.zeros(count)
    elif kind == "tiny":
        scores = scores * 1e-42
    elif kind == "wide":
        scores = torch.exp2(-60 * scores)
    elif kind == "close":
        scores = torch.nextafter(torch.full((count,), 0.01), (torch.rand(count) < 0.5).float())
    if kind != "equal":
        scores[-1] = 0.0  # lowest, and chosen nevertheless
    numbers: list[float] = scores.tolist()
    return numbers


def choices() -> list[Choice]:
    counts = [1, 2, 30, 31, 32, 33, 1000]
    shares = [Choice(count, wanted) for count in counts for wanted in sorted({1, (count + 1) // 2, count})]
    kinds = ["ties", "equal", "zeros", "all zero", "tiny", "wide", "close"]
    tied = [Choice(count, wanted, kind) for kind in kinds for count, wanted in ((31, 8), (300, 200))]
    arrivals = [Choice(40, wanted, arriving=share) for wanted in (1, 13, 40) for share in (0.0, 1.0)]
    later = [Choice(50, 20, arriving=share, segment=2) for share in (0.0, 0.4, 1.0)]
    full = [Choice(count, 16, spare=0) for count in (16, 64)]
    return shares + tied + arrivals + later + full


@pytest.mark.parametrize("choice", choices(), ids=str)
def test_choice_of_tokens(choice: Choice) -> None:
    Mirror(before_choice(choice)).choose(scores_like(choice.kind, choice.count), choice.segment)


@pytest.mark.parametrize(
    "wanted, kind",
    [
        (1, "plain"),
        (2500, "plain"),
        (17500, "plain"),
        (18000, "plain"),
        (2500, "ties"),
        (17500, "ties"),
        (2500, "close"),
        (17500, "all zero"),
    ],
)
@pytest.mark.slow
def test_choice_among_more_tokens_than_a_block_takes(wanted: int, kind: str) -> None:
    choice = Choice(18000, wanted, kind)
    Mirror(before_choice(choice)).choose(scores_like(kind, choice.count), choice.segment)


def test_choice_does_not_ask_how_deep_the_newest_token_is() -> None:
    for depth in (-1, 0, 1, 2, 3, JUNK):
        twin = before_choice(Choice(20, 9))
        twin.depths[twin.tokens[0][-1].position] = depth
        Mirror(twin).choose(scores_like("plain", 20), 1)


def waiting(listed: int, done: int, width: int = 24, dtype: torch.dtype = torch.float32) -> Mirror:
    """In segment 1, of the listed tokens all but the first few still have to run; only they have hidden states."""
    twin = before_choice(Choice(listed, 1))
    twin.hidden = [torch.full((width,), torch.nan, dtype=dtype) for _ in twin.hidden]
    twin.tokens[1], twin.done[1], twin.arriving[1] = twin.tokens[0], done, listed - done
    for _, position in twin.tokens[1][done:-1]:
        twin.hidden[position] = torch.randn(width).to(dtype)
    return Mirror(twin)


@pytest.mark.parametrize("listed, done, rows", [(1, 0, 1), (1, 0, 4), (9, 8, 1), (9, 8, 5), (9, 5, 5), (9, 4, 5)])
def test_last_rows_enter_behind_padding(listed: int, done: int, rows: int) -> None:
    waiting(listed, done).enter(1, torch.randn(24), rows, last=True)


@pytest.mark.parametrize("listed, done, rows", [(9, 0, 8), (9, 3, 2), (80, 3, 70), (5, 3, 1)])
def test_first_rows_enter(listed: int, done: int, rows: int) -> None:
    waiting(listed, done).enter(1, nan(24).cpu(), rows, last=False)


@pytest.mark.parametrize("listed, done, rows", [(1, 0, 2), (9, 8, 3), (9, 5, 4), (9, 0, 32)])
def test_first_rows_enter_before_padding(listed: int, done: int, rows: int) -> None:
    waiting(listed, done).enter(1, torch.randn(24), rows, last=False)


@pytest.mark.parametrize("width", [8, 896, 1104])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_hidden_states_of_all_widths_come_and_go(width: int, dtype: torch.dtype) -> None:
    mirror = waiting(9, 4, width, dtype)
    rows = mirror.enter(1, torch.randn(width).to(dtype), 7, last=True)
    mirror.leave([row._replace(hidden=row.hidden * 2 + 1) for row in rows], last=True)
    rows = mirror.enter(1, torch.randn(width).to(dtype), 3, last=False)
    mirror.leave([row._replace(hidden=row.hidden * 2 + 1) for row in rows], last=False)


def test_all_rows_leave_that_have_a_slot() -> None:
    mirror = waiting(41, 0)
    rows = mirror.enter(1, torch.randn(24), 40, last=False)
    assert 0 in [row.slot for row in rows]
    mirror.leave([row._replace(hidden=torch.randn(24)) for row in rows], last=False)


def test_rows_leave_for_their_homes_alone() -> None:
    mirror = waiting(40, 30)
    rows = mirror.enter(1, torch.randn(24), 32, last=True)
    assert sum(row.slot < 0 for row in rows) == 22
    mirror.leave([row._replace(hidden=torch.randn(24)) for row in rows], last=True)
    assert torch.stack([mirror.twin.hidden[position] for _, position in mirror.twin.tokens[1][:30]]).isnan().all()


class Decode:
    """Decode steps on a mirror, with layers that count how often a token went through a segment's."""

    prompt = 25

    def __init__(self, steps: int, rows: int, seed: int) -> None:
        self.rows = rows
        self.generator = random.Random(seed)
        self.total = self.prompt + steps
        self.cached: list[dict[int, int]] = [{} for _ in range(SEGMENTS)]
        self.mirror = Mirror(self._prefilled())
        self.most = 0

    def _prefilled(self) -> revival.State:
        """Every token of the prompt waits at some segment, or has been through all."""
        depths = [self.generator.randint(1, SEGMENTS) for _ in range(self.prompt)]
        slots = [[JUNK] * self.total for _ in range(SEGMENTS)]
        for segment, cached in enumerate(self.cached):
            for position, depth in enumerate(depths):
                if depth > segment:
                    slots[segment][position] = len(cached)
                    cached[len(cached)] = position
        lengths = [len(cached) for cached in self.cached]
        hidden = [torch.full((16,), torch.nan) for _ in range(self.total)]
        for position, depth in enumerate(depths):
            if depth < SEGMENTS:
                hidden[position] = self._after(position, depth)
        depths += [JUNK] * (self.total - self.prompt)
        wanted = [[JUNK] * self.total, *self._wanted()]
        tokens: list[list[Token]] = [[] for _ in range(SEGMENTS)]
        return revival.State(tokens, [0] * 3, [0] * 3, slots, depths, hidden, lengths, wanted)

    def _wanted(self) -> list[list[int]]:
        """Different numbers at every step, few or many, and never more at a later point."""
        first = [self.generator.randint(1, min(position + 1, 22)) for position in range(self.total)]
        return [first, [self.generator.randint(1, most) for most in first]]

    @staticmethod
    def _after(position: int, segments: int) -> Tensor:
        """What a token has become behind so many segments."""
        return torch.arange(16) + 100.0 * position + 10000.0 * segments

    def step(self, newest: int) -> None:
        """Segment 0 holds all tokens, so that only the newest comes in."""
        twin, state = self.mirror.twin, self.mirror.state
        self.cached[0][newest] = newest
        twin.lengths[0] += 1
        state.lengths[0] += 1
        twin.slots[0][newest] = newest
        state.slots[0, newest] = newest
        twin.arriving[0] = 1
        self.mirror.listed(0, [Token(position, position) for position in range(newest + 1)], newest + 1)
        for segment in range(1, SEGMENTS):
            count = len(twin.tokens[segment - 1])
            self.mirror.choose([self.generator.choice((0.0, 0.25, self._rank())) for _ in range(count)], segment)
            self._run(segment, newest)
        self.check(newest)

    def _rank(self) -> float:
        """A number that 32 bits hold."""
        return self.generator.randrange(1, 1000) / 1024

    def _run(self, segment: int, newest: int) -> None:
        """So many rows at a time, the newest among the last."""
        twin, hidden = self.mirror.twin, self._after(newest, segment)
        self.most = max(self.most, twin.arriving[segment])
        while len(twin.tokens[segment]) - twin.done[segment] > self.rows:
            self._layers(segment, hidden, last=False)
            self.mirror.run_so_far(segment, twin.done[segment] + self.rows)
        self._layers(segment, hidden, last=True)
        self.mirror.run_so_far(segment, len(twin.tokens[segment]))

    def _layers(self, segment: int, newest: Tensor, last: bool) -> None:
        rows = self.mirror.enter(segment, newest, self.rows, last)
        for row in rows:
            if row.slot >= 0:
                assert (
                    torch.equal(row.hidden, self._after(row.position, segment)) and row.slot not in self.cached[segment]
                )
                self.cached[segment][row.slot] = row.position
        self.mirror.leave([row._replace(hidden=self._after(row.position, segment + 1)) for row in rows], last)

    def check(self, newest: int) -> None:
        """Every token has keys and values in the segments before its depth, and waits there in between."""
        state = self.mirror.state
        depths = state.depths.tolist()[: newest + 1]
        assert depths[newest] == SEGMENTS
        for segment, cached in enumerate(self.cached):
            there = {position for position, depth in enumerate(depths) if depth > segment}
            slots = state.slots[segment].tolist()
            assert {slots[position]: position for position in there} == cached
            assert sorted(cached) == list(range(int(state.lengths[segment])))
        for position, depth in enumerate(depths):
            if depth < SEGMENTS:
                assert torch.equal(self.mirror.home[position].cpu(), self._after(position, depth))


@pytest.mark.parametrize("seed, rows", [(0, 1), (1, 2), (2, 3), (3, 16)])
def test_a_decode_in_which_tokens_come_back(seed: int, rows: int) -> None:
    decode = Decode(6, rows, seed)
    for newest in range(decode.prompt, decode.total):
        decode.step(newest)
    assert decode.most >= 5
