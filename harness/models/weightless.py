"""Transformers models without their weights, for loaders that bring their own."""

from __future__ import annotations

import importlib.metadata
import logging
from typing import Any

import torch

from harness.errors import InputError

NEEDED = (5, 17)


def transformers() -> Any:
    """The transformers package, told to keep off the terminal for the rest of the process.

    Raises:
        InputError: it is missing or too old: 4.x reads the rope theta of checkpoints saved by 5.x as 10000, silently.
    """
    needed = ".".join(map(str, NEEDED))
    try:
        found = importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"transformers is not installed; pip install 'transformers>={needed},<6'") from None
    if tuple(int(part) for part in found.split(".")[:2]) < NEEDED:
        raise InputError(f"transformers {found} is too old; pip install 'transformers>={needed},<6'")
    import transformers as package

    _hush(package)
    return package


def _hush(package: Any) -> None:
    # For good, not for the time of loading: tokenizers also warn at every prompt longer than they expect.
    package.utils.logging.set_verbosity_error()
    package.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.CRITICAL)


def config_for(family: str, fields: dict[str, Any]) -> Any:
    """The transformers configuration of a model, from its fields.

    Args:
        family: `model_type`, as in a config.json.
        fields: whatever else a config.json holds.

    Raises:
        InputError: transformers does not accept them.
    """
    auto_config = transformers().AutoConfig
    try:
        return auto_config.for_model(family, **fields)
    except Exception as error:  # its strict dataclasses raise errors of their own, outside every common base
        raise InputError(f"transformers refuses this {family} configuration: {last_line(error)}") from None


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """A `*ForCausalLM` whose parameters have shape and dtype but no memory yet (device "meta").

    Raises:
        InputError: transformers makes none of this configuration.
    """
    with torch.device("meta"):
        auto_model = transformers().AutoModelForCausalLM
        try:
            return auto_model.from_config(config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False)
        except Exception as error:  # an unknown activation, a padding token outside the vocabulary
            raise InputError(f"transformers makes no model of this configuration: {last_line(error)}") from None


def finish(model: Any, device: torch.device) -> Any:
    """Makes a model whose parameters are on `device` fit for use: tied embeddings, rotary frequencies, no gradients."""
    model.tie_weights()
    # The frequencies are buffers outside the state dict: on "meta" they were never computed.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(device)
    return model.requires_grad_(False).eval()


def last_line(error: Exception) -> str:
    """The last line of an error's message; libraries put the reason there, some behind all that they know."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
