"""Attention that runs one of torch's kernels by way of transformers: its values are the kernel's arguments and result.

The kernel stays, and nothing is computed twice.
"""

from __future__ import annotations

import dis
import inspect
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from types import CodeType
from typing import Any

import torch

from nnsight_core.values import first_tensor, with_first_tensor
from nnterp.accessors import Place
from nnterp.attention_places import Attention, AttentionPlaces

#: What transformers calls a way to run attention, and the operation of torch's that it ends in.
KERNELS = {"sdpa": "scaled_dot_product_attention", "flex_attention": "flex_attention"}
_ARGUMENTS = ("query", "key", "value")


def kernel_places(attention: Attention) -> AttentionPlaces:
    """The values of attention that hands its heads to a kernel of torch's, once in each call."""
    module = attention.envoy._module
    why = _why_closed(module)
    return places_in_kernel(attention, KERNELS[_used(module)]) if why is None else AttentionPlaces.closed(why)


#: Why the kernel does not tell what its heads do.
_SINKS = (
    "flex_attention runs without the sinks of this family, and what its heads give is made smaller by their share "
    "afterwards: load the model with attn_implementation='eager'."
)


def _has_sinks(module: torch.nn.Module) -> bool:
    code: CodeType = inspect.unwrap(type(module).forward).__code__
    return any("s_aux" in each for each in code.co_consts if isinstance(each, tuple))


def places_in_kernel(attention: Attention, kernel: str) -> AttentionPlaces:
    """The values of a module that calls ``kernel``, an operation of torch's, once in each of its calls."""
    module, operation = attention.envoy._module, f"source.{kernel}_0"
    heads = _Heads(getattr(module, "num_key_value_groups", None) or attention.groups, attention.heads)

    def argument(name: str) -> Place:
        get, put = partial(_argument, name, heads), partial(_with_argument, name, heads)
        return Place(attention.path, f"{operation}.input", name, get, put)

    def result(what: str) -> Place:
        return Place(attention.path, f"{operation}.{what}", what, heads.given, _giving)

    has_sinks = kernel == "flex_attention" and _has_sinks(module)
    places = AttentionPlaces(
        queries=argument("query"),
        keys=argument("key"),
        values=argument("value"),
        scores=result("scores"),
        probabilities=result("probabilities"),
        heads_output=result("output"),
    )
    return replace(places, scores=_SINKS, probabilities=_SINKS, heads_output=_SINKS) if has_sinks else places


@dataclass(frozen=True)
class _Heads:
    """How many heads of queries there are to one of keys, and in all; 0 if nobody knows."""

    groups: int
    count: int

    def given(self, result: Any) -> torch.Tensor:
        """The same, of what a kernel gives, who knows what beside it."""
        return self.apart(first_tensor(result))

    def apart(self, value: torch.Tensor) -> torch.Tensor:
        """(batch, head, query, ...): of a single query, heads with the same keys may stand in the place of queries."""
        is_packed = self.groups > 1 and value.shape[1] != self.count == value.shape[1] * value.shape[2]
        return value.flatten(1, 2)[:, :, None] if is_packed and value.shape[2] == self.groups else value


def _in_form(value: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    return new.reshape(value.shape)


def _giving(result: Any, new: torch.Tensor) -> Any:
    return with_first_tensor(result, _in_form(first_tensor(result), new))


def _why_closed(module: torch.nn.Module) -> str | None:
    """Why the values of the module's heads cannot be reached; None if they can."""
    # A release of transformers that renames an argument wraps the forward.
    calls = _calls(getattr(inspect.unwrap(type(module).forward), "__code__", None))
    if not calls:
        return f"{type(module).__name__} does not hand its heads to one of transformers' attention functions."
    if calls > 1:
        return f"{type(module).__name__} calls its attention function several times, and no one call has all its heads."
    used = _used(module)
    return None if used in KERNELS else f"the model runs its attention with {used!r}, not with one of {[*KERNELS]}."


def _used(module: torch.nn.Module) -> Any:
    return getattr(getattr(module, "config", None), "_attn_implementation", None)


@lru_cache(maxsize=256)
def _calls(code: CodeType | None) -> int:
    """How often a forward calls one of transformers' attention functions."""
    if code is None or "ALL_ATTENTION_FUNCTIONS" not in code.co_names:
        return 0
    loads = [each for each in dis.get_instructions(code) if each.opname.startswith("LOAD")]
    return max(1, sum(each.argrepr.count("attention_interface") for each in loads))


def _argument(name: str, heads: _Heads, call: Any) -> torch.Tensor:
    value, query = _given(name, call), heads.apart(_given("query", call))
    if name == "query":
        return query
    return value[:, :: heads.groups] if _is_repeated(heads.groups, query, value) else value


def _given(name: str, call: Any) -> torch.Tensor:
    args, kwargs = call
    position = _ARGUMENTS.index(name)
    value: torch.Tensor = args[position] if position < len(args) else kwargs[name]
    return value


def _with_argument(name: str, heads: _Heads, call: Any, new: torch.Tensor) -> Any:
    args, kwargs = call
    position, old = _ARGUMENTS.index(name), _given(name, call)
    if name == "query":
        new = _in_form(old, new)
    elif new.shape != old.shape:
        new = new.repeat_interleave(heads.groups, 1)
    if position < len(args):
        return (*args[:position], new, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: new}


def _is_repeated(groups: int, query: torch.Tensor, value: torch.Tensor) -> bool:
    # Under a mask the kernel takes keys and values that have been repeated for every query head. A head for every
    # query head alone does not tell: a family may make as many by other means.
    if groups == 1 or value.shape[1] != query.shape[1]:
        return False
    once = value[:, ::groups]
    return torch.equal(once.repeat_interleave(groups, 1), value)
