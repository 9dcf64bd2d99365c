"""Numbered passages of speeches to find a sentence in, and passages that repeat to be counted."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, ClassVar

from pydantic import Field

from harness.errors import InputError
from tasks.base import Sample, Tokenizer
from tasks.common.haystack import Draft, Span, sentences, speech_ids
from tasks.retrieval.suite import DeepSuite, Seeds, Suite, first_number

LONGEST_EXCERPT = 64
"""Tokens of a sentence that passage-retrieval asks about, at most."""


class PassageRetrieval(DeepSuite):
    """Speech in numbered passages; one of its sentences is quoted at the end: which passage holds it?"""

    member: ClassVar[str] = "passage-retrieval"
    summary: ClassVar[str] = "which numbered passage of presidential speeches holds this sentence; first number"
    metric = "exact_match"

    class Options(DeepSuite.Options):
        """How long a passage is."""

        passage: Annotated[int, Field(ge=32)] = Field(128, description="tokens of a passage, about")

    options: Options

    def draft(self, tokenizer: Tokenizer, target: int, depth: float, seeds: Seeds) -> Draft:
        """The passage at the depth is asked for; its number and the sentence are what an answer needs."""
        number = max(2, target // self.options.passage)
        labels = len(tokenizer.encode("".join(label(n) + "\n\n" for n in range(number))))
        frame = len(tokenizer.encode(question(""), add_special_tokens=False))
        ids = speech_ids(tokenizer, target - labels - frame, seeds.text)
        certain = tokenizer.decode(ids[:-LONGEST_EXCERPT], skip_special_tokens=True)
        excerpt = _excerpt(tokenizer, certain, depth)
        quoted = len(tokenizer.encode(excerpt, add_special_tokens=False))
        passages = _split(sentences(tokenizer.decode(ids[:-quoted], skip_special_tokens=True)), number)
        return _numbered(passages, excerpt)

    def answer_tokens(self) -> int:
        """One number."""
        return 8

    def score(self, sample: Sample, prediction: str) -> float:
        """1 if the first number of the answer is the passage's."""
        return float(first_number(prediction) in sample.answers)


def label(index: int) -> str:
    """What stands before passage `index`, counted from 0."""
    return f"Passage {index + 1}: "


def question(excerpt: str) -> str:
    """The end of the prompt."""
    return f'\n\nThe sentence "{excerpt}" is in Passage'


def _excerpt(tokenizer: Tokenizer, text: str, depth: float) -> str:
    """The sentence nearest to the depth that occurs once, has eight words or more and is short enough.

    Raises:
        InputError: there is none.
    """
    parts = sentences(text)[:-1]  # the last one is cut
    starts = [0, *accumulate(len(part) + 1 for part in parts)]
    for index in sorted(range(len(parts)), key=lambda index: abs(starts[index] - depth * len(text))):
        part = parts[index]
        plain = len(part.split()) >= 8 and '"' not in part and text.count(part) == 1
        if plain and len(tokenizer.encode(part, add_special_tokens=False)) <= LONGEST_EXCERPT:
            return part
    raise InputError("the requested length leaves no sentence to ask for; ask for more")


def _split(parts: Sequence[str], number: int) -> list[str]:
    """Consecutive sentences in at most `number` passages of about the same length."""
    ends = list(accumulate(len(part) + 1 for part in parts))
    passages: dict[int, list[str]] = {}
    for end, part in zip(ends, parts, strict=True):
        passages.setdefault((end - len(part) // 2) * number // (ends[-1] + 1), []).append(part)
    return [" ".join(passage) for passage in passages.values()]


def _numbered(passages: Sequence[str], excerpt: str) -> Draft:
    """The prompt; raises no error: the excerpt is in one of the passages."""
    index = next(index for index, passage in enumerate(passages) if excerpt in passage)
    texts = [label(n) + passage for n, passage in enumerate(passages)]
    start = sum(len(text) + 2 for text in texts[:index])
    inside = start + texts[index].index(excerpt)
    places = [(start, start + len(label(index).rstrip())), (inside, inside + len(excerpt))]
    facts = {"passages": len(passages)}
    return Draft("\n\n".join(texts) + question(excerpt), question(excerpt), (str(index + 1),), places, facts)


class PassageCount(Suite):
    """Passages of which some are there twice or more: how many different ones are there?

    The depth is null: an answer needs all of them. `needles` holds the first words of each passage.
    """

    member: ClassVar[str] = "passage-count"
    summary: ClassVar[str] = "how many different passages there are among repeated ones; first number"
    metric = "exact_match"

    class Options(Suite.Options):
        """How many passages there are."""

        passages: Annotated[int, Field(ge=3, le=100)] = Field(8, description="passages, repeated ones counted")

    options: Options

    def draft(self, tokenizer: Tokenizer, target: int, depth: float, seeds: Seeds) -> Draft:
        """Passages of equal length in random order; one that is there once takes up what is left of the length."""
        total, rng = self.options.passages, seeds.rng()
        distinct = rng.randint(total // 2 + 1, total)
        ending = f"\n\nOf these {total} passages some are repeated. The number of different passages is"
        room = target - len(tokenizer.encode(ending)) - total * len(_ids(tokenizer, "Passage: \n\n"))
        size, left = divmod(room, total)
        ids = speech_ids(tokenizer, size * distinct + left, seeds.text)
        starts = [0, *range(size + left, len(ids), size)]
        chunks = [ids[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]
        texts = [tokenizer.decode(chunk, skip_special_tokens=True).strip() for chunk in chunks]
        copies = texts + [rng.choice(texts[1:]) for _ in range(total - distinct)]
        rng.shuffle(copies)
        return _counted(copies, ending, distinct)

    def answer_tokens(self) -> int:
        """One number."""
        return 8

    def score(self, sample: Sample, prediction: str) -> float:
        """1 if the first number of the answer is the number of different passages."""
        return float(first_number(prediction) in sample.answers)


def _counted(passages: Sequence[str], ending: str, distinct: int) -> Draft:
    texts = [f"Passage: {passage}" for passage in passages]
    starts = accumulate((len(text) + 2 for text in texts), initial=0)
    places = [_first_words(start + len("Passage: "), text) for start, text in zip(starts, passages, strict=False)]
    return Draft("\n\n".join(texts) + ending, ending, (str(distinct),), places, {"passages": len(passages)})


def _first_words(start: int, text: str) -> Span:
    return start, start + len(" ".join(text.split(" ")[:8]).rstrip())


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)
