"""LongBench's scorers, quirks included (THUDM/LongBench, `metrics.py` and `eval.py`).

A score is only comparable with published ones if it is wrong in the same places. What looks odd here is official:
retrieval and counting punish every extra number, classification skips a class while it filters, code similarity takes
the first line without a comment sign even if that line is empty.

Every scorer takes (prediction, answer) and returns 0 to 1; `score_prediction` takes the best over the answers.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from harness.errors import InputError, MissingPackage, unknown
from tasks.common.records import read_object
from tasks.longbench.prompts import E_MEMBERS, MEMBERS, base_name

Fuzz = Literal["difflib", "levenshtein"]
"""What `fuzzywuzzy.fuzz.ratio` runs on: difflib as the official requirements install it, or python-Levenshtein."""

Bucket = Literal["0-4k", "4-8k", "8k+"]
"""LongBench-E's buckets, by a record's length in words."""

BUCKETS: tuple[Bucket, ...] = ("0-4k", "4-8k", "8k+")

_FIRST_LINE = {"trec", "triviaqa", "samsum", "lsht"}


def score_prediction(
    task: str,
    prediction: str,
    answers: Sequence[str],
    all_classes: Sequence[str] | None = None,
    fuzz: Fuzz = "difflib",
) -> float:
    """Official score of one prediction: the best over its answers, 0 to 1.

    Args:
        task: a LongBench task, with or without `_e`.
        prediction: the generated text; few-shot tasks are cut to its first line here.
        answers: accepted answers.
        all_classes: every class name, for classification.
        fuzz: engine of code similarity; others ignore it.

    Raises:
        InputError: an unknown task, jieba missing for a Chinese one, or answers the metric cannot use.
    """
    base = known_base(task)
    if base in _FIRST_LINE:
        prediction = prediction.lstrip("\n").split("\n")[0]
    scorer = _scorer(MEMBERS[base].metric, all_classes or (), fuzz)
    return max((scorer(prediction, answer) for answer in answers), default=0.0)


def known_base(task: str) -> str:
    """The task's name without `_e`.

    Raises:
        InputError: LongBench has no such task.
    """
    if task not in MEMBERS and task not in E_MEMBERS:
        raise unknown("LongBench task", task, [*MEMBERS, *E_MEMBERS])
    return base_name(task)


def require(metric: str) -> None:
    """Makes sure that a metric can be computed here.

    Raises:
        InputError: jieba is missing and the metric is one of the two that cut Chinese into words.
    """
    if metric in {"qa_f1_zh", "rouge_l_zh"}:
        _jieba()


def _scorer(metric: str, all_classes: Sequence[str], fuzz: Fuzz) -> Callable[[str, str], float]:
    if metric == "classification":
        if not all_classes:
            raise InputError("classification needs the list of classes in field 'all_classes'")
        return lambda prediction, answer: classification(prediction, answer, all_classes)
    if metric == "code_sim":
        return lambda prediction, answer: code_sim(prediction, answer, fuzz)
    return _PLAIN[metric]


# --- question answering ---------------------------------------------------------------------------------------------

_ASCII_PUNCTUATION = frozenset(string.punctuation)
# The official list of Chinese punctuation as ranges of code points; what it forgets (U+3008, U+FF0E) stays forgotten.
_CHINESE_RANGES = (
    (0x2013, 0x2014), (0x2018, 0x2019), (0x201B, 0x201F), (0x2026, 0x2027), (0x3001, 0x3003), (0x300B, 0x3011),
    (0x3014, 0x301F), (0x3030, 0x3030), (0x303E, 0x303F), (0xFE4F, 0xFE4F), (0xFF01, 0xFF0D), (0xFF0F, 0xFF0F),
    (0xFF1A, 0xFF20), (0xFF3B, 0xFF40), (0xFF5B, 0xFF64),
)  # fmt: skip
PUNCTUATION = _ASCII_PUNCTUATION.union(chr(code) for low, high in _CHINESE_RANGES for code in range(low, high + 1))
"""What Chinese texts are compared without."""


def qa_f1(prediction: str, answer: str) -> float:
    """F1 of the words' overlap, after SQuAD's normalisation: case, ASCII punctuation and articles do not count."""
    return token_f1(folded(prediction).split(), folded(answer).split())


def qa_f1_zh(prediction: str, answer: str) -> float:
    """F1 of the overlap of jieba's words without punctuation and spaces.

    Raises:
        InputError: jieba is not installed.
    """
    return token_f1(_chinese_words(prediction), _chinese_words(answer))


def token_f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    """F1 of two bags of words; 0 where they share none."""
    same = (Counter(prediction) & Counter(answer)).total()
    if same == 0:
        return 0.0
    precision, recall = same / len(prediction), same / len(answer)
    return 2 * precision * recall / (precision + recall)


def folded(text: str) -> str:
    """Without case, punctuation, articles and repeated white space, as SQuAD compares."""
    bare = "".join(letter for letter in text.lower() if letter not in _ASCII_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def _chinese_words(text: str) -> list[str]:
    # Cut first, clean later, as the official code does: punctuation separates words.
    words = ("".join(letter for letter in word.lower() if letter not in PUNCTUATION) for word in _cut(text))
    return [bare for bare in ("".join(word.split()) for word in words) if bare]


# --- summaries ------------------------------------------------------------------------------------------------------

# Python's recursion limit less the frames above the package's recursive walk in the official scorer of Chinese, the
# one whose sentences get that long: jieba leaves no full stops. Its English scorer could go one call deeper.
_RECURSION_LIMIT = 990


def rouge_l(prediction: str, answer: str) -> float:
    """F of summary-level ROUGE-L as the package `rouge` 1.0.1 computes it; no stemming.

    Text is cut into sentences at full stops. With U the union of the words on a longest common subsequence of every
    pair of sentences, precision and recall are |U| over the number of distinct words, and
    F = 2PR / (P + R + 1e-8). An empty text scores 0, and so does a pair of sentences long enough to make the package
    recurse too deep: the official scorer turns every exception into 0. Computing it here takes a tenth of the time and
    does not depend on how deep the caller's stack is.
    """
    hypothesis, reference = _sentences(prediction), _sentences(answer)
    if not hypothesis or not reference:
        return 0.0
    try:
        pairs = (_common_words(ref, hyp) for ref in reference for hyp in hypothesis)
        overlap = len(set[str]().union(*pairs))
    except RecursionError:
        return 0.0
    precision, recall = overlap / _distinct(hypothesis), overlap / _distinct(reference)
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def rouge_l_zh(prediction: str, answer: str) -> float:
    """ROUGE-L over jieba's words.

    Raises:
        InputError: jieba is not installed.
    """
    return rouge_l(" ".join(_cut(prediction)), " ".join(_cut(answer)))


def _sentences(text: str) -> list[list[str]]:
    # A sentence of spaces alone is one empty word, in the package too.
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _distinct(sentences: list[list[str]]) -> int:
    return len({word for sentence in sentences for word in sentence})


def _common_words(reference: list[str], hypothesis: list[str]) -> set[str]:
    """Words on the longest common subsequence that the package finds among equally long ones."""
    if len(reference) + len(hypothesis) < _RECURSION_LIMIT:
        # The walk only steps over words of the hypothesis that the reference lacks, so they may go.
        known = set(reference)
        hypothesis = [word for word in hypothesis if word in known]
    return _walk_back(reference, hypothesis, _lcs_table(reference, hypothesis)) if hypothesis else set()


def _lcs_table(reference: list[str], hypothesis: list[str]) -> list[list[int]]:
    """Lengths of longest common subsequences of all prefixes; (len(reference) + 1) rows."""
    table, known = [[0] * (len(hypothesis) + 1)], set(hypothesis)
    for word in reference:
        table.append(_next_row(word, hypothesis, table[-1]) if word in known else table[-1])
    return table


def _next_row(word: str, hypothesis: list[str], above: list[int]) -> list[int]:
    row, left = [0], 0
    for column, other in enumerate(hypothesis):
        if other == word:
            left = above[column] + 1
        elif above[column + 1] > left:
            left = above[column + 1]
        row.append(left)
    return row


def _walk_back(reference: list[str], hypothesis: list[str], table: list[list[int]]) -> set[str]:
    """The package's recursion as a loop: its choice among ties decides which words count.

    Raises:
        RecursionError: the package would have recursed too deep.
    """
    row, column, calls, words = len(reference), len(hypothesis), 1, set()
    while row and column:
        calls += 1
        if reference[row - 1] == hypothesis[column - 1]:
            words.add(reference[row - 1])
            row, column = row - 1, column - 1
        elif table[row - 1][column] > table[row][column - 1]:
            row -= 1
        else:
            column -= 1
    if calls > _RECURSION_LIMIT:
        raise RecursionError
    return words


@cache
def _jieba() -> ModuleType:
    try:
        jieba = importlib.import_module("jieba")
    except ImportError:
        raise MissingPackage("Chinese tasks are scored with jieba: pip install 'harness[zh]'") from None
    jieba.setLogLevel(logging.WARNING)  # it reports on standard error how it builds its dictionary
    return jieba


def _cut(text: str) -> list[str]:
    return list(_jieba().cut(text, cut_all=False))


# --- classes, numbers, code -----------------------------------------------------------------------------------------


def classification(prediction: str, answer: str, all_classes: Sequence[str]) -> float:
    """One over the number of classes named in the prediction, if the right one is among them.

    Classes contained in the right one's name do not count as named, but the official loop removes them from the list
    it iterates over and so overlooks the one after each: kept.
    """
    named = [name for name in all_classes if name in prediction]
    for name in named:
        if name in answer and name != answer:
            named.remove(name)
    return 1.0 / len(named) if answer in named else 0.0


def count(prediction: str, answer: str) -> float:
    """Share of the numbers in the prediction that equal the answer; 0 without numbers."""
    numbers: list[str] = re.findall(r"\d+", prediction)
    return numbers.count(answer) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str) -> float:
    """`count` against the paragraph's number in an English answer.

    Raises:
        InputError: the answer names no paragraph.
    """
    return count(prediction, paragraph_number(answer, "Paragraph "))


def retrieval_zh(prediction: str, answer: str) -> float:
    """`count` against the paragraph's number in a Chinese answer.

    Raises:
        InputError: the answer names no paragraph.
    """
    return count(prediction, paragraph_number(answer, "段落"))


def paragraph_number(answer: str, word: str) -> str:
    """Digits after the first `word` in the answer.

    Raises:
        InputError: there are none.
    """
    found = re.search(rf"{word}(\d+)", answer)
    if found is None:
        raise InputError(f"answer {answer!r} names no paragraph ({word.strip()} and a number expected)")
    return found[1]


def code_sim(prediction: str, answer: str, fuzz: Fuzz = "difflib") -> float:
    """Similarity of the prediction's first line that holds no backtick, `#` or `//`, which may be an empty one.

    Args:
        prediction: generated code; only leading newlines are dropped.
        answer: the true next line.
        fuzz: see `fuzz_ratio`.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((line for line in lines if not any(sign in line for sign in ("`", "#", "//"))), "")
    return fuzz_ratio(line, answer, fuzz) / 100


