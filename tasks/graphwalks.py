"""GraphWalks: a list of directed edges, and one walk to take on it: `--tasks graphwalks/bfs:hops=3`.

Prompt, node names and scoring follow OpenAI's data set (openai/graphwalks, MIT), whose graphs are larger and whose own
rows are not read: each node has `degree` edges to random nodes, itself included, and is named after the MD5 of its
number. A search returns the nodes at exactly that depth, as the data set does since its correction of February 2026.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Sequence, Set
from functools import partial
from itertools import islice, product
from typing import Annotated, ClassVar, NamedTuple

from pydantic import Field

from harness.errors import unknown
from harness.grammar import Item, parse_item
from harness.options import OptionSet
from tasks.base import DataNote, Sample, Task, TaskContext, Tokenizer
from tasks.common.haystack import Draft, fit

OPENING = """\
You will be given a graph as a list of directed edges. All nodes are at least degree 1. \
You will also get a description of an operation to perform on the graph.
Your job is to execute the operation on the graph and return the set of nodes that the operation results in. \
If asked for a breadth-first search (BFS), only return the nodes at exactly that depth, \
do not return the starting node. \
If asked for the parents of a node, only return the nodes that have an edge leading to the given node, \
do not return the given node itself.

Here is an example:
<begin example>

The graph has the following edges:
uvwx -> alke
abcd -> uvwx
abcd -> efgh
efgh -> uvwx

Example 1:
Operation:
Perform a BFS from node abcd with depth 1.
Final Answer: [uvwx, efgh]

Example 2:
Operation:
Perform a BFS from node alke with depth 1.
Final Answer: []

Example 3:
Operation:
Find the parents of node uvwx.
Final Answer: [abcd, efgh]

Example 4:
Operation:
Find the parents of node abcd.
Final Answer: []

<end example>
Here is the graph to operate on:
The graph has the following edges:
"""
ENDING = """\

Operation:
{operation}

