"""The engine as a model of lm-eval, so that its own command line runs under any pruning method.

    harness lm-eval --model_args model=smollm2,method=slim --tasks arc_easy --limit 10

Prompts are tokenised, cut and stopped by the functions that `--tasks lm_eval/NAME` uses, so both sides give the same
answers: longer prompts than `max_length` lose their middle, decoding is greedy, one request runs at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Annotated, Any

import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from pydantic import Field
from tqdm import tqdm  # type: ignore[import-untyped]

from harness.engine.engine import build_engine
from harness.engine.request import Request
from harness.errors import InputError
from harness.models.load import LoadedModel, load
from harness.options import OptionSet
from harness.run.catalog import parse_methods
from harness.run.faults import comes_from, told
from harness.run.loglikelihood import rate_choices
from harness.run.prompts import encode, longest_bare_prompt
from tasks.base import Sample
from tasks.lm_eval import cut_at, new_tokens, render_chat, stop_texts


class ModelArgs(OptionSet):
    """What `--model_args` may say; `device` and the batch sizes come from options of the same name too."""

    model: str = Field("smollm2", description="as for `harness run --model`")
    method: str = Field("full", description="one method with its options, as for `harness run --methods`")
    device: str = Field("auto", description="cpu, or cuda where there is one: lm-eval asks for cuda:0 unless told")
    dtype: str = Field("auto", description="auto, float32, bfloat16, float16")
    max_length: Annotated[int, Field(ge=16)] | None = Field(None, description="prompt tokens at most")
    batch_size: int | str = Field(1, description="accepted and ignored: requests run one by one")
    max_batch_size: int | str | None = Field(None, description="accepted and ignored")


@register_model("harness")
class HarnessLM(LM):  # type: ignore[misc]
    """A model under a pruning method."""

    def __init__(self, **given: Any) -> None:
        """Loads the model; see `ModelArgs`.

        Raises:
            InputError: an unknown argument, model or method.
        """
        super().__init__()
        args = ModelArgs.read("lm-eval model 'harness'", {key: str(value) for key, value in given.items()})
        specs = parse_methods(args.method)
        if len(specs) != 1:
            raise InputError(f"lm-eval runs one method at a time, not {len(specs)}: {args.method}")
        self._loaded: LoadedModel = load(args.model, _device(args.device), args.dtype)
        specs[0].check(self._loaded.shape)
        self._engine = build_engine(self._loaded.model, self._loaded.shape)
        self._method = specs[0].build(self._engine.context)
        self._args, self._label = args, specs[0].label
        self._device = self._loaded.model.device

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, each cut before the first stop text.

        Raises:
            InputError: the method fails.
        """
        answers = []
        for request in tqdm(requests, desc=f"generate_until, {self._label}", disable=disable_tqdm):
            prompt, wanted = request.args
            with self._blaming():
                answers.append(self._generate(prompt, stop_texts(wanted), new_tokens(wanted)))
            self.cache_hook.add_partial("generate_until", request.args, answers[-1])
        return answers

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation through its pruned prompt, and whether it is the greedy one.

        Raises:
            InputError: the method fails.
        """
        found: list[tuple[float, bool]] = []
        bar = tqdm(total=len(requests), desc=f"loglikelihood, {self._label}", disable=disable_tqdm)
        for prompt, group in groupby(requests, key=lambda request: request.args[0]):
            asked = list(group)
            sample = Sample("of lm-eval", prompt, (), 1, choices=tuple(request.args[1] for request in asked))
            with self._blaming():
                rated = rate_choices(self._engine, self._method, sample, self._loaded.tokenizer, self._args.max_length)
            for request, one in zip(asked, rated, strict=True):
                found.append((one.total, one.greedy))
                self.cache_hook.add_partial("loglikelihood", request.args, found[-1])
            bar.update(len(asked))
        bar.close()
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Refused: every token of such a text is both context and answer, so no prompt could be pruned.

        Raises:
            InputError: always.
        """
        raise InputError(
            "perplexity (loglikelihood_rolling) has no prompt to prune: each token is context and answer at once; "
            "use lm-eval's own model (--model hf) for it"
        )

    @property
    def tokenizer_name(self) -> str:
        """The model's name, for the fingerprint of cached requests."""
        return self._loaded.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The model's template, for lm-eval's record of the run."""
        return str(self._loaded.tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model's template writes it."""
        return render_chat(self._loaded.tokenizer, chat_history, add_generation_prompt)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval's results shall say about the model."""
        return {"method": self._label, "dtype": str(self._loaded.model.dtype), "weights": self._loaded.weights_hash}

    @contextmanager
    def _blaming(self) -> Iterator[None]:
        """Says in one line what the method does wrong; lm-eval has no answers without it."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # whatever a third party's code raises
            if not comes_from(self._method, error):
                raise
            raise InputError(f"{self._label} failed: {told(self._method, error)}") from error

    def _generate(self, prompt: str, stops: list[str], count: int) -> str:
        tokenizer, window = self._loaded.tokenizer, self._loaded.shape.max_context
        sample = Sample("of lm-eval", prompt, (), count)
        longest = self._args.max_length or longest_bare_prompt(sample, tokenizer, window - count)
        ids = encode(sample, tokenizer, longest)
        if not ids or len(ids) + count > window:
            raise InputError(f"{len(ids)} prompt tokens and {count} new ones do not fit the context of {window}")
        request = Request(torch.tensor(ids, device=self._device), count, self._loaded.eos_ids)
        tokens: list[int] = []
        for token in self._engine.stream(self._method, request):
            tokens.append(token)
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            if any(stop in text for stop in stops):
                break
        return cut_at(tokenizer.decode(tokens, skip_special_tokens=True), stops)


def command(arguments: Sequence[str]) -> None:
    """Runs lm-eval's own command line with the model `harness` registered and, unless another is named, chosen.

    Args:
        arguments: what would follow `lm-eval`.

    Raises:
        InputError: from the model; lm-eval's own errors are its own.
    """
    from lm_eval.__main__ import cli_evaluate

    before = sys.argv
    sys.argv = ["lm-eval", *_with_model(list(arguments))]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


def _device(asked: str) -> str:
    """lm-eval's name of a device in ours; its default is CUDA everywhere, so that means CUDA where there is one."""
    return "auto" if asked in ("cuda", "cuda:0") else asked


def _with_model(arguments: list[str]) -> list[str]:
    runs = bool(arguments) and (arguments[0] == "run" or arguments[0].startswith("-"))
    asks = {"-h", "--help"} & set(arguments)
    named = any(part in ("--model", "-M", "--config", "-C") or part.startswith("--model=") for part in arguments)
    if not runs or asks or named:
        return arguments
    return ["run", "--model", "harness", *(arguments[1:] if arguments[0] == "run" else arguments)]