def fuzz_ratio(first: str, second: str, fuzz: Fuzz = "difflib") -> int:
    """`fuzzywuzzy.fuzz.ratio`, 0 to 100, on the engine that is named instead of the one that happens to be installed.

    Args:
        first: any text.
        second: any text.
        fuzz: "difflib" is Ratcliff/Obershelp with the junk heuristic; "levenshtein" is python-Levenshtein's ratio,
            2 * LCS / (sum of lengths), which gives code 1.4 to 2.4 points more.
    """
    if first == second:
        return 100
    if not first or not second:
        return 0
    return round(100 * _ENGINES[fuzz](first, second))


def _difflib_ratio(first: str, second: str) -> float:
    return difflib.SequenceMatcher(None, first, second).ratio()


def _levenshtein_ratio(first: str, second: str) -> float:
    return 2 * lcs_length(first, second) / (len(first) + len(second))


def lcs_length(first: str, second: str) -> int:
    """Length of the longest common subsequence, one bit a character (Hyyrö 2004, "Bit-parallel LCS-length")."""
    places: dict[str, int] = {}
    for index, letter in enumerate(first):
        places[letter] = places.get(letter, 0) | 1 << index
    full = (1 << len(first)) - 1
    free = full
    for letter in second:
        hit = free & places.get(letter, 0)
        free = ((free + hit) | (free - hit)) & full
    return len(first) - free.bit_count()


