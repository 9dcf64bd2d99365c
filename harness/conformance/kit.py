"""The conformance kit: does a method keep the promises of `harness.engine.method.Method`?

A method is run on tiny random models (every family, every layout of heads, fp32 on the CPU) and judged by what is seen
from outside (`harness.conformance.witness`). Each check is named, says in one line what it demands, and passes, fails
with a reason, or is skipped with one. A check is a generator of problems: none is a pass, the first is the reason.

    report = conformance(spec)        # a `MethodSpec`, as `harness.runner.catalog.parse_methods` gives it
    assert report.passed, str(report)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from itertools import cycle
from statistics import mean
from typing import Any, Literal

import torch
from torch import Tensor

from harness.conformance.tiny import END, HEADS, LAYERS, MODELS, random_ids, tiny_engine, tiny_shape
from harness.conformance.witness import Session, State, Trace, settled
from harness.engine.batch import Batch
from harness.engine.method import Method
from harness.engine.request import Request
from harness.errors import InputError
from harness.models.load import FAMILIES
from harness.runner.catalog import MethodSpec
from harness.runner.faults import told

NEW_TOKENS = 4
DECODING = tuple(zip(FAMILIES, cycle(HEADS), strict=False))
"""Every family once, every layout of heads at least once: on the other models the prefill alone is looked at."""
ONE = ("llama", "GQA")
"""The model of every length."""
COMMON, LONG = 333, 1101
"""Prompt tokens on every model, and where budgets in tokens (512, 1024) have to bite."""
LOGITS_TOLERANCE = 1e-3
"""Of the largest logit; sums in another order differ by some 1e-6."""
LENGTHS = (1, 2, 17, 63, 64, 65, 127, COMMON)
BATCH = (127, COMMON, 2, 65, 1, 17)


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        check: its name.
        demand: what it asks of a method, one line.
        status: how it went.
        detail: why it failed or was skipped, one line; "" where it passed.
    """

    check: str
    demand: str
    status: Literal["pass", "fail", "skip"]
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.status}  {self.check:<17} {self.demand}" + (f" -- {self.detail}" if self.detail else "")


@dataclass(frozen=True)
class Report:
    """What all checks found of one method.

    Attributes:
        label: the method with its options.
        simulated: it masks instead of skipping work, so a run reports only its accuracy.
        findings: in the order of `CHECKS`.
    """

    label: str
    simulated: bool
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """No check failed."""
        return all(finding.status != "fail" for finding in self.findings)

    def __str__(self) -> str:
        """One line a check and one for the whole."""
        failed = sum(finding.status == "fail" for finding in self.findings)
        whole = f"{self.label}: " + (f"{failed} of {len(self.findings)} checks failed" if failed else "conforms")
        note = "; simulated, so a run reports its accuracy and neither latency nor memory" if self.simulated else ""
        return "\n".join([*map(str, self.findings), whole + note])


class Subject:
    """A method under test: fresh instances of it, and what it did with one prompt of every length on every model."""

    def __init__(
        self, spec: MethodSpec, layers: int = LAYERS, models: Sequence[tuple[str, str]] = MODELS, long: int = LONG
    ) -> None:
        """
        Args:
            spec: the method with its options.
            layers: depth of the tiny models.
            models: families and layouts of heads; one model is always there.
            long: tokens of the longest prompt.

        Raises:
            InputError: the options do not fit a model of that depth.
        """
        self.spec, self.layers, self.models, self.long = spec, layers, models, long
        self._outcomes: dict[tuple[str, str, int], Trace | Exception] = {}
        spec.check(tiny_shape(layers=layers))

    def session(self, family: str = ONE[0], heads: str = ONE[1], spec: MethodSpec | None = None) -> Session:
        """A fresh instance on a tiny model."""
        engine = tiny_engine(family, heads, self.layers)
        return Session((spec or self.spec).build(engine.context), engine)

    @property
    def outcomes(self) -> dict[str, Trace | Exception]:
        """Where -> what became of a prompt there: every model, and every length on one model."""
        cases = [(*model, COMMON) for model in self.models] + [(*ONE, length) for length in self.lengths]
        return {_where(*case): self._outcome(*case) for case in dict.fromkeys(cases)}

    def _outcome(self, *case: *tuple[str, str, int]) -> Trace | Exception:
        if case not in self._outcomes:
            self._outcomes[case] = self._served(*case)
        return self._outcomes[case]

    def _served(self, family: str, heads: str, length: int) -> Trace | Exception:
        try:
            return self.session(family, heads).serve(prompt(length), _new_tokens(family, heads))
        except Exception as error:  # whatever a third party's code raises is a finding
            return error

    @property
    def lengths(self) -> list[int]:
        """`LENGTHS`, the longest, and around every number in the options: a block, a page, a window ends there."""
        given = self.spec.options.model_dump().values()
        sizes = [value for value in given if type(value) is int and 1 < value < self.long]
        return sorted({*LENGTHS, self.long, *(size + shift for size in sizes for shift in (-1, 0, 1))})

    def traces(self) -> list[tuple[str, Trace]]:
        """The prompts that came through; what crashed is the business of the check `lengths`."""
        through = [(where, outcome) for where, outcome in self.outcomes.items() if isinstance(outcome, Trace)]
        if not through:
            raise Skip("no request came through, see `lengths`")
        return through

    def trace(self, length: int) -> Trace:
        """What a fresh instance did with `prompt(length)` on one model, `length` being one of `lengths`."""
        outcome = self._outcome(*ONE, length)
        if isinstance(outcome, Exception):
            raise Skip("such a request does not come through, see `lengths`")
        return outcome

    def states(self) -> Iterator[tuple[str, Trace, State]]:
        """Both states of every trace."""
        return ((f"{where}, {when}", trace, state) for where, trace in self.traces() for when, state in trace.states())

    def nothing(self) -> MethodSpec:
        """The method with nothing to prune: its `nothing` on top of the given options, or alone if they clash."""
        kind, given = self.spec.kind, self.spec.options.model_dump(exclude_unset=True)
        try:
            return self._with(given | dict(kind.nothing))
        except InputError:
            return self._with(dict(kind.nothing))

    def _with(self, given: dict[str, Any]) -> MethodSpec:
        spec = MethodSpec("nothing", self.spec.kind, self.spec.kind.Options.read("nothing", given))
        spec.check(tiny_shape(layers=self.layers))
        return spec


