"""Questions over many documents, of which one or two hold the answer.

Wordings and settings are RULER's (NVIDIA/RULER, `synthetic/qa.py`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from tasks.ruler.corpora import Corpus, HotpotQA, Squad, find_corpus, read_corpus
from tasks.ruler.draft import Ask, Draft, Maker

ORDER = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
OPENING = f"{ORDER}\n\nThe following are given documents.\n\n"
ENDING = f"\n\n{ORDER}\n\nQuestion: {{question}}"
PREFIX = " Answer:"


@dataclass(frozen=True)
class Questions(Maker):
    """The data set's questions in order; its size counts documents.

    Attributes:
        layout: of the data set's file.
    """

    new_tokens = 32
    metric = "string_match_part"

    layout: type[Squad] | type[HotpotQA]

    def draft(self, ask: Ask, size: int, rng: random.Random) -> Draft:
        """The question's own documents, then near ones, then any, shuffled; never fewer than its own."""
        corpus = self._corpus(ask.folder)
        asked = corpus.questions[ask.number]
        chosen = [*asked.own, *rng.sample(asked.near, min(len(asked.near), max(0, size - len(asked.own))))]
        if size > len(chosen):
            others = sorted(set(range(len(corpus.documents))) - set(chosen))
            chosen += rng.sample(others, min(len(others), size - len(chosen)))
        rng.shuffle(chosen)
        documents = [f"Document {number}:\n{corpus.documents[one]}" for number, one in enumerate(chosen, 1)]
        ending = ENDING.format(question=asked.text)
        return Draft(OPENING + "\n\n".join(documents) + ending, ending, PREFIX, asked.answers)

    def sizes(self, folder: Path | None) -> range:
        """Up to all documents."""
        return range(1, len(self._corpus(folder).documents) + 1)

    def samples(self, folder: Path | None) -> int:
        """One a question, at most 500."""
        return min(super().samples(folder), len(self._corpus(folder).questions))

    def fingerprint(self, folder: Path | None) -> str:
        """Of the file; raises where it is missing or bad."""
        return self._corpus(folder).digest

    def _corpus(self, folder: Path | None) -> Corpus:
        return read_corpus(self.layout, find_corpus(self.layout, folder))
