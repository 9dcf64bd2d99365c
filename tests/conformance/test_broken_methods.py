"""The kit finds what is broken: a method with one fault fails the check for it, and a sound one fails none."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from harness.conformance.kit import CHECKS, Subject, conformance, run_check
from harness.conformance.tiny import LAYERS, MODELS
from harness.engine.cache import gather
from harness.engine.method import FirstLayers, Method
from harness.engine.request import Request
from harness.engine.step import Heads, Rows, Step
from harness.errors import InputError
from harness.options import OptionSet
from harness.runner.catalog import MethodSpec
from methods.common.evicting import Evicting
from methods.common.scores import head_norms


class Sound(Method):
    """Stores the first half of the prompt and its last token; the faults below are variations of it."""

    name = "sound"
    summary = "keeps one half"
    nothing = {"half": "false"}

    class Options(OptionSet):
        half: bool = True

    options: Options

    def stays(self, n: int) -> Tensor:
        """[m] ascending."""
        if not self.options.half or n < 2:
            return torch.arange(n)
        return torch.cat((torch.arange(n // 2), torch.tensor([n - 1])))

    def attend(self, layer: int, heads: Heads, step: Step) -> Tensor:
        if step.phase == "decode":
            return super().attend(layer, heads, step)
        self.store(layer, heads, self.stays(len(heads)))
        return self.model.attention.causal(heads.q, heads.k, heads.v)

    def store(self, layer: int, heads: Heads, index: Tensor) -> None:
        self.cache[layer].append(heads.k[index], heads.v[index], heads.positions[index])

    def tokens_requested(self) -> list[int]:
        return [min(self.prompt_len, self.prompt_len // 2 + 1)] * len(self.cache)


class Undeclared(Sound):
    nothing = {}


class MixesLayers(Evicting):
    """Takes heads of several layers for those of one."""

    name, summary = "mixes-layers", "keeps long keys, as all heads see it"

    def score(self, layers: range, heads: Heads) -> Tensor:
        return head_norms(heads.k).mean(1).expand(len(layers), -1)


class OverBudget(Sound):
    def tokens_requested(self) -> list[int]:
        return [max(1, self.prompt_len // 4)] * len(self.cache)


class MoreThanThePrompt(Sound):
    def tokens_requested(self) -> list[int]:
        return [self.prompt_len + 1] * len(self.cache)


class Dice(Sound):
    def stays(self, n: int) -> Tensor:
        index = super().stays(n)
        return torch.cat((torch.randperm(n - 1)[: len(index) - 1].sort().values, torch.tensor([n - 1])))


class Remembers(Sound):
    """Its second request goes differently."""

    served = 0

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        super().begin(prompt_len, max_new_tokens)
        self.served += 1

    def stays(self, n: int) -> Tensor:
        return super().stays(n) if self.served == 1 else torch.tensor([n - 1])


class RemembersShortOnes(Sound):
    """A prompt of two tokens spoils all that follow."""

    spoiled = False

    def stays(self, n: int) -> Tensor:
        self.spoiled = self.spoiled or n == 2
        return torch.tensor([n - 1]) if self.spoiled and n > 2 else super().stays(n)


class SharesState(Sound):
    """Decodes for the request that any instance read last."""

    latest = 0

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        super().begin(prompt_len, max_new_tokens)
        SharesState.latest = prompt_len

    def attend(self, layer: int, heads: Heads, step: Step) -> Tensor:
        attended = super().attend(layer, heads, step)
        return attended if self.prompt_len == SharesState.latest else torch.zeros_like(attended)


class AddsRows(Sound):
    """Brings a row more in, at the last layer of each decode step."""

    def after_layer(self, layer: int, rows: Rows, heads: Heads, step: Step) -> Rows:
        if step.phase == "prefill" or layer + 1 < len(self.cache):
            return rows
        return rows.select(torch.tensor([0, 0]))


class LeaksMemory(Sound):
    """The last request's caches are kept."""

    last: object = None

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        self.last = getattr(self, "cache", None)
        super().begin(prompt_len, max_new_tokens)


class Backwards(Sound):
    def store(self, layer: int, heads: Heads, index: Tensor) -> None:
        super().store(layer, heads, index.flip(0))


class Declared(Backwards):
    reorders = True


class Twice(Sound):
    def stays(self, n: int) -> Tensor:
        index = super().stays(n)
        return index if len(index) < 3 or not self.options.half else torch.cat((index[1:2], index[1:]))


class RenumbersCache(Sound):
    """Stores tokens under the positions of their neighbours; the last one has its own."""

    def store(self, layer: int, heads: Heads, index: Tensor) -> None:
        shifted = (index[:-1] + int(self.options.half)).clamp(max=int(index[-1]))
        stays = torch.cat((shifted, index[-1:]))
        self.cache[layer].append(heads.k[stays], heads.v[stays], heads.positions[index])


