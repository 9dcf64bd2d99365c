"""From a sample to the token ids a model reads: cut in the middle, wrap in the chat template, tokenise.

The order is LongBench's (THUDM/LongBench, `pred.py`): the *bare* prompt is cut to `max_length`, so that instructions at
both ends survive, and the chat template goes around what is left. Wrapped prompts are therefore longer than
`max_length` by the template's own tokens, which is why LongBench sets it some 500 tokens below the model's window.
"""

from __future__ import annotations

from itertools import takewhile

from harness.errors import InputError
from tasks.base import Sample, Tokenizer
from tasks.common.chat import ChatTokenizer, tokenise, wrap, wrap_further

# Stands for what the user says, to see what a template writes around it; no text has it.
_MARK = "\ufdd0"


def encode(sample: Sample, tokenizer: ChatTokenizer, max_length: int | None = None) -> list[int]:
    """Token ids of a sample's prompt.

    As in the official code, tokens are counted with the special tokens the tokenizer adds, both halves are decoded
    without special tokens, and the joined text is tokenised again, so a cut prompt need not have exactly `max_length`
    tokens. It deviates in three places: the tokenizer's own chat template replaces the hand-written ones for models of
    2023; a template that writes the beginning-of-sequence token itself does not get a second one; and the date that
    some templates print is fixed. Decoding follows the installed transformers: before version 5 it dropped spaces
    before punctuation for tokenizers that ask for it (Llama 3's does), so cut prompts of older papers may lack those.

    Args:
        sample: what to ask; `sample.chat` asks for the chat template, used if the tokenizer has one.
        tokenizer: of the model.
        max_length: most tokens of the bare prompt, or None for no cut. An odd one loses a token to rounding.

    Returns:
        ids, one row, not padded.

    Raises:
        InputError: `max_length` leaves nothing of the prompt, or the chat template fails.
    """
    return tokenise(_text(sample, tokenizer, max_length), tokenizer)


def encode_with_question(
    sample: Sample, tokenizer: ChatTokenizer, max_length: int | None = None
) -> tuple[list[int], int]:
    """The same ids, and how many of the last ones hold the question (and what the chat template puts behind it).

    A token that spans the border belongs to the question. 0 where the sample names no question or the cut reached it.
    """
    if sample.ids:
        return list(sample.ids), 0
    text = _text(sample, tokenizer, max_length)
    ids, border = tokenise(text, tokenizer), _border(text, sample, tokenizer)
    if border is None:
        return ids, 0
    context = tokenise(text[:border], tokenizer)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(context, ids, strict=False)))
    return ids, len(ids) - shared


def encode_further(sample: Sample, tokenizer: ChatTokenizer) -> list[int]:
    """Token ids of a further question, as they follow the last token of an answer that no end token counts to."""
    if sample.ids:
        return list(sample.ids)
    text = wrap_further(sample.prompt, tokenizer) if sample.chat else sample.prompt
    return tokenizer.encode(text + sample.prefix, add_special_tokens=False)


def encode_answer(sample: Sample, answer: str, tokenizer: ChatTokenizer) -> list[int]:
    """Token ids of an answer as they follow those of the sample's whole prompt.

    Both are tokenised together, since some tokenizers write the beginning of a text differently; where a token would
    span the border, the answer is tokenised alone: it is written behind tokens that are there.
    """
    text = _text(sample, tokenizer, None)
    prompt, whole = tokenise(text, tokenizer), tokenise(text + answer, tokenizer)
    if whole[: len(prompt)] == prompt:
        return whole[len(prompt) :]
    return tokenizer.encode(answer, add_special_tokens=False)


def longest_bare_prompt(sample: Sample, tokenizer: ChatTokenizer, room: int) -> int | None:
    """Most tokens of the bare prompt with which the wrapped one fits; None where it fits whole.

    Args:
        sample: what to ask.
        tokenizer: of the model.
        room: tokens for the wrapped prompt.
    """
    whole = len(sample.ids or encode(sample, tokenizer))
    if whole <= room or sample.ids:
        return None
    template = whole - len(tokenizer.encode(sample.prompt, add_special_tokens=True))
    longest = room - max(0, template)
    # Halves that are joined may be tokenised into a few more tokens than they were cut to.
    while longest >= 2 and (over := len(encode(sample, tokenizer, longest)) - room) > 0:
        longest -= over
    return longest


def _text(sample: Sample, tokenizer: ChatTokenizer, max_length: int | None) -> str:
    ids = tokenizer.encode(sample.prompt, add_special_tokens=True)
    text = sample.prompt if fits(ids, max_length) else cut_middle(ids, tokenizer, max_length or 0)
    return (wrap(text, tokenizer) if sample.chat else text) + sample.prefix


def _border(text: str, sample: Sample, tokenizer: ChatTokenizer) -> int | None:
    """Where the question begins in the text of a prompt, in what the user says alone; None where that is not known.

    Templates trim what they wrap, so white space at its ends does not count; nor does a question without a context.
    """
    before, _, behind = (wrap(_MARK, tokenizer) if sample.chat else _MARK).partition(_MARK)
    behind += sample.prefix
    if not (text.startswith(before) and text.endswith(behind)):
        return None
    start, end = len(before), len(text) - len(behind)
    said, question = text[start:end].rstrip(), sample.question.rstrip()
    if not question or not said.endswith(question) or not said.removesuffix(question).strip():
        return None
    return start + len(said) - len(question)


def fits(ids: list[int], max_length: int | None) -> bool:
    """Whether a prompt of these ids stays whole."""
    return max_length is None or len(ids) <= max_length


def cut_middle(ids: list[int], tokenizer: Tokenizer, max_length: int) -> str:
    """Text of the first and the last `int(max_length / 2)` ids.

    Raises:
        InputError: that is less than one token on each side.
    """
    half = int(max_length / 2)
    if half < 1:
        raise InputError(f"max_length {max_length} leaves nothing of the prompt; it must be at least 2")
    head, tail = ids[:half], ids[-half:]
    return tokenizer.decode(head, skip_special_tokens=True) + tokenizer.decode(tail, skip_special_tokens=True)
