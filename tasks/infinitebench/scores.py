"""InfiniteBench's scorers, quirks included (OpenBMB/InfiniteBench, `src/compute_scores.py`).

Each takes (prediction, answers) and returns 0 to 1. For multiple choice the answers are the right text and its letter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tasks.longbench.scores import PUNCTUATION, qa_f1, token_f1


def first_integer(prediction: str, answers: Sequence[str]) -> float:
    """1 if the first run of digits is the answer."""
    found = re.search("[0-9]+", prediction)
    return float(found is not None and found[0] == answers[0])


def word(prediction: str, answers: Sequence[str]) -> float:
    """1 if the answer is one of the words; punctuation separates them."""
    return float(answers[0] in _spaced(prediction, "\n:\"'.,?!{}").split())


def last_integer(prediction: str, answers: Sequence[str]) -> float:
    """1 if the last word is the number."""
    words = _spaced(prediction, "\n.`'\":").split()
    return float(bool(words) and _number(words[-1]) == _number(answers[0]))


def first_number(prediction: str, answers: Sequence[str]) -> float:
    """1 if the first number, with a fraction or without, equals the answer."""
    found = re.search(r"\d+\.\d+|\d+", prediction)
    return float(found is not None and float(found[0]) == float(answers[0]))


def name(prediction: str, answers: Sequence[str]) -> float:
    """1 if an answer stands somewhere; case is folded."""
    return float(any(answer.upper() in prediction.upper() for answer in answers))


def function(prediction: str, answers: Sequence[str]) -> float:
    """1 if the letter comes first, with a stop or colon, or letter or name behind a phrase such as "answer is:"."""
    text, letter = answers
    if prediction[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    cleaned = re.sub("Option|option", " ", _spaced(prediction.strip(), "\n`'\"-*"))
    after = _behind(re.sub(" +", " ", cleaned), ("answer is:", "is:", "answer:"))
    return float(after is not None and after.startswith((letter, text)))


def letter(prediction: str, answers: Sequence[str]) -> float:
    """1 if the last letter A to D that stands alone is right, or else the first sign of a choice."""
    text = prediction.strip()
    last = re.search(r"\b[A-D]\b(?!.*\b[A-D]\b)", text)
    if (last is not None and last[0] in answers) or text in answers:
        return 1.0
    if text[:1] in tuple("ABCD"):
        return float(text[0] in answers)
    cleaned = re.sub(" +", " ", _spaced(text, "\n\"'.,?!{}"))
    after = _behind(cleaned, ("answer is:", "answer:", "answer is", "option is"))
    if after is not None:
        return float(after.startswith(tuple(answers)))
    return float(next((one for one in cleaned.split() if one in "ABCD"), "") in answers)


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The best F1 over words; case, punctuation and articles do not count."""
    return max(qa_f1(prediction, answer) for answer in answers)


def f1_zh(prediction: str, answers: Sequence[str]) -> float:
    """The best F1 over characters; case, punctuation and white space do not count."""
    return max(token_f1(_characters(prediction), _characters(answer)) for answer in answers)


def _spaced(text: str, signs: str) -> str:
    return text.translate(dict.fromkeys(map(ord, signs), " "))


def _behind(text: str, phrases: Sequence[str]) -> str | None:
    """What follows the first of the phrases that occurs, and one more character."""
    phrase = next((one for one in phrases if one in text), None)
    return None if phrase is None else text[text.index(phrase) + len(phrase) + 1 :]


def _number(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _characters(text: str) -> list[str]:
    return [sign for sign in text.lower() if not sign.isspace() and sign not in PUNCTUATION]
