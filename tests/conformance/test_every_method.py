"""Every registered method, by default and with options worth a look of their own, keeps every promise."""

from __future__ import annotations

from functools import lru_cache

import pytest

from harness.conformance.kit import CHECKS, DECODING, Subject, run_check
from harness.conformance.tiny import MODELS
from harness.runner.catalog import METHODS, parse_methods

VARIANTS = [
    "slim:budgets=128/200:layers=2/4",
    "slim:reselect=A:ff=all:score=absdot:block=16:unit=4",
    "lazyllm:keep=0.5/20:layers=1/5:of=survivors",
    "lazyllm:revive=false",
    "streaming:window=64",
    "streaming:mode=evict:window=64:sinks=0",
    "ashape:sinks=4:window=64",
    "trishape:sinks=4:window=64:last=30",
    "minference:vertical=40:slash=60",
    "flexprefill:gamma=0.5:min_budget=128",
    "xattention:stride=8:tau=0.5",
    "xattention:tau=0.7:rule=upstream",
    "slim+xattention:tau=0.5",
    "lazyllm+ashape:sinks=4:window=64",
    "adakv:budget=64+minference:vertical=40:slash=60",
    "quest:budget=64:per=kv_head",
    "quest:budget=0.1:question=decode:question_tokens=6:page=7:dense_layers=0",
    "quest:budget=64:offload=host",
    "h2o:mode=drop:budget=64:window=16",
    "tova:budget=64",
    "keydiff:budget=64:block=48",
    "criticalkv:base=expected",
    "fastkv:budget=64:keep=100:cut=1",
    "duo:sinks=4:recent=20:sparsity=0.75",
    "kvzip:budget=64:chunk=100",
    "kvzip:budget=64:chunk=100:plus=true",
    "lychee:budget=64:retrieval=0.4",
    "lychee:budget=0.2:vote=max",
    "retrieval:sinks=4:recent=16:topk=20",
    "retrieval:sinks=4:recent=16:topk=20:index=flat",
    "retrieval:sinks=4:recent=16:topk=20:index=ivf:nlist=8:nprobe=3",
    "retrieval:sinks=4:recent=16:topk=20:index=hnsw:m=4:ef=24",
]
EVERY = METHODS.names() + VARIANTS
QUICK = {"full", "slim", "lazyllm", "snapkv", "quest", "streaming", "minference"}
"""One of each kind: the others wait for the whole suite."""
SHORTER = 450
"""Tokens of the longest prompt of a variant: its budgets bite there."""


@lru_cache(1)  # what all methods left behind would be gone through at each collection of garbage
def subject(text: str) -> Subject:
    """A method by default meets every family and every layout of heads, its options one model; in turns another one."""
    (spec,) = parse_methods(text)
    known = () if text in VARIANTS else DECODING
    turns = DECODING if text in VARIANTS else [model for model in MODELS if model not in DECODING]
    models = [*known, turns[EVERY.index(text) % len(turns)]]
    return Subject(spec, models=models, long=SHORTER) if text in VARIANTS else Subject(spec, models=models)


# The lower decorator is the outer loop: all checks of one method follow each other and share its requests.
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    "text", [pytest.param(each, marks=[] if each in QUICK else pytest.mark.slow) for each in EVERY]
)
def test_the_method_passes(text: str, check: str) -> None:
    finding = run_check(check, subject(text))
    assert finding.status != "fail", finding.detail
