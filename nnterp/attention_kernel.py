"""Attention that runs torch's fast kernel by way of transformers: its values are the kernel's arguments and result.

The kernel stays, and nothing is computed twice.
"""

from __future__ import annotations

import dis
from functools import lru_cache, partial
from types import CodeType
from typing import Any

import torch

from nnterp.accessors import Place
from nnterp.attention_places import Attention, AttentionPlaces

_KERNEL = "source.scaled_dot_product_attention_0"
_ARGUMENTS = ("query", "key", "value")


def kernel_places(attention: Attention) -> AttentionPlaces:
    """The values of attention that hands its heads to ``scaled_dot_product_attention``, once in each call."""
    why = _why_closed(attention.envoy._module)
    if why is not None:
        return AttentionPlaces.closed(why)
    given = {}
    for name, argument in zip(("queries", "keys", "values"), _ARGUMENTS, strict=True):
        get, put = partial(_argument, argument, attention.groups), partial(_with_argument, argument, attention.groups)
        given[name] = Place(attention.path, f"{_KERNEL}.input", name, get, put)
    return AttentionPlaces(
        **given,
        scores="the kernel does not show them.",
        probabilities="the kernel does not show them.",
        heads_output=Place(attention.path, f"{_KERNEL}.output", "heads_output"),
    )


def _why_closed(module: torch.nn.Module) -> str | None:
    """Why the values of the module's heads cannot be reached; None if they can."""
    calls = _calls(getattr(type(module).forward, "__code__", None))
    if not calls:
        return f"{type(module).__name__} does not hand its heads to one of transformers' attention functions."
    if calls > 1:
        return f"{type(module).__name__} calls its attention function several times, and no one call has all its heads."
    used = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return None if used == "sdpa" else f"the model runs its attention with {used!r}, and they are read from 'sdpa'."


@lru_cache(maxsize=256)
def _calls(code: CodeType | None) -> int:
    """How often a forward calls one of transformers' attention functions."""
    if code is None or "ALL_ATTENTION_FUNCTIONS" not in code.co_names:
        return 0
    loads = [each for each in dis.get_instructions(code) if each.opname.startswith("LOAD")]
    return max(1, sum(each.argrepr.count("attention_interface") for each in loads))


def _argument(name: str | None, groups: int, call: Any) -> Any:
    value = _given(name, call)
    return value[:, ::groups] if _is_repeated(groups, _given("query", call), value) else value


def _given(name: str | None, call: Any) -> torch.Tensor:
    args, kwargs = call
    assert name is not None
    position = _ARGUMENTS.index(name)
    value: torch.Tensor = args[position] if position < len(args) else kwargs[name]
    return value


def _with_argument(name: str | None, groups: int, call: Any, new: Any) -> Any:
    args, kwargs = call
    assert name is not None
    position = _ARGUMENTS.index(name)
    if new.shape != _given(name, call).shape:
        new = new.repeat_interleave(groups, 1)
    if position < len(args):
        return (*args[:position], new, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: new}


def _is_repeated(groups: int, query: torch.Tensor, value: torch.Tensor) -> bool:
    # Under a mask the kernel takes keys and values that have been repeated for every query head. A head for every
    # query head alone does not tell: a family may make as many by other means.
    if groups == 1 or value is query or value.shape[1] != query.shape[1]:
        return False
    once = value[:, ::groups]
    return torch.equal(once.repeat_interleave(groups, 1), value)
