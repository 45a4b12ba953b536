"""Patching as everyone writes it first: plain hooks and one pass of the untouched model for each site."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch

from tests.matrix import hooks
from tests.matrix.models import Case


def place(case: Case, kind: str, layer: int) -> hooks.Place | None:
    """Where in the plain model the values of a kind of site stand; None where the layer has no such part."""
    accessor, _, end = kind.rpartition("_")
    return case.place(accessor, layer, end)


def run(case: Case, ids: torch.Tensor, changes: Mapping[hooks.Place, hooks.Change]) -> torch.Tensor:
    """The plain model's logits, (prompt, position, vocab), with the first tensors at some places replaced."""
    with ExitStack() as stack:
        for at, change in changes.items():
            stack.enter_context(hooks.hooked(case.module, at, _seen(change)))
        return hooks.logits_of(case.module(input_ids=ids))


def _seen(change: hooks.Change) -> Any:
    return lambda value: hooks.with_first(value, change(hooks.first(value)))


def read(
    case: Case, ids: torch.Tensor, at: hooks.Place, changes: Mapping[hooks.Place, hooks.Change] | None = None
) -> torch.Tensor:
    """The plain model's value at a place, (prompt, position, hidden), before it is changed."""
    found: list[torch.Tensor] = []
    given = dict(changes or {})
    after = given.pop(at, None)

    def keep(value: torch.Tensor) -> torch.Tensor:
        found.append(value.clone())
        return value if after is None else after(value)

    run(case, ids, {**given, at: keep})
    return found[0].view(*ids.shape, -1)


def put(source: torch.Tensor, positions: Any = slice(None)) -> hooks.Change:
    """A change that takes some positions from elsewhere."""

    def change(value: torch.Tensor) -> torch.Tensor:
        # Some layers hand all tokens to their MLP in one axis.
        new = value.clone().view(source.shape)
        new[:, positions] = source[:, positions]
        return new.view(value.shape)

    return change
