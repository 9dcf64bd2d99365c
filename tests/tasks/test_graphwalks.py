"""GraphWalks: graphs, walks, lengths and the score."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from harness.errors import InputError
from harness.runner.catalog import build_tasks
from tasks.base import Sample, Task, TaskContext
from tasks.graphwalks import final_answer, node, parents, random_edges, search, set_f1

EDGES = [("uvwx", "alke"), ("abcd", "uvwx"), ("abcd", "efgh"), ("efgh", "uvwx"), ("efgh", "efgh")]


def task(text: str, limit: int = 3) -> Task:
    (one,) = build_tasks(f"graphwalks/{text}", TaskContext(limit=limit))
    return one


def edges(sample: Sample) -> list[tuple[str, ...]]:
    """The edges of the graph to operate on, read from the prompt."""
    graph = sample.prompt.removesuffix(sample.question).rpartition("following edges:\n")[2]
    return [tuple(line.split(" -> ")) for line in graph.splitlines()]


def test_the_prompts_own_examples_are_right() -> None:
    assert search(EDGES, "abcd", 1).nodes == {"uvwx", "efgh"} and search(EDGES, "alke", 1).nodes == set()
    assert parents(EDGES, "uvwx").nodes == {"abcd", "efgh"} and parents(EDGES, "abcd").nodes == set()


def test_a_search_leaves_out_what_it_saw_before_and_parents_the_node_itself() -> None:
    assert search(EDGES, "abcd", 2).nodes == {"alke"} and search(EDGES, "abcd", 3).nodes == set()
    assert parents(EDGES, "efgh").nodes == {"abcd"}
    assert sorted(search(EDGES, "abcd", 2).used) == [0, 1, 2, 3, 4] and parents(EDGES, "uvwx").used == [1, 3]


def test_nodes_are_named_as_in_the_data_set() -> None:
    assert [node(0), node(1), node(10)] == ["cfcd208495", "c4ca4238a0", "d3d9446802"]
    drawn = random_edges(11, 3, random.Random(0))
    assert Counter(source for source, _ in drawn) == {node(0): 3, node(1): 3, node(2): 3, node(3): 2}
    assert {end for _, end in drawn} <= {node(number) for number in range(4)}


@pytest.mark.parametrize(("member", "length"), [("bfs", 2048), ("parents", 2048), ("bfs", 8000)])
def test_lengths_are_exact_and_answers_those_of_the_graph(tokenizer: Any, member: str, length: int) -> None:
    for sample in task(f"{member}:lengths={length}:hops=3").samples(tokenizer):
        assert abs(len(tokenizer.encode(sample.prompt)) - length) <= length / 100
        start = sample.question.partition("node ")[2][:10]
        graph: Any = edges(sample)
        walk = search(graph, start, 3) if member == "bfs" else parents(graph, start)
        assert set(sample.answers) == walk.nodes and sample.chat
        ids = tokenizer.encode(sample.prompt)
        found = [tokenizer.decode(ids[first:end]).strip() for first, end in sample.extra["needles"]]
        assert found == [" -> ".join(graph[number]) for number in sorted(walk.used)]
        assert task(member).score(sample, f"Final Answer: [{', '.join(sample.answers)}]") == 1


def test_long_answers_get_the_room_they_need(tokenizer: Any) -> None:
    sample = next(iter(task("bfs:lengths=16384:hops=6:degree=2").samples(tokenizer)))
    assert len(sample.answers) > 30
    assert sample.max_new_tokens == len(tokenizer.encode(f"Final Answer: [{', '.join(sample.answers)}]")) + 64


def test_samples_are_seeded_and_the_group_is_both(tokenizer: Any) -> None:
    first = list(task("bfs:lengths=2048").samples(tokenizer))
    assert first == list(task("bfs:lengths=2048").samples(tokenizer)) and first[0].prompt != first[1].prompt
    labels = [one.label for one in build_tasks("graphwalks:lengths=2048/4096", TaskContext())]
    assert labels == [f"graphwalks/{name}:lengths={length}" for name in ("bfs", "parents") for length in (2048, 4096)]
    with pytest.raises(InputError, match="did you mean 'bfs'"):
        build_tasks("graphwalks/bsf", TaskContext())


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("thinking [x]\nFinal Answer: [a, b]\n", {"a", "b"}),
        ("Final Answer: ['a',\"b\"]", {"a", "b"}),
        ("Final Answer: []", set()),
        ("Final Answer: [a]\nThat is all.", None),
        ("a, b", None),
        ("", None),
    ],
)
def test_the_answer_is_in_the_last_line(answer: str, found: set[str] | None) -> None:
    assert final_answer(answer) == found


def test_the_score_is_f1_over_sets() -> None:
    assert set_f1({"a", "b"}, {"a", "c", "d"}) == pytest.approx(0.4)
    assert set_f1(set(), set()) == 1 and set_f1({"a"}, set()) == set_f1(set(), {"a"}) == 0
    empty = Sample("1", "", (), 1)
    assert task("bfs").score(empty, "Final Answer: []") == 1 and task("bfs").score(empty, "none") == 0