def _new_tokens(family: str, heads: str) -> int:
    return NEW_TOKENS if (family, heads) in DECODING else 1


def _where(family: str, heads: str, length: int) -> str:
    return f"{family}, {heads}, prompt of {length}"


class Skip(Exception):
    """Raised by a check that does not apply, with the reason."""


Check = Callable[[Subject], Iterator[str]]
CHECKS: dict[str, Check] = {}
"""Every check by name; its docstring's first line is its demand."""


def conformance(spec: MethodSpec, layers: int = LAYERS, models: Sequence[tuple[str, str]] = MODELS) -> Report:
    """Runs every check on a method.

    Args:
        spec: the method with its options.
        layers: depth of the tiny models, for options that name deep layers.
        models: families and layouts of heads; one model is always there.

    Raises:
        InputError: the options do not fit a model of that depth.
    """
    subject = Subject(spec, layers, models)
    return Report(spec.label, bool(spec.kind.simulated), tuple(run_check(name, subject) for name in CHECKS))


def run_check(name: str, subject: Subject) -> Finding:
    """Runs one check; whatever it raises is a failure."""
    check = CHECKS[name]
    demand = (check.__doc__ or "").splitlines()[0].rstrip(".")
    try:
        problem = next(check(subject), None)
    except Skip as reason:
        return Finding(name, demand, "skip", str(reason))
    except Exception as error:  # whatever a third party's code raises is a finding
        problem = told(subject.spec.kind, error)
    return Finding(name, demand, "fail" if problem else "pass", problem or "")


def prompt(length: int, seed: int = 0) -> Tensor:
    """[length] int64 token ids, of which the last occurs nowhere else."""
    ids = random_ids(length, seed)
    ids[-1] = END
    return ids


@cache
def full_attention(family: str, heads: str, layers: int, length: int) -> Trace:
    """What full attention answers to `prompt(length)`."""
    full = MethodSpec("full", Method, Method.Options())
    return Subject(full, layers).session(family, heads).serve(prompt(length), _new_tokens(family, heads))


def _check(name: str) -> Callable[[Check], Check]:
    def add(check: Check) -> Check:
        CHECKS[name] = check
        return check

    return add


@_check("lengths")
def _lengths(subject: Subject) -> Iterator[str]:
    """Prompts of 1 token, of one block, one less, one more, odd ones: on every model, with finite logits."""
    for where, outcome in subject.outcomes.items():
        if isinstance(outcome, Exception):
            yield f"{where}: {told(subject.spec.kind, outcome)}"
        elif not outcome.finite:
            yield f"{where}: logits are not finite"


@_check("nothing-to-prune")
def _nothing_to_prune(subject: Subject) -> Iterator[str]:
    """With nothing to prune, all is kept and every token is full attention's."""
    spec = subject.nothing()
    given = ":".join(f"{key}={value}" for key, value in subject.spec.kind.nothing.items())
    told = given or "no options (declare those that prune nothing)"
    for family, heads, length in [*((*model, COMMON) for model in subject.models), (*ONE, subject.long)]:
        trace = subject.session(family, heads, spec).serve(prompt(length), _new_tokens(family, heads))
        if problem := _unlike(full_attention(family, heads, subject.layers, length), trace):
            yield f"{_where(family, heads, length)}, `nothing` being {told}: {problem}"


