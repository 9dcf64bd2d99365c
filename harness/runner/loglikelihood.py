"""Log-likelihood through a pruned prompt: how likely is this continuation to a model that has pruned the prompt?

The prompt is prefilled under the method, and pruned, exactly as before generation. Its last row predicts the first
token of the continuation; the tokens then come in one by one as decode steps, as if the model had generated them, so
the method treats them as it treats generated tokens. With c_1 ... c_m the continuation:

    log p(c | prompt) = sum_i log softmax(logits_i)[c_i],   logits_i after the pruned prompt and c_1 ... c_(i-1)

Under full attention this is the ordinary log-likelihood. What a method keeps may not depend on the continuation, so
the loglikelihood of a text without a prompt ("rolling", perplexity) has no meaning here: there is nothing to prune.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.engine.engine import Engine
from harness.engine.method import Method
from harness.engine.request import Request
from harness.engine.step import Step
from harness.errors import InputError
from harness.runner.prompts import encode, encode_answer, longest_bare_prompt
from tasks.base import LogLikelihood, Sample

Pair = tuple[list[int], list[int]]
"""Token ids of a prompt and of a continuation."""


def rate_choices(
    engine: Engine, method: Method, sample: Sample, tokenizer: Any, max_length: int | None = None
) -> list[LogLikelihood]:
    """One log-likelihood for each of a sample's choices.

    Args:
        engine: on the model.
        method: prunes the prompts.
        sample: with `choices`.
        tokenizer: of the model.
        max_length: most prompt tokens, longer ones lose their middle; None for what the model's window leaves.

    Raises:
        InputError: a choice is empty, or does not fit the window with its prompt.
    """
    pairs = encode_choices(sample, tokenizer, max_length, engine.context.shape.max_context)
    device = engine.embed.weight.device
    found: dict[int, LogLikelihood] = {}
    for prompt in dict.fromkeys(tuple(prompt) for prompt, _ in pairs):
        wanted = [index for index, pair in enumerate(pairs) if tuple(pair[0]) == prompt]
        ids = torch.tensor(prompt, device=device)
        found.update(zip(wanted, loglikelihoods(engine, method, ids, [pairs[i][1] for i in wanted]), strict=True))
    return [found[index] for index in range(len(pairs))]


def encode_choices(sample: Sample, tokenizer: Any, max_length: int | None, window: int) -> list[Pair]:
    """`encode_pair` of each of a sample's choices.

    Raises:
        InputError: as `encode_pair`, or the sample has not one prompt for each choice.
    """
    prompts = sample.choice_prompts or (sample.prompt,) * len(sample.choices)
    if len(prompts) != len(sample.choices):
        raise InputError(f"sample {sample.id}: {len(prompts)} prompts for {len(sample.choices)} choices")
    return [
        encode_pair(replace(sample, prompt=prompt), choice, tokenizer, max_length, window)
        for prompt, choice in zip(prompts, sample.choices, strict=True)
    ]


def encode_pair(sample: Sample, continuation: str, tokenizer: Any, max_length: int | None, window: int) -> Pair:
    """Ids of the sample's prompt and of a continuation, divided as lm-eval's `_encode_pair` divides them.

    White space at the prompt's end goes to the continuation. Both are tokenised together; the continuation is what
    follows as many tokens as the prompt has alone. An empty prompt is the beginning-of-text token, or the
    end-of-text token where there is none. A chat template goes around the prompt alone: the continuation is an answer,
    which begins where the template ends.

    Raises:
        InputError: the continuation is empty, or prompt and continuation exceed `window`.
    """
    if sample.chat and tokenizer.chat_template:
        pair = _behind_template(sample, continuation, tokenizer, max_length, window)
    elif sample.prompt.strip():
        pair = _divided(sample, continuation, tokenizer, max_length, window)
    else:
        pair = _without_prompt(sample.prompt + continuation, tokenizer)
    if not pair[1]:
        raise InputError(f"sample {sample.id}: the choice {continuation!r} has no tokens of its own to rate")
    if len(pair[0]) + len(pair[1]) > window:
        raise InputError(f"sample {sample.id}: prompt and choice exceed the context of {window}; set --max-length")
    return pair


def _behind_template(sample: Sample, continuation: str, tokenizer: Any, max_length: int | None, window: int) -> Pair:
    ids = encode_answer(sample, continuation, tokenizer)
    longest = max_length or longest_bare_prompt(sample, tokenizer, window - len(ids))
    return encode(sample, tokenizer, longest), ids


def _divided(sample: Sample, continuation: str, tokenizer: Any, max_length: int | None, window: int) -> Pair:
    prompt = sample.prompt.rstrip()
    alone = replace(sample, prompt=prompt)
    whole = encode(replace(sample, prompt=sample.prompt + continuation), tokenizer)
    ids = whole[len(encode(alone, tokenizer)) :]
    return encode(alone, tokenizer, max_length or window - len(ids)), ids


def _without_prompt(text: str, tokenizer: Any) -> Pair:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    first = [prefix_id(tokenizer)]
    return (first, ids) if ids[:1] != first else (ids[:1], ids[1:])


def prefix_id(tokenizer: Any) -> int:
    """The token that stands for the beginning of a text.

    Raises:
        InputError: the tokenizer has none.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise InputError("an empty prompt needs a tokenizer with a beginning- or end-of-text token")


@torch.inference_mode()
def loglikelihoods(
    engine: Engine, method: Method, prompt: Tensor, continuations: Sequence[Sequence[int]]
) -> list[LogLikelihood]:
    """Log-likelihoods of several continuations of one prompt, each through a prompt of its own pruning.

    The prompt is prefilled anew for every continuation of more than one token, because decode steps change what the
    method holds; continuations of one token share a prefill.

    Args:
        engine: on the model.
        method: prunes the prompt.
        prompt: [n] int64 ids on the model's device, n >= 1.
        continuations: ids, one or more each.
    """
    request = Request(prompt, max(map(len, continuations)))
    found, read, untouched = [], None, False
    for ids in continuations:
        if read is None or (len(ids) > 1 and not untouched):
            read, untouched = engine.read(method, request), True
        found.append(_follow(engine, method, *read, ids))
        untouched = untouched and len(ids) == 1
    return found


def _follow(engine: Engine, method: Method, logits: Tensor, position: int, ids: Sequence[int]) -> LogLikelihood:
    """Rates `ids` one by one.

    Args:
        engine: on the model.
        method: holds the prompt.
        logits: [vocab], of the prompt's last row.
        position: of the first id.
        ids: the continuation.
    """
    total, greedy = 0.0, True
    for offset, token in enumerate(ids):
        total += float(logits.float().log_softmax(-1)[token])
        greedy = greedy and int(logits.argmax()) == token
        if offset + 1 < len(ids):
            step = Step("decode", position + offset, 1)
            logits = engine.forward(method, torch.tensor([token], device=logits.device), step)
    return LogLikelihood(total, greedy)
