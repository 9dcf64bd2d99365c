"""Texts that end an answer, however the tokenizer writes them."""

from __future__ import annotations

from typing import Any

import pytest

from harness.conformance.tiny import random_ids, tiny_engine
from harness.engine.request import Request
from harness.measuring.clock import measure
from harness.runner.stops import StopTexts
from tests.tiny import build, generate


@pytest.mark.parametrize(
    ("stop", "text", "upto"),
    [
        ("\n\nQ: the", "One two.\n\nQ: the rest", "One two.\n\nQ: the"),  # several tokens
        ("\n", "One two.\nThree", "One two.\n"),
        (".", "One two...three", "One two..."),  # a part of one token
        ("four", "One two", "One two"),
    ],
)
def test_an_answer_ends_once_the_text_is_there(tokenizer: Any, stop: str, text: str, upto: str) -> None:
    ids, ended, out = tokenizer.encode(text), StopTexts([stop], tokenizer), []
    for token in ids:
        out.append(token)
        if ended(out):
            break
    assert tokenizer.decode(out) == upto


def test_no_answer_ends_before_its_least_tokens(tokenizer: Any) -> None:
    ids = tokenizer.encode("a\nb\nc\nd")
    ended = [StopTexts(["\n"], tokenizer, 5)(ids[:count]) for count in range(1, len(ids) + 1)]
    assert ended == [count >= 5 for count in range(1, len(ids) + 1)]


@pytest.mark.parametrize("text", ["full", "slim:layers=2/3/4:block=8"])
def test_generation_ends_there(text: str) -> None:
    engine, ids = tiny_engine(), random_ids(120)
    tokens = generate(text, engine, ids, 8)
    method = build(text, engine)
    measured = measure(engine, method, Request(ids, 8), ended=lambda out: len(out) == 3)
    assert measured.tokens == tokens[:3] and len(measured.token_s) == 2
