"""Texts with passkeys in them and questions for each behind: what heads have to look back for.

As DuoAttention's training data (Xiao et al., arXiv 2410.10819, section 2.3), with shorter passkeys, so that several fit
into a few hundred tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tasks.common.chat import tokenise
from tasks.common.haystack import hide

_NTH = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_WORDS = (
    "alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet", "kilo", "lima", "mike",
    "november", "oscar", "papa", "quebec", "romeo", "sierra", "tango", "uniform", "victor", "whiskey", "zulu",
)  # fmt: skip
_TOKENS_A_KEY = 80
"""Of a text, for each passkey in it."""
SHORTEST = 256
"""Tokens of a text that leaves room for two passkeys and something around them."""


@dataclass(frozen=True)
class Passkeys:
    """One text.

    Attributes:
        ids: [n] int64, the text, then questions with their answers.
        context: tokens ahead of the questions.
        answers: [n - context] bool, tokens behind the context that are of an answer.
    """

    ids: Tensor
    context: int
    answers: Tensor


def passkeys(tokenizer: Any, length: int, seed: str) -> Passkeys:
    """A text of about `length` tokens, questions and answers included; the same for the same seed.

    Raises:
        InputError: there are no speeches to hide passkeys in.
    """
    rng = random.Random(seed)
    keys = [_key(rng) for _ in range(max(2, min(len(_NTH), length // _TOKENS_A_KEY)))]
    needles = {f"The {nth} passkey is {key}.": rng.uniform(0.02, 0.95) for nth, key in zip(_NTH, keys, strict=False)}
    parts = [
        (f"\n\nWhat is the {nth} passkey? The {nth} passkey is", f" {key}.")
        for nth, key in zip(_NTH, keys, strict=False)
    ]
    rng.shuffle(parts)
    ending = "".join(question + answer for question, answer in parts)
    text = hide(tokenizer, length, needles, ending, rng.randrange(2**32)).text.removesuffix(ending)
    context = tokenise(text, tokenizer)
    behind = [
        (tokenizer.encode(piece, add_special_tokens=False), at) for part in parts for at, piece in enumerate(part)
    ]
    ids = [*context, *(token for tokens, _ in behind for token in tokens)]
    answers = [bool(at) for tokens, at in behind for _ in tokens]
    return Passkeys(torch.tensor(ids), len(context), torch.tensor(answers))


def _key(rng: random.Random) -> str:
    """Words and numbers in turn, so that neither kind of token decides alone."""
    return " ".join(str(rng.randrange(100, 1000)) if place % 2 else rng.choice(_WORDS) for place in range(4))