class RenumbersRows(Sound):
    """Drops rows and counts the rest anew; the last one is left its place."""

    def after_layer(self, layer: int, rows: Rows, heads: Heads, step: Step) -> Rows:
        if step.phase == "decode" or layer != 1 or len(rows) < 4 or not self.options.half:
            return rows
        positions = torch.cat((torch.arange(len(rows) - 3), rows.positions[-1:]))
        return Rows(rows.hidden[2:], positions)


class LosesTheLast(Sound):
    def after_layer(self, layer: int, rows: Rows, heads: Heads, step: Step) -> Rows:
        drops = self.options.half and step.phase == "prefill" and layer == 1 and len(rows) > 1
        return rows.select(torch.arange(len(rows) - 1)) if drops else rows


class MixesHeads(Sound):
    """Each KV head holds tokens of its own, under the positions of another head's."""

    reorders = True

    def store(self, layer: int, heads: Heads, index: Tensor) -> None:
        each = torch.stack([index] * heads.k.shape[1], 1)
        positions = each
        if self.options.half:
            each = (each + torch.arange(each.shape[1])) % len(heads)
            positions = each.flip(1)
        self.cache[layer].append(gather(heads.k, each), gather(heads.v, each), positions)

    def stays(self, n: int) -> Tensor:
        return torch.arange(n)[: -(-n // 2)] if self.options.half else torch.arange(n)


class Miscounts(Sound):
    def tokens_kept(self) -> Sequence[float]:
        return [kept - 1 for kept in super().tokens_kept()]


class ReportsWhatItUses(Sound):
    """Leaves the room for new tokens out."""

    def kv_bytes(self) -> int:
        return sum(cache.resident_nbytes for cache in self.cache)


class ReportsLess(Sound):
    def kv_bytes(self) -> int:
        return super().kv_bytes() // 2


class Hoards(Sound):
    """Holds on to one query, a view of all queries, and does not say so."""

    def attend(self, layer: int, heads: Heads, step: Step) -> Tensor:
        self.query = {layer: [heads.q[-1:]]}
        return super().attend(layer, heads, step)


class ClaimsToPark(Sound):
    """Says that half of its keys and values are on the host; they never left."""

    def kv_bytes_host(self) -> int:
        return super().kv_bytes() // 2


class NeedsTwoTokens(Sound):
    def stays(self, n: int) -> Tensor:
        if n == 1:
            raise IndexError("no token to drop")
        return super().stays(n)


class BreaksAtBlocks(Sound):
    """A whole number of blocks leaves an empty last one, whose mean is not a number."""

    def after_attention(self, layer: int, rows: Rows, heads: Heads, step: Step) -> Rows:
        rest = torch.ones(step.count % 64 if step.phase == "prefill" else 1).mean()
        return Rows(rows.hidden, rows.positions, None if rows.attended is None else rows.attended * rest)


class PlansForDecode(Sound):
    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        super().begin(prompt_len, max_new_tokens)
        self.pace = prompt_len / (max_new_tokens - 1)


class TidiesWhenAsked(Sound):
    """Looking at its counts changes them."""

    looks = 0

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        super().begin(prompt_len, max_new_tokens)
        self.looks = 0

    def tokens_recomputed(self) -> int:
        self.looks += 1
        return self.looks


class Undecided(Sound):
    """The list of methods says simulated, its records would not."""

    simulated = True

    def begin(self, prompt_len: int, max_new_tokens: int) -> None:
        super().begin(prompt_len, max_new_tokens)
        vars(self)["simulated"] = False


class Wordy(Sound):
    simulated = "no"  # type: ignore[assignment]


class HeadOnly(Sound):
    def prompt(self, ids: Tensor, run: FirstLayers) -> Tensor:
        return ids[: -(-len(ids) // 2)] if self.options.half else ids


class Overwrites(Sound):
    def prompt(self, ids: Tensor, run: FirstLayers) -> Tensor:
        ids[0] = ids[-1] if self.options.half else ids[0]
        return ids


BROKEN = [
    ("lengths", NeedsTwoTokens, "prompt of 1: attend, layer 0: IndexError: no token to drop (test_broken_methods.py:"),
    ("lengths", BreaksAtBlocks, "prompt of 64: logits are not finite"),
    ("nothing-to-prune", Undeclared, "`nothing` being no options"),
    ("budget", OverBudget, "layer 0 kept 167, requested 83 of 333"),
    ("budget", MoreThanThePrompt, "requested 334 of 333"),
    ("deterministic", Dice, "differs in tokens, prefilled.positions"),
    ("no-state", Remembers, "differs in"),
    ("no-state", LeaksMemory, "memory"),
    ("odd-batch", RemembersShortOnes, "prompt of 65: differs in"),
    ("together", SharesState, "prompt of 127: ["),
    ("together", AddsRows, "after_layer, layer 5: returned 2 rows for a new token"),
    ("side-by-side", MixesLayers, "layer 0 keeps other tokens"),
    ("positions", Backwards, "positions of layer 0 do not ascend"),
    ("positions", Twice, "layer 0 holds a position twice"),
    ("positions", RenumbersCache, "the cache of layer 0 holds a position with another token's values"),
    ("positions", RenumbersRows, "after_layer of layer 1 (prefill) gave a position another token's hidden state"),
    ("positions", MixesHeads, "holds a position with another token's values"),
    ("last-token", LosesTheLast, "layer 2 lost it"),
    ("kept-counts", Miscounts, "reported [166, 166"),
    ("bytes", ReportsWhatItUses, "but the caches' keys and values take"),
    ("bytes", ReportsLess, "are resident"),
    ("bytes", Hoards, "are held"),
    ("bytes", ClaimsToPark, "are held"),
    ("end-at-once", PlansForDecode, "ZeroDivisionError"),
    ("end-at-once", TidiesWhenAsked, "the state changed"),
    ("simulated", Undecided, "True for the class and False for an instance"),
    ("simulated", Wordy, "'no'"),
    ("prompt", HeadOnly, "the last token is not fed"),
    ("prompt", Overwrites, "changed in place"),
]
SHARING = {"lengths", "budget", "positions", "last-token", "kept-counts", "bytes"}
"""Checks that look at the same requests, so that all of them take no longer than one."""


# A fault shows on any model; all of them are the business of the methods that are sound.
ONE_MODEL = MODELS[:1]


def spec(kind: type[Method]) -> MethodSpec:
    return MethodSpec(kind.__name__, kind, kind.Options())


def subject(kind: type[Method], layers: int = LAYERS) -> Subject:
    return Subject(spec(kind), layers, ONE_MODEL)


@pytest.mark.parametrize(("check", "kind", "words"), BROKEN, ids=[kind.__name__ for _, kind, _ in BROKEN])
def test_a_fault_fails_the_check_for_it_and_none_beside_it(check: str, kind: type[Method], words: str) -> None:
    broken = subject(kind)
    findings = [run_check(name, broken) for name in (SHARING if check in SHARING else [check])]
    failed = {finding.check: finding.detail for finding in findings if finding.status == "fail"}
    assert words in failed.get(check, "") and set(failed) == {check}, failed


def test_requests_without_new_tokens_let_in_fail_their_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Request, "__post_init__", lambda request: None)
    assert run_check("zero-tokens", subject(Sound)).status == "fail"


def test_every_check_has_a_method_that_fails_it() -> None:
    assert {check for check, _, _ in BROKEN} | {"zero-tokens"} == set(CHECKS)


@pytest.mark.parametrize("kind", [Method, Sound, Declared])
def test_a_sound_method_passes(kind: type[Method]) -> None:
    sound = Subject(spec(kind), models=ONE_MODEL, long=450)
    found = [run_check(check, sound) for check in CHECKS]
    assert {finding.status for finding in found} == {"pass"}, found


class Masks(Sound):
    simulated = True


def test_a_simulated_method_is_reported_as_such_and_its_memory_is_not_judged() -> None:
    report = conformance(spec(Masks), models=ONE_MODEL)
    assert report.passed and report.simulated
    assert [finding.check for finding in report.findings if finding.status == "skip"] == ["bytes"]
    assert str(report).splitlines()[-1].startswith("Masks: conforms; simulated")


def crash(method: Method, *_: object) -> None:
    raise RuntimeError("two\nlines")


def test_a_method_that_never_runs_is_told_once_and_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sound, "begin", crash)
    report = conformance(spec(Sound), models=ONE_MODEL)
    found = {finding.check: finding for finding in report.findings}
    assert "RuntimeError: two lines" in found["lengths"].detail
    assert found["budget"].status == found["positions"].status == "skip"
    assert len(str(report).splitlines()) == len(CHECKS) + 1 and "of 16 checks failed" in str(report)


def test_options_that_fit_no_tiny_model_are_bad_input_not_a_finding() -> None:
    class Deep(Sound):
        @classmethod
        def check(cls, options: OptionSet, shape: object) -> None:
            raise InputError("deep: layer 20 of 6")

    with pytest.raises(InputError, match="layer 20"):
        conformance(spec(Deep))


def test_deeper_models_hold_deeper_options() -> None:
    assert subject(Sound, layers=9).trace(17).prefilled.kept == [9] * 9
