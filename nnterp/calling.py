"""A model called on a few tokens, whatever it calls its arguments and whatever says how large it is."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["call_model", "config_of", "declared", "evaluating", "some_tokens"]


def call_model(model: torch.nn.Module, ids: torch.Tensor) -> Any:
    """What a model gives for token ids, (batch, position), by whatever name it takes them; without a cache."""
    known = inspect.signature(model.forward).parameters
    options = {"use_cache": False} if "use_cache" in known else {}
    takes_any = any(each.kind is each.VAR_KEYWORD for each in known.values())
    return model(input_ids=ids, **options) if "input_ids" in known or takes_any else model(ids, **options)


def config_of(model: torch.nn.Module) -> Any:
    """The model's config; None where it has none, as a module of one's own may not."""
    return getattr(model, "config", None)


def some_tokens(model: torch.nn.Module, batch: int, positions: int) -> torch.Tensor:
    """Token ids, (batch, position), the same every time, none of them one that means something to the model itself."""
    config = getattr(config_of(model), "__dict__", {})
    special = {value for key, value in config.items() if key.endswith("_token_id") and isinstance(value, int)}
    usable = [token for token in range(min(_vocabulary(model), 1000)) if token > 2 and token not in special]
    device = next((each.device for each in model.parameters() if not each.is_meta), torch.device("cpu"))
    chosen = [usable[(7 * index * index + 13 * index + 5) % len(usable)] for index in range(batch * positions)]
    return torch.tensor(chosen, device=device).reshape(batch, positions)


def _vocabulary(model: torch.nn.Module) -> int:
    table = declared(model, "get_input_embeddings")
    weight = getattr(table, "weight", None)
    if isinstance(weight, torch.Tensor):
        return int(weight.shape[0])
    return max((each.num_embeddings for each in model.modules() if isinstance(each, torch.nn.Embedding)), default=100)


def declared(model: torch.nn.Module, getter: str) -> torch.nn.Module | None:
    """What a model itself says its embeddings are; not every class that has the method knows an answer."""
    method = getattr(model, getter, None)
    try:
        found = method() if callable(method) else None
    except (NotImplementedError, AttributeError):
        return None
    return found if isinstance(found, torch.nn.Module) else None


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """The model without dropout; each module gets its own mode back."""
    modes = {each: each.training for each in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for each, training in modes.items():
            each.training = training
