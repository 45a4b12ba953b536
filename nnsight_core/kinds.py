"""The kinds of values of a module's own call: what it takes, what it gives, and what both together tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Derived", "place_of", "Whole"]

#: A call of a module with what it gives: the module that ran, which in a scan is a copy, its ``(args, kwargs)``, its
#: result.
Whole = tuple[torch.nn.Module, Any, Any]


class Derived(str):
    """The kind of a tensor that is worked out of a call and its result together, and that the model itself never has.

    Args:
        name: tells it from other kinds of the same module.
        get: works it out.
        put: what the call is to give instead when the tensor has been set: called with the call and its result, the
            tensor as it was, and as it was set.
    """

    get: Callable[[Whole], torch.Tensor]
    put: Callable[[Whole, torch.Tensor, torch.Tensor], Any]

    def __new__(
        cls,
        name: str,
        get: Callable[[Whole], torch.Tensor],
        put: Callable[[Whole, torch.Tensor, torch.Tensor], Any],
    ) -> Derived:
        made = super().__new__(cls, f"{name} output")
        made.get, made.put = get, put
        return made


def place_of(kind: str) -> str:
    """At which end of a call a value of this kind comes: ``"input"`` or ``"output"``; others are their own place.

    >>> place_of("skip"), place_of("source.softmax_0.input")
    ('input', 'source.softmax_0.input')
    """
    if isinstance(kind, Derived):
        return "output"
    return "input" if kind == "skip" else kind