_ENGINES: dict[Fuzz, Callable[[str, str], float]] = {"difflib": _difflib_ratio, "levenshtein": _levenshtein_ratio}

_PLAIN: dict[str, Callable[[str, str], float]] = {
    "qa_f1": qa_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge_l": rouge_l,
    "rouge_l_zh": rouge_l_zh,
    "count": count,
    "retrieval": retrieval,
    "retrieval_zh": retrieval_zh,
}


# --- prediction files -----------------------------------------------------------------------------------------------


class Prediction(NamedTuple):
    """One line of a prediction file in the official layout.

    Attributes:
        pred: generated text.
        answers: accepted answers, at least one.
        all_classes: class names, or None where the task has none.
        length: words of the record, or None where it is not said.
    """

    pred: str
    answers: list[str]
    all_classes: list[str] | None
    length: int | None


def read_predictions(path: Path) -> Iterator[tuple[int, Prediction]]:
    """Line numbers and predictions of a JSONL file with the columns `pred`, `answers`, `all_classes`, `length`.

    Raises:
        InputError: the file or a line is unreadable, or a field is missing or of the wrong type.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _read_prediction(line, f"{path}:{number}")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def score_file(path: Path, task: str, fuzz: Fuzz = "difflib") -> float:
    """Score of a prediction file as the official `eval.py` prints it: mean times 100, two decimals.

    Args:
        path: JSONL, see `read_predictions`.
        task: a LongBench task, with or without `_e`.
        fuzz: engine of code similarity.

    Raises:
        InputError: an unknown task, an empty file, or a bad line, with its number.
    """
    scores = [score for score, _ in _score_lines(path, task, fuzz)]
    if not scores:
        raise InputError(f"{path} holds no predictions")
    return round(100 * sum(scores) / len(scores), 2)


def score_buckets(path: Path, task: str, fuzz: Fuzz = "difflib") -> dict[Bucket, float | None]:
    """Scores of a LongBench-E prediction file by length, as `eval.py --e` prints them; None where a bucket is empty.

    Raises:
        InputError: as `score_file`, or a line without a length.
    """
    buckets: dict[Bucket, list[float]] = {name: [] for name in BUCKETS}
    for score, length in _score_lines(path, task, fuzz):
        if length is None:
            raise InputError(f"{path}: LongBench-E needs field 'length' on every line")
        buckets[bucket(length)].append(score)
    return {name: round(100 * sum(kept) / len(kept), 2) if kept else None for name, kept in buckets.items()}


def bucket(length: int) -> Bucket:
    """LongBench-E's bucket of a record of `length` words."""
    return "0-4k" if length < 4000 else "4-8k" if length < 8000 else "8k+"


def _score_lines(path: Path, task: str, fuzz: Fuzz) -> Iterator[tuple[float, int | None]]:
    require(MEMBERS[known_base(task)].metric)
    if fuzz not in _ENGINES:
        raise unknown("fuzz engine", fuzz, _ENGINES)
    for number, line in read_predictions(path):
        try:
            score = score_prediction(task, line.pred, line.answers, line.all_classes, fuzz)
        except InputError as error:
            raise InputError(f"{path}:{number}: {error}") from None
        yield score, line.length


def _read_prediction(line: bytes, place: str) -> Prediction:
    row = read_object(line, place)
    if not isinstance(row.get("pred"), str):
        raise InputError(f"{place}: field 'pred' must be a text")
    if not _is_texts(row.get("answers")) or not row["answers"]:
        raise InputError(f"{place}: field 'answers' must be a list of at least one text")
    if row.get("all_classes") is not None and not _is_texts(row["all_classes"]):
        raise InputError(f"{place}: field 'all_classes' must be a list of texts or null")
    if row.get("length") is not None and type(row["length"]) is not int:
        raise InputError(f"{place}: field 'length' must be an integer or null")
    return Prediction(row["pred"], row["answers"], row.get("all_classes"), row.get("length"))


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) for entry in value)