def _unlike(full: Trace, trace: Trace) -> str:
    """How a request differs from one under full attention; "" if only by rounding."""
    if min(kept := _prompt_tokens(trace, trace.prefilled)) < trace.prompt_len:
        return f"kept {kept} of {trace.prompt_len}"
    if trace.tokens != full.tokens:
        return f"{trace.tokens}, full attention {full.tokens}"
    # A decode step that misses a token may still choose the same words; a question in decode adds steps of its own.
    pairs = list(zip(full.logits[::-1], trace.logits[::-1], strict=False))
    worst = max(float((one - other).abs().max() / one.abs().max()) for one, other in pairs[:NEW_TOKENS])
    return f"logits differ by {worst:.1e} of the largest one" if worst > LOGITS_TOLERANCE else ""


@_check("budget")
def _budget(subject: Subject) -> Iterator[str]:
    """After the prefill no layer holds more prompt tokens than requested."""
    for where, trace in subject.traces():
        kept, requested = trace.prefilled.kept, trace.prefilled.requested
        if len(kept) != subject.layers or len(requested) != subject.layers:
            yield f"{where}: {len(requested)} requests and {len(kept)} counts for {subject.layers} layers"
        for layer, (have, may) in enumerate(zip(kept, requested, strict=False)):
            if not have <= may <= trace.prompt_len:
                yield f"{where}: layer {layer} kept {have}, requested {may} of {trace.prompt_len}"


@_check("deterministic")
def _deterministic(subject: Subject) -> Iterator[str]:
    """The same request twice gives the same tokens and keeps the same ones."""
    again = subject.session().serve(prompt(COMMON), NEW_TOKENS)
    yield from _differences(f"prompt of {COMMON}", subject.trace(COMMON), again)


@_check("no-state")
def _no_state(subject: Subject) -> Iterator[str]:
    """Requests B, A, B, A on one instance: A's results are those that it gets alone."""
    one, other, session = prompt(subject.long), prompt(127, seed=1), subject.session()
    for ids in (other, one, other, one):
        trace = session.serve(ids, NEW_TOKENS)
        if ids is one:
            yield from _differences("A, behind another request", subject.trace(subject.long), trace)


@_check("odd-batch")
def _odd_batch(subject: Subject) -> Iterator[str]:
    """Requests of odd lengths, one after another, get the results they get alone."""
    session = subject.session()
    for length in BATCH:
        alone = subject.trace(length)
        yield from _differences(f"prompt of {length}", alone, session.serve(prompt(length), NEW_TOKENS))


@_check("together")
def _together(subject: Subject) -> Iterator[str]:
    """Requests of odd lengths, decoded together, get the tokens they get alone."""
    spec, engine = subject.spec, tiny_engine(*ONE, subject.layers)
    try:
        spec.kind.check_batch(spec.options)
    except InputError as reason:
        raise Skip(str(reason)) from None
    alone = [subject.trace(length).tokens for length in BATCH]
    batch = Batch(engine, [spec.build(engine.context) for _ in BATCH])
    for _ in batch.read([Request(prompt(length), NEW_TOKENS) for length in BATCH]):
        pass
    for _ in batch.steps():
        pass
    for length, tokens, slot in zip(BATCH, alone, batch.slots, strict=True):
        if slot.tokens != tokens:
            yield f"prompt of {length}: {slot.tokens} instead of {tokens}"


@_check("side-by-side")
def _side_by_side(subject: Subject) -> Iterator[str]:
    """Layers that are settled at once keep what each of them keeps alone."""
    session, alone = subject.session(), subject.trace(COMMON).prefilled.positions
    for layer, positions in enumerate(settled(session.method, session.engine, prompt(COMMON))):
        if positions != alone[layer]:
            yield f"prompt of {COMMON}: layer {layer} keeps other tokens"


@_check("positions")
def _positions(subject: Subject) -> Iterator[str]:
    """Cached positions are original, unique and, unless the class declares `reorders`, ascending."""
    ordered = not subject.spec.kind.reorders
    for where, trace, state in subject.states():
        for layer, positions in ((layer, head) for layer, heads in enumerate(state.positions) for head in heads):
            if len(set(positions)) != len(positions):
                yield f"{where}: layer {layer} holds a position twice"
            if not all(0 <= position < trace.length for position in positions):
                yield f"{where}: layer {layer} holds a position outside the sequence"
            if ordered and positions != sorted(positions):
                yield f"{where}: the positions of layer {layer} do not ascend"
        if trace.displaced:
            yield f"{where}: {trace.displaced}"


@_check("last-token")
def _last_token(subject: Subject) -> Iterator[str]:
    """The last token's row reaches every layer, in the prefill and in each step."""
    for where, trace in subject.traces():
        if trace.lost is not None:
            yield f"{where}: layer {trace.lost} lost it"