You should immediately return the set of nodes that the operation results in, with no additional text. \
Return your final answer as a list of nodes in the very last line of your response. \
For example, if the operation returns the set of nodes [node1, node2, node3], your response should be:
Final Answer: [node1, node2, node3]
If the operation returns the empty set, your response should be:
Final Answer: []
"""
OPERATIONS = {"bfs": "Perform a BFS from node {node} with depth {hops}.", "parents": "Find the parents of node {node}."}

Edge = tuple[str, str]
Count = Annotated[int, Field(ge=1)]
MOST_SPANS = 256


class Walk(NamedTuple):
    """What an operation finds.

    Attributes:
        nodes: its result.
        used: numbers of the edges it follows.
    """

    nodes: Set[str]
    used: Sequence[int]


class GraphWalks(Task):
    """One of the two operations; the group is both.

    Attributes:
        operation: "bfs" or "parents".
    """

    name: ClassVar[str] = "graphwalks"
    summary: ClassVar[str] = "a generated list of edges; breadth-first search, or the parents of a node"
    metric = "set_f1"
    data: ClassVar[DataNote] = DataNote(languages="none (English prompt)", licence="MIT (openai/graphwalks's prompt)")

    class Options(OptionSet):
        """The graph and the walk."""

        lengths: tuple[Annotated[int, Field(ge=2048)], ...] = Field((4096,), description="prompt lengths in tokens")
        degree: Count = Field(2, description="edges that leave each node")
        hops: Count = Field(2, description="depth of the search; answers grow as degree^hops")
        repeats: Count = Field(20, description="samples of each length")
        new_tokens: Count | None = Field(None, description="tokens to generate at most; the answer's and 64 more")

    options: Options

    def __init__(self, label: str, options: OptionSet, context: TaskContext) -> None:
        """One task; raises `InputError` where there is no such operation."""
        super().__init__(label, options, context)
        self.operation = parse_item(label).member or ""
        if self.operation not in OPERATIONS:
            raise unknown("member of graphwalks", self.operation, OPERATIONS)

    @classmethod
    def expand(cls, item: Item, context: TaskContext) -> Sequence[Task]:
        """One operation or both; one task a length."""
        names = list(OPERATIONS) if item.member is None else [item.member]
        parts = [part for name in names for part in cls.by_length(item._replace(member=name))]
        return [cls(str(part), cls.Options.read("task graphwalks", part.options), context) for part in parts]

    @classmethod
    def members(cls, context: TaskContext) -> list[str]:
        """The operations."""
        return list(OPERATIONS)

    def longest_prompt(self) -> int:
        """The longest of the lengths asked for."""
        return max(self.options.lengths)

    def count(self) -> int:
        """The repeats of each length."""
        return len(self.options.lengths) * self.options.repeats

    def samples(self, tokenizer: Tokenizer) -> Iterator[Sample]:
        """Graphs of their own; lengths are those of the prompt without the chat template."""
        grid = product(range(self.options.repeats), self.options.lengths)
        for repeat, length in islice(grid, self.context.limit):
            made = fit(tokenizer, length, partial(self._draft, tokenizer, f"{self.context.seed} {length} {repeat}"))
            answer = f"Final Answer: [{', '.join(made.draft.answers)}]"
            yield Sample(
                id=f"{length}-{repeat}",
                prompt=made.text,
                answers=made.draft.answers,
                max_new_tokens=self.options.new_tokens or len(tokenizer.encode(answer)) + 64,
                chat=True,
                question=made.draft.ending,
                extra={"length": length, "needles": [list(span) for span in made.spans], **made.draft.facts},
            )

    def score(self, sample: Sample, prediction: str) -> float:
        """F1 between the sets of nodes, see `set_f1`."""
        found = final_answer(prediction)
        return 0.0 if found is None else set_f1(found, set(sample.answers))

    def _draft(self, tokenizer: Tokenizer, seed: str, target: int) -> Draft:
        """As many edges as the target has room for; the last node may lack some of its."""
        rng = random.Random(seed)
        room = target - len(tokenizer.encode(OPENING + ENDING))
        count = max(2, round(room / _tokens_an_edge(tokenizer)))
        edges = random_edges(count, self.options.degree, rng)
        start = rng.choice(edges)[1]
        walk = search(edges, start, self.options.hops) if self.operation == "bfs" else parents(edges, start)
        lines = [f"{source} -> {end}\n" for source, end in edges]
        ending = ENDING.format(operation=OPERATIONS[self.operation].format(node=start, hops=self.options.hops))
        facts = {"nodes": len({source for source, _ in edges}), "edges": count}
        return Draft(OPENING + "".join(lines) + ending, ending, tuple(sorted(walk.nodes)), _spans(lines, walk), facts)


# --- graphs ---------------------------------------------------------------------------------------------------------


def node(number: int) -> str:
    """Ten hex digits."""
    return hashlib.md5(str(number).encode(), usedforsecurity=False).hexdigest()[:10]


def random_edges(count: int, degree: int, rng: random.Random) -> list[Edge]:
    """`count` edges in the order of the nodes they leave, `degree` from each node but the last."""
    nodes = [node(number) for number in range(-(-count // degree))]
    return [(nodes[number // degree], rng.choice(nodes)) for number in range(count)]


def search(edges: Sequence[Edge], start: str, hops: int) -> Walk:
    """The nodes whose shortest path from `start` has `hops` edges."""
    seen, front, used = {start}, {start}, []
    for _ in range(hops):
        step = [number for number, (source, _) in enumerate(edges) if source in front]
        used += step
        front = {edges[number][1] for number in step} - seen
        seen |= front
    return Walk(front, used)


def parents(edges: Sequence[Edge], child: str) -> Walk:
    """The nodes with an edge to `child`, itself left out."""
    used = [number for number, (source, end) in enumerate(edges) if end == child and source != child]
    return Walk({edges[number][0] for number in used}, used)


def _spans(lines: Sequence[str], walk: Walk) -> list[tuple[int, int]]:
    """Characters of the edges that a walk follows, at most `MOST_SPANS` of them; all lines are equally long."""
    width = len(lines[0])
    starts = (len(OPENING) + number * width for number in sorted(walk.used)[:MOST_SPANS])
    return [(start, start + width - 1) for start in starts]


def _tokens_an_edge(tokenizer: Tokenizer) -> float:
    text = "".join(f"{node(number)} -> {node(7 * number)}\n" for number in range(200))
    return len(tokenizer.encode(text, add_special_tokens=False)) / 200


# --- score ----------------------------------------------------------------------------------------------------------


def final_answer(prediction: str) -> set[str] | None:
    """The nodes listed in the last line behind "Final Answer:"; None where it has no such list."""
    last = prediction.rstrip("\n").rpartition("\n")[2]
    found = re.search(r"Final Answer:\s*\[(.*)\]", last)
    return None if found is None else {entry.strip().strip("'\"") for entry in found[1].split(",") if entry.strip()}


def set_f1(found: Set[str], wanted: Set[str]) -> float:
    """2 |found and wanted| / (|found| + |wanted|); 1 where both are empty."""
    return 2 * len(found & wanted) / (len(found) + len(wanted)) if found or wanted else 1.0
