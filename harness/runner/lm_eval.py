"""The engine as a model of lm-eval, so that its own command line runs under any pruning method.

    harness lm-eval --model_args model=smollm2,method=slim --tasks arc_easy --limit 10

Prompts are tokenised, cut and stopped by the functions that `--tasks lm_eval/NAME` uses, so both sides give the same
answers: longer prompts than `max_length` lose their middle, decoding is greedy, one request runs at a time.
"""

from __future__ import annotations

import sys
from collections.abc import MutableMapping, Sequence
from functools import partial
from importlib.metadata import version
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
from harness.measuring.provenance import source_hash
from harness.models.load import LoadedModel, load
from harness.options import OptionSet
from harness.runner.catalog import parse_methods
from harness.runner.faults import blamed
from harness.runner.loglikelihood import rate_choices
from harness.runner.prompts import encode, longest_bare_prompt
from harness.runner.spec import content_hash
from harness.runner.stops import StopTexts
from tasks.base import Sample
from tasks.lm_eval import cut_at, new_tokens, render_chat, stop_texts

_GAVE = "harness"
"""Under which key a file of kept answers says what gave them; lm-eval's own keys are digests."""


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
        self._spec = specs[0]
        self._spec.check(self._loaded.shape)
        words = partial(self._loaded.tokenizer.encode, add_special_tokens=False)
        self._engine = build_engine(self._loaded.model, self._loaded.shape, encode=words)
        self._method = self._spec.build(self._engine.context)
        self._args, self._label = args, self._spec.label
        self._device = self._loaded.model.device

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, each cut before the first stop text.

        Raises:
            InputError: the method fails.
        """
        answers = []
        for request in tqdm(requests, desc=f"generate_until, {self._label}", disable=disable_tqdm):
            prompt, wanted = request.args
            with blamed(self._method, f"{self._label} failed"):
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
            with blamed(self._method, f"{self._label} failed"):
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

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Ties the answers that lm-eval keeps (`--use_cache`) to what gave them: it knows them by prompt alone.

        Raises:
            InputError: the file holds answers of another model, method or setting.
        """
        known: MutableMapping[str, Any] | None = cache_hook.dbdict
        if known is not None:
            mine = self._identity()
            if len(known) and known.get(_GAVE) != mine:
                raise InputError(
                    "--use_cache: the file holds answers of another model, method or setting; name another"
                )
            known[_GAVE] = mine
        super().set_cache_hook(cache_hook)

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

    def _identity(self) -> str:
        """Hash of everything but the prompt that shapes an answer."""
        loaded, context, options = self._loaded, self._engine.context, self._spec.options.model_dump(mode="json")
        return content_hash(
            {
                "model": [loaded.weights_hash, str(loaded.model.dtype), self._device.type, sorted(loaded.eos_ids)],
                "vocabulary": loaded.tokenizer.get_vocab(),
                "kernel": [context.attention.kernel, self._engine.kind],
                "method": [self._spec.kind.name, options, source_hash(self._spec.kind)],
                "max_length": self._args.max_length,
                "code": source_hash(HarnessLM),
                "versions": {name: version(name) for name in ("torch", "transformers")},
            }
        )

    def _generate(self, prompt: str, stops: list[str], count: int) -> str:
        tokenizer, window = self._loaded.tokenizer, self._loaded.shape.max_context
        sample = Sample("of lm-eval", prompt, (), count)
        longest = self._args.max_length or longest_bare_prompt(sample, tokenizer, window - count)
        ids = encode(sample, tokenizer, longest)
        if not ids or len(ids) + count > window:
            raise InputError(f"{len(ids)} prompt tokens and {count} new ones do not fit the context of {window}")
        request = Request(torch.tensor(ids, device=self._device), count, self._loaded.eos_ids)
        tokens, ended = [], StopTexts(stops, tokenizer)
        for token in self._engine.stream(self._method, request):
            tokens.append(token)
            if ended(tokens):
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
