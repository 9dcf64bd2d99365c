"""Several requests over one cache: what a session says equals what the whole conversation, read at once, would say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.engine.engine import Engine
from harness.engine.method import Method
from harness.engine.request import Request
from harness.engine.session import Session
from harness.errors import InputError
from tests.engine.test_replay import attention_alone
from tests.methods.test_references import Options, text
from tests.reference.eviction import (
    AdaOptions,
    AdaTwin,
    BudgetOptions,
    H2ODropTwin,
    H2OOptions,
    KnormTwin,
    SnapOptions,
    SnapTwin,
    TovaTwin,
)
from tests.reference.model import Twin
from tests.reference.quest import QuestOptions, QuestTwin
from tests.reference.streaming import StreamingOptions, StreamingTwin
from tests.tiny import FAMILIES, build, random_ids, tiny_engine, tiny_model

pytestmark = pytest.mark.slow

LAYERS, CONTEXT, NEW = 4, 64, (4, 4, 5)
QUESTIONS = random_ids(21).view(3, 7)


def asked(first: Tensor, stop_ids: frozenset[int], after: bool) -> list[Request]:
    """A context with its question, and two more questions."""
    follows = sum(NEW[1:]) + QUESTIONS[1:].numel()
    prompts = [torch.cat((first, QUESTIONS[0])), *QUESTIONS[1:]]
    requests = [Request(ids, new, stop_ids) for ids, new in zip(prompts, NEW, strict=True)]
    return [replace(requests[0], question=7, question_after=after, follows=follows), *requests[1:]]


def answers(engine: Engine, method: Method, requests: list[Request], most: int = 99) -> list[list[int]]:
    """What the method says in each turn; whoever listens goes on to the next after `most` tokens."""
    session, said = Session(engine, method), []
    for request in requests:
        stream = session.stream(replace(request, prompt=request.prompt.to(engine.embed.weight.device)))
        said.append([next(stream)])
        while len(said[-1]) < most and (token := next(stream, None)) is not None:
            said[-1].append(token)
    return said


def conversation(requests: list[Request], said: list[list[int]], ends: frozenset[int]) -> tuple[Tensor, list[int]]:
    """All of a conversation in one row, without end tokens, and where in it each answer begins."""
    ids, starts = [], []
    for request, answer in zip(requests, said, strict=True):
        ids += request.prompt.tolist()
        starts.append(len(ids))
        ids += answer[:-1] if answer[-1] in ends else answer
    return torch.tensor(ids), starts


def greedy(model: Any, ids: Tensor, count: int) -> list[int]:
    """The stock model's next tokens, each from a pass over everything before it."""
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat((ids, model(ids[None]).logits[0, -1].argmax()[None]))
    return [int(token) for token in ids[-count:]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("after", [True, False])
def test_full_attention_says_what_the_stock_model_says_to_the_whole_conversation(family: str, after: bool) -> None:
    engine, model, free = tiny_engine(family), tiny_model(family), asked(random_ids(CONTEXT), frozenset(), after)
    plain = answers(engine, build("full", engine), free)
    # The second answer now ends early, by a token that does not stay in the conversation.
    ends = frozenset({plain[1][2]}) - {*plain[0], *plain[1][:2]}
    for stops, most in ((frozenset[int](), 99), (ends, 99), (ends, 3)):
        requests = asked(random_ids(CONTEXT), stops, after)
        said = answers(engine, build("full", engine), requests, most)
        whole, starts = conversation(requests, said, stops)
        assert said == [greedy(model, whole[:start], len(answer)) for start, answer in zip(starts, said, strict=True)]
        assert not stops or len(said[1]) == 3


RECORDED = [
    "full", "slim:layers=1/3:budgets=40/24:block=8", "slim:layers=1/3:budgets=40/24:block=8:gamma=1.0",
    "lazyllm:layers=1/3:keep=40/20", "lazyllm:layers=1/3:keep=0.5/0.3", "streaming:window=32",
    "streaming:mode=evict:window=32", "streaming:window=60", "quest:budget=32:page=4", "quest:budget=90:page=16",
    "tova:budget=20", "tova:budget=75", "h2o:mode=drop:budget=20:window=4", "adakv:budget=24:window=4:kernel=3",
    "duo:sinks=3:recent=10", "kvzip:budget=24", "retrieval:sinks=4:recent=16:topk=10", "gemfilter:budget=40",
]  # fmt: skip
"""Decode steps of every kind, with what they leave behind for steps that are launched anew."""


@pytest.mark.parametrize("name", RECORDED)
def test_replayed_answers_leave_to_the_next_turn_what_others_do(name: str) -> None:
    stock, replayed = attention_alone(LAYERS, prefill=True)
    # Answers that are left early have begun a step in vain.
    for most, after in ((99, True), (3, False)):
        requests = asked(random_ids(CONTEXT), frozenset(), after)
        expected, method = build(name, stock), build(name, replayed)
        assert answers(replayed, method, requests, most) == answers(stock, expected, requests, most)
        for ours, theirs in zip(method.cache, expected.cache, strict=True):
            held = [sorted(head.tolist()) for head in ours.kept_positions()]
            assert held == [sorted(head.tolist()) for head in theirs.kept_positions()]
        assert method.tokens_recomputed() == expected.tokens_recomputed()


def test_revived_tokens_wait_again_where_they_were_left() -> None:
    """Behind replayed steps the Aux Caches hold each token once, before the first layers that have no keys of it."""
    _, engine = attention_alone(LAYERS)
    method: Any = build("lazyllm:layers=1/3:keep=40/20", engine)
    answers(engine, method, asked(random_ids(CONTEXT), frozenset(), False), 3)
    method._revival.settle()
    waiting = [set(method.aux[layer].positions.tolist()) for layer in (1, 3)]
    below, first, second = (set(method.cache[layer].token_positions.tolist()) for layer in (0, 1, 3))
    assert waiting == [below - first, first - second] and any(waiting)


TWINS: list[tuple[str, Options, Callable[..., Twin], Callable[..., Any]]] = [
    ("streaming", {"sinks": 4, "window": 24}, StreamingTwin, StreamingOptions),
    ("streaming", {"mode": "evict", "window": 24}, StreamingTwin, StreamingOptions),
    ("streaming", {"mode": "slide", "window": 24}, StreamingTwin, StreamingOptions),
    ("quest", {"budget": 24, "page": 4, "dense_layers": 1}, QuestTwin, QuestOptions),
    ("knorm", {"budget": 20}, KnormTwin, BudgetOptions),
    ("snapkv", {"budget": 20, "window": 4, "kernel": 3}, SnapTwin, SnapOptions),
    ("adakv", {"budget": 20, "window": 4, "kernel": 3}, AdaTwin, AdaOptions),
    ("tova", {"budget": 20}, TovaTwin, BudgetOptions),
    ("h2o", {"mode": "drop", "budget": 20, "window": 4}, H2ODropTwin, H2OOptions),
]


@pytest.mark.parametrize(("name", "options", "twin", "of_twin"), TWINS, ids=[text(*each[:2]) for each in TWINS])
@pytest.mark.parametrize("after", [True, False])
def test_the_context_is_pruned_once_and_every_turn_reads_what_is_left(
    name: str, options: Options, twin: Callable[..., Twin], of_twin: Callable[..., Any], after: bool
) -> None:
    """The twin prunes the prompt once and reads the rest of the conversation token by token."""
    engine, requests = tiny_engine(), asked(random_ids(CONTEXT), frozenset(), after)
    method = build(text(name, options), engine)
    said = answers(engine, method, requests)
    whole, starts = conversation(requests, said, frozenset())
    prompt = CONTEXT if after else CONTEXT + 7
    found = twin(tiny_model(), prompt, len(whole), of_twin(**options)).run(whole)
    for start, answer in zip(starts, said, strict=True):
        rows = found.logits[start - prompt : start - prompt + len(answer)]
        assert [int(row.argmax()) for row in rows] == answer
    last = [set(head.tolist()) for cache in method.cache for head in cache.kept_positions()]
    assert set.union(*last) <= set(range(len(whole) - 1))


def test_a_turn_brings_no_more_than_was_spoken_of() -> None:
    engine = tiny_engine()
    first, second, third = asked(random_ids(CONTEXT), frozenset(), True)
    session = Session(engine, build("full", engine))
    list(session.stream(replace(first, follows=first.follows - 1)))
    list(session.stream(second))
    with pytest.raises(ValueError, match="more tokens than"):
        session.stream(third)


def test_all_turns_count_against_a_sliding_window(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, (first, *_) = tiny_engine(), asked(random_ids(CONTEXT), frozenset(), True)
    monkeypatch.setattr(engine, "window", 80)
    with pytest.raises(InputError, match="98 tokens"):
        next(Session(engine, build("full", engine)).stream(first))