@_check("kept-counts")
def _kept_counts(subject: Subject) -> Iterator[str]:
    """`tokens_kept` counts the prompt tokens that the caches really hold."""
    for where, trace, state in subject.states():
        for layer, (positions, lengths) in enumerate(zip(state.positions, state.lengths, strict=True)):
            for (keys, values), held in zip(lengths, positions, strict=True):
                if not keys == values == len(held):
                    yield f"{where}: layer {layer} has {keys} keys, {values} values, {len(held)} positions"
        if state.kept != (real := _prompt_tokens(trace, state)):
            yield f"{where}: reported {state.kept}, there are {real}"


def _prompt_tokens(trace: Trace, state: State) -> list[float]:
    """Prompt tokens a layer, mean over KV heads."""
    return [mean(sum(position < trace.prompt_len for position in head) for head in heads) for heads in state.positions]


@_check("bytes")
def _bytes(subject: Subject) -> Iterator[str]:
    """`kv_bytes`, `kv_bytes_host` and `extra_bytes` add up to what is allocated."""
    if subject.spec.kind.simulated:
        raise Skip("simulated: no memory is reported")
    for where, _, state in subject.states():
        if problem := _bytes_problem(state):
            yield f"{where}: {problem}"


def _bytes_problem(state: State) -> str:
    found, device, host, extra = state.memory, state.kv_bytes, state.kv_bytes_host, state.extra_bytes
    if device + host < found.resident:
        return f"kv_bytes {device} and kv_bytes_host {host}, but {found.resident} are resident"
    if host == 0 and device != found.caches:
        return f"kv_bytes {device}, but the caches' keys and values take {found.caches}"
    if device > found.caches:
        return f"kv_bytes {device}, but all caches together take {found.caches}"
    low, reported = found.caches + found.floats + found.outside, device + host + extra
    if not low <= reported <= low + found.others:
        return f"kv_bytes {device}, kv_bytes_host {host} and extra_bytes {extra} make {reported}, but {low} are held"
    return ""


@_check("end-at-once")
def _end_at_once(subject: Subject) -> Iterator[str]:
    """An end token at the first place leaves that one token, and reports that hold."""
    for length in (1, COMMON):
        first = subject.trace(length).tokens[:1]
        trace = subject.session().serve(prompt(length), NEW_TOKENS, frozenset(first))
        if trace.tokens != first:
            yield f"prompt of {length}: {trace.tokens} instead of {first}"
        if subject.session().serve(prompt(length), 1).tokens != first:
            yield f"prompt of {length}: another first token when asked for one alone"
        if trace.prefilled != trace.finished:
            yield f"prompt of {length}: the state changed although nothing was decoded"


@_check("zero-tokens")
def _zero_tokens(subject: Subject) -> Iterator[str]:
    """A request for 0 new tokens is refused."""
    try:
        Request(prompt(2), 0)
    except ValueError:
        return
    yield "it was accepted"


@_check("simulated")
def _simulated(subject: Subject) -> Iterator[str]:
    """`simulated` and `reorders` are plain booleans of the class, so listings and records say the same."""
    session = subject.session()
    session.serve(prompt(17), NEW_TOKENS)
    for name in ("simulated", "reorders"):
        of_class, of_instance = getattr(subject.spec.kind, name), getattr(session.method, name)
        if type(of_class) is not bool or of_class is not of_instance:
            yield f"{name} is {of_class!r} for the class and {of_instance!r} for an instance"


@_check("prompt")
def _prompt(subject: Subject) -> Iterator[str]:
    """What `prompt` feeds to the model is no longer than the prompt and ends with its last token."""
    for length in subject.lengths:
        ids = prompt(length)
        session = subject.session()
        fed = session.method.prompt(ids, session.engine.first_layers)
        if not torch.equal(ids, prompt(length)):
            yield f"prompt of {length}: changed in place"
        if fed.dim() != 1 or fed.dtype != ids.dtype or not 1 <= len(fed) <= length:
            yield f"prompt of {length}: fed {fed.dtype} of shape {tuple(fed.shape)}"
        elif fed[-1] != ids[-1]:
            yield f"prompt of {length}: the last token is not fed"


def _differences(where: str, one: Trace, other: Trace) -> Iterator[str]:
    if names := list(_unequal(one, other)):
        yield f"{where}: differs in {', '.join(names)}"


def _unequal(one: Any, other: Any, name: str = "") -> Iterator[str]:
    """Names of the fields in which two dataclasses differ."""
    if is_dataclass(one):
        for field in (field for field in fields(one) if field.compare):
            path = f"{name}.{field.name}".lstrip(".")
            yield from _unequal(getattr(one, field.name), getattr(other, field.name), path)
    elif one != other:
        yield name
