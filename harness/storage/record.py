"""One record: everything known of one method's answer to one sample. What was not measured is null, never 0."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

SCHEMA_VERSION: Literal[1] = 1
OUT_OF_MEMORY = "out_of_memory"
"""Name of the fact, in a record's `extra`, that the device could not hold a request, and what it asked for."""
FAILED = "failed"
"""Name of the fact that a request failed by the method's own fault: where, of what, in one line."""
NOT_SCORED = "not_scored"
"""Name of the fact that the task has no score for an answer, and why."""
WRITTEN = frozenset({OUT_OF_MEMORY, FAILED, NOT_SCORED, "kept_spans", "kept_digest", "kept_shares", "density"})
"""Names in `extra` that a run writes itself, and reads as its own: a task's facts have others."""

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Elapsed = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Joules = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Operations = Annotated[int, Field(ge=0, lt=10**30)]
MeanCount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Range = Annotated[list[Count], Field(min_length=2, max_length=2)]


class Facts(BaseModel):
    """What reports read of a record's `extra`; a task may add whatever it likes."""

    model_config = ConfigDict(extra="allow")

    needles: list[Range] | None = None
    kept_spans: list[list[Range] | None] | None = None
    kept_digest: str | None = None
    kept_shares: list[list[Share] | None] | None = None
    context_hash: str | None = None

    @field_validator("kept_spans", "kept_shares")
    @classmethod
    def _begins(cls, layers: list[Any] | None) -> list[Any] | None:
        if layers and layers[0] is None:
            raise ValueError("the first layer cannot be like the one before")
        return layers


