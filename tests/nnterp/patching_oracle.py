"""Patching as everyone writes it first: plain hooks and one pass of the untouched model for each site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from nnterp.interventions.metrics import Metric
from tests.matrix import hooks
from tests.matrix.models import Case

#: What an attention module hands to transformers' attention function, in this order, and what comes of it.
ARGUMENTS = ("queries", "keys", "values")
HEADS = (*ARGUMENTS, "heads_output")


def place(case: Case, kind: str, layer: int) -> hooks.Place | None:
    """Where in the plain model the values of a kind of site stand; None where the layer has no such part."""
    if kind in HEADS:
        at = case.place("attentions", layer, "output")
        return None if at is None else (case.layer(layer)[0], kind)
    accessor, _, end = kind.rpartition("_")
    return case.place(accessor, layer, end)


def run(case: Case, ids: torch.Tensor, changes: Mapping[hooks.Place, hooks.Change]) -> torch.Tensor:
    """The plain model's logits, (prompt, position, vocab), with the first tensors at some places replaced."""
    heads: dict[torch.nn.Module, dict[str, hooks.Change]] = {}
    with ExitStack() as stack:
        for at, change in changes.items():
            if at[1] not in HEADS:
                stack.enter_context(hooks.hooked(case.module, at, _seen(change)))
                continue
            # Only an attention module hands itself to the attention function, and a layer has one at most.
            for module in case.module.get_submodule(at[0]).modules():
                heads.setdefault(module, {})[at[1]] = change
        if heads:
            stack.enter_context(_attention(heads))
        return hooks.logits_of(case.module(input_ids=ids))


def _seen(change: hooks.Change) -> Any:
    return lambda value: hooks.with_first(value, change(hooks.first(value)))


def read(
    case: Case, ids: torch.Tensor, at: hooks.Place, changes: Mapping[hooks.Place, hooks.Change] | None = None
) -> torch.Tensor:
    """The plain model's value at a place, before it is changed: (prompt, position, hidden), or as a head has it."""
    found: list[torch.Tensor] = []
    given = dict(changes or {})
    after = given.pop(at, None)

    def keep(value: torch.Tensor) -> torch.Tensor:
        found.append(value.clone())
        return value if after is None else after(value)

    run(case, ids, {**given, at: keep})
    return found[0] if at[1] in HEADS else found[0].view(*ids.shape, -1)


def gradient(
    case: Case, ids: torch.Tensor, at: hooks.Place, metric: Metric, start: torch.Tensor | None = None
) -> torch.Tensor:
    """The gradient of the metric's sum at a place, by a change that makes what stands there a leaf.

    With ``start`` the model starts from these token embeddings.
    """
    leaves: list[torch.Tensor] = []

    def leaf(value: torch.Tensor) -> torch.Tensor:
        leaves.append(value.detach().clone().requires_grad_())
        # The model may write into what it is handed, and into a leaf nobody may.
        return leaves[0].clone()

    changes: dict[hooks.Place, hooks.Change] = {at: leaf}
    if start is not None:
        path = next(name for name, each in case.module.named_modules() if each is case.module.get_input_embeddings())
        changes[path, "output"] = lambda value: start
    found = torch.autograd.grad(metric(run(case, ids, changes)).sum(), leaves[0])[0]
    return found if at[1] in HEADS else found.view(*ids.shape, -1)


def put(source: torch.Tensor, positions: Any = slice(None)) -> hooks.Change:
    """A change that takes some positions from elsewhere."""

    def change(value: torch.Tensor) -> torch.Tensor:
        # Some layers hand all tokens to their MLP in one axis.
        new = value.clone().view(source.shape)
        new[:, positions] = source[:, positions]
        return new.view(value.shape)

    return change


def put_head(source: torch.Tensor, head: int, positions: Any = slice(None)) -> hooks.Change:
    """A change that takes some positions of one head from elsewhere, (prompt, head, position, head_dim)."""

    def change(value: torch.Tensor) -> torch.Tensor:
        new = value.clone()
        new[:, head, positions] = source[:, head, positions]
        return new

    return change


@contextmanager
def _attention(changes: Mapping[torch.nn.Module, Mapping[str, hooks.Change]]) -> Iterator[None]:
    """transformers' attention function with what some modules give it, and get of it, replaced in their first call."""
    usual, left = ALL_ATTENTION_FUNCTIONS["sdpa"], dict(changes)

    def changed(module: torch.nn.Module, *given: Any, **options: Any) -> Any:
        mine = left.pop(module, {})
        arguments = [mine.get(name, _same)(value) for name, value in zip(ARGUMENTS, given[:3], strict=True)]
        output, *rest = usual(module, *arguments, *given[3:], **options)
        return mine.get("heads_output", _same)(output.transpose(1, 2)).transpose(1, 2), *rest

    AttentionInterface.register("sdpa", changed)
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", usual)


def _same(value: torch.Tensor) -> torch.Tensor:
    return value