class Arrival(BaseModel):
    """A request that arrived at a rate, and its way through the queue; seconds since the first one arrived.

    The clock stands still while requests are recorded.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        description="requests a second that were to arrive; null where all arrived at once"
    )
    most: Count = Field(description="how many could be served at once")
    arrival_s: Seconds = Field(description="when it arrived")
    start_s: Seconds = Field(description="when its prefill began: what lies between is its time in the queue")
    first_token_s: Seconds = Field(description="when its first new token was on the host")
    last_token_s: Seconds = Field(description="when its last one was, and it left")
    batch_sizes: list[Count] = Field(description="requests in each of its decode steps, itself included")
    replayed: bool = Field(description="whether all of these steps were replayed, not launched anew")
    captures: Count = Field(description="parts of its prefill that were recorded first, so its time says less")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if not self.arrival_s <= self.start_s <= self.first_token_s <= self.last_token_s:
            raise ValueError("arrival, start, first and last token are not in this order")
        return self


class Record(BaseModel):
    """One line of `samples.jsonl`; what cannot have been measured is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = SCHEMA_VERSION
    cell: str = Field(description="content hash of model x method x task x everything else that shapes an answer")
    method: str = Field(description="the method with its options, as asked for")
    task: str = Field(description="the task with its options, as asked for")
    sample: str = Field(description="the sample's id within its task")
    prompt_hash: str = Field(description="sha256 of the prompt's token ids")
    prompt_tokens: Count = Field(description="tokens of the prompt, chat template and special tokens included")
    prompt_tokens_cut: Count | None = Field(
        default=None, description="tokens cut out of the prompt's middle, so that it fits; null in older records"
    )
    context_tokens: Count = Field(
        description="prompt tokens that the prefill brought in and that could be pruned; the rest is a question that "
        "came after it",
    )
    question: str = Field(
        description='where the question was: "prompt" (in the pruned prompt, as LongBench has it) or "after" (only the '
        "context is prefilled and pruned, the question follows)"
    )
    prompt_text: str | None = Field(
        default=None,
        description="the prompt before any chat template, a long one without its middle; null where token ids were "
        "asked, and in older records",
    )
    question_text: str | None = Field(
        default=None, description="the prompt's ending that asks; null where the task does not tell it from the context"
    )
    new_tokens: Count = Field(description="tokens generated, the end token included if there was one")
    prediction: str | None = Field(description="the answer's text; null for random weights")
    score: Share | None = Field(description="0 (wrong) to 1 (right); null for random weights")
    metric: str = Field(description="name of the score")
    answers: list[str] = Field(description="accepted answers")
    ttft_s: Elapsed | None = Field(
        description="seconds from prompt token ids on the device to the first new token id on the host; tokenisation "
        "and chat template outside, device synchronised at both ends; null for a method that only simulates pruning"
    )
    tpot_s: Seconds | None = Field(
        description="median seconds from one new token id on the host to the next, after the first; null below 2 tokens"
    )
    token_s: list[Seconds] | None = Field(description="seconds between consecutive new tokens; their median is tpot_s")
    parts_s: dict[str, Seconds] | None = Field(
        description="seconds of the parts of TTFT (project, score, select, gather, attention, feed forward, other), "
        "from device events; null unless asked for"
    )
    e2e_s: Elapsed | None = Field(
        description="seconds from prompt token ids on the device to the last new token id on the host"
    )
    energy_j: Joules | None = Field(
        default=None,
        description="joules of the whole device during the request, by its counter (measuring.energy); of requests "
        "that were decoded together, or came at a rate, an equal share of the joules of all of them; null on a CPU, "
        "where the device does not count or others computed on it, where that was too short for the counter's steps, "
        "and in older records",
    )
    peak_memory_bytes: Count | None = Field(
        description="highest memory during the request, weights included: the allocator's peak on CUDA, the process's "
        "highest resident set on a CPU; summed over devices that share the model; null where the platform cannot tell"
    )
    kv_bytes: Count | None = Field(
        description="bytes allocated on the device for keys and values when the request ended"
    )
    kv_bytes_host: Count | None = Field(description="bytes of keys and values parked in host memory")
    extra_bytes: Count | None = Field(
        description="bytes of the method's own stores on the device (Aux Cache, page bounds)"
    )
    ledger: dict[str, Any] | None = Field(
        description="memory by purpose, measured in a pass of its own (measuring.ledger.Ledger); null unless asked for"
    )
    prefill_flops: Operations | None = Field(
        description="floating-point operations of the prefill, for the rows it computed"
    )
    dense_flops: Operations | None = Field(description="the same with every prompt token in every layer")
    decode_read_bytes: Count | None = Field(
        description="weights, keys, values and method data that the first decode step has to read"
    )
    prefill_floor_s: Seconds | None = Field(
        description="prefill_flops over the device's measured matrix-product rate, or the time to read the weights "
        "once if that is longer: no prefill is much faster"
    )
    prefill_lasting_floor_s: Seconds | None = Field(
        default=None, description="the same at the rate that the device keeps up for a second of nothing but products"
    )
    decode_floor_s: Seconds | None = Field(
        description="decode_read_bytes over the device's measured copy rate: no decode step is much faster"
    )
    decode_bus_bytes: Count | None = Field(
        default=None,
        description="bytes of keys and values that a decode step brought over the host link, mean of the steps; not "
        "among those of decode_floor_s unless a kernel reads them where they lie; on a CPU, those a GPU would bring; "
        "null without decode steps and in older records",
    )
    decode_bus_floor_s: Seconds | None = Field(
        default=None,
        description="decode_bus_bytes over the measured rate of copies from pinned host memory: both links work side "
        "by side, so no step is faster than the longer of this and decode_floor_s; null where there is no such link, "
        "and in older records",
    )
    batch: Count | None = Field(
        default=None,
        description="requests that were decoded together, this one included: then tpot_s and token_s are of steps that "
        "all of them share, ttft_s is of this one's own prefill with nothing queued, e2e_s leaves the others' prefills "
        "out, and peak_memory_bytes and decode_* are the whole batch's; null where it was alone",
    )
    batch_tokens_per_s: Rate | None = Field(
        default=None, description="new tokens a second that the batch's decode steps brought, for all of its requests"
    )
    arrival: Arrival | None = Field(
        default=None,
        description="its way through the queue, where requests arrived at a rate: then ttft_s and e2e_s begin with its "
        "own prefill, and token_s, tpot_s and e2e_s hold what others' prefills took between its tokens; null where it "
        "was sent by itself or in a batch, and in older records",
    )
    device_state: dict[str, Any] | None = Field(
        description="clocks, temperature, power, throttle reasons and foreign processes of the GPU right after the "
        "request; its power at rest before the run, and the seconds of a step of its energy counter"
    )
    worker: dict[str, str | int | None] | None = Field(
        default=None,
        description="who answered: host (a hash), process, device, gpu_uuid, driver (measuring.provenance.worker); "
        "where several devices share the model, ranks is their number and gpu_uuid names all of them: then bytes, "
        "operations and joules are sums over them, floors the slowest one's, times the first one's; null in older "
        "records",
    )
    tokens_requested: list[Count] = Field(description="prompt tokens a layer that the method's options ask for")
    tokens_kept: Sequence[Count | MeanCount] = Field(
        min_length=1,
        description="prompt tokens a layer whose keys and values were there after the prefill, mean over KV heads",
    )
    tokens_recomputed: Count = Field(description="prompt tokens x layers computed during decode instead of the prefill")
    redo: Count | None = Field(
        default=None,
        description="how often requests of its run had been asked again for a change of code (`--redo`) when it was "
        "made, so that times of different numbers are no pair; null where none had been",
    )
    extra: dict[str, Any] = Field(default_factory=dict, description="the task's own facts (depth, length, classes)")

    @field_validator("extra")
    @classmethod
    def _readable(cls, extra: dict[str, Any]) -> dict[str, Any]:
        for name, value in extra.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name} is {value}")
        Facts.model_validate(extra)
        return extra

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not 0 < self.context_tokens <= self.prompt_tokens:
            raise ValueError("context_tokens are none, or exceed prompt_tokens")
        if len(self.tokens_requested) != len(self.tokens_kept):
            raise ValueError("tokens_requested and tokens_kept have another number of layers")
        if max(self.tokens_kept) > self.prompt_tokens:
            raise ValueError("tokens_kept exceed prompt_tokens")
        return self

    @property
    def failed(self) -> bool:
        """Whether the method, or the task's score, failed in it; it is asked again when the run goes on."""
        return FAILED in self.extra or NOT_SCORED in self.extra

    @property
    def tpot_mean_s(self) -> float:
        """Mean seconds per token after the first, as vLLM's `bench serve` has it; NaN below two tokens."""
        if self.ttft_s is None or self.e2e_s is None or self.new_tokens < 2 or self.e2e_s <= self.ttft_s:
            return math.nan
        return (self.e2e_s - self.ttft_s) / (self.new_tokens - 1)

    @property
    def energy_per_token_j(self) -> float:
        """Joules of the request, its prefill included, for each new token; NaN where it has none."""
        return math.nan if self.energy_j is None or not self.new_tokens else self.energy_j / self.new_tokens

    @property
    def kept_fraction(self) -> float:
        """Share of context tokens x layers whose keys and values were kept; NaN for a request without an answer."""
        if FAILED in self.extra or OUT_OF_MEMORY in self.extra:
            return math.nan
        return sum(self.tokens_kept) / (self.context_tokens * len(self.tokens_kept))
