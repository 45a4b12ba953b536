"""Inside attention: what its heads ask, offer and give, read and set where the model hands it to its kernel.

The fast kernel stays: its arguments and its result are the values, so that nothing is computed twice.
"""

from __future__ import annotations

import dis
from functools import partial
from typing import Any

import torch

from nnsight_core.envoy import Envoy
from nnsight_core.sites import Site, user_site
from nnterp.accessors import Place, ValueAccess, read, write
from nnterp.errors import UsageError

_KERNEL = "source.scaled_dot_product_attention_0"
_ARGUMENTS = ("query", "key", "value")
#: The values, and which argument of the kernel each is.
HEAD_VALUES = {"queries": "query", "keys": "key", "values": "value", "heads_output": None}


class ClosedAttentionError(UsageError):
    """The values of a layer's heads, where its attention cannot be opened."""

    def __init__(self, asked: str, why: str) -> None:
        super().__init__(
            f"{asked} was asked for, but {why}\n"
            "Where the family has it, load the model with attn_implementation='sdpa'; the module's .source shows all "
            "that it computes."
        )


def _why_closed(module: torch.nn.Module) -> str | None:
    """Why the values of the module's heads cannot be reached; None if they can."""
    code = getattr(type(module).forward, "__code__", None)
    if code is None or "ALL_ATTENTION_FUNCTIONS" not in code.co_names:
        return f"{type(module).__name__} does not hand its heads to one of transformers' attention functions."
    loads = [each for each in dis.get_instructions(code) if each.opname.startswith("LOAD")]
    if sum(each.argrepr.count("attention_interface") for each in loads) > 1:
        return f"{type(module).__name__} calls its attention function several times, and no one call has all its heads."
    used = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return None if used == "sdpa" else f"the model runs its attention with {used!r}, and they are read from 'sdpa'."


class HeadAccess(ValueAccess):
    """``queries[i]``, ``keys[i]``, ``values[i]``, ``heads_output[i]``: (batch, head, position, head_dim), read and set.

    They are the arguments and the result of the layer's attention kernel: queries and keys after rotation where the
    family rotates, keys and values of all positions in the cache, with a head for each of ``num_kv_heads``, and the
    output of each head before the output projection (and before a gate, where the family has one after the kernel).
    Setting keys or values changes this layer's attention in this pass; it does not change what the cache holds.

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-llama")
    >>> with model.trace("The Eiffel Tower"):
    ...     keys = model.keys[1].save()
    ...     model.heads_output[1][:, 2] = 0     # without head 2 of layer 1
    ...     logits = model.logits.save()
    >>> keys.shape[1] == model.num_kv_heads
    True

    Raises:
        ClosedAttentionError: the layer does not run scaled dot-product attention through transformers.
        ShapeError: what is set has another shape.
    """

    @classmethod
    def of(
        cls, root: Envoy, attentions: ValueAccess, name: str, modules: tuple[str | None, ...], groups: int
    ) -> HeadAccess:
        """The value called ``name`` of each attention; ``groups`` is the number of query heads to a key's."""
        argument = HEAD_VALUES[name]
        kind = f"{_KERNEL}.{'output' if argument is None else 'input'}"
        get, put = (partial(_argument, argument, groups), partial(_with_argument, argument, groups))
        places = []
        for index, path in enumerate(modules):
            label = f"{name}[{index}]"
            whole = path is not None and argument is None
            place = Place(path or "", kind, label) if whole else Place(path or "", kind, label, get, put)
            places.append(None if path is None else place)
        return cls(root, name, tuple(places), attentions._why_not)

    def _open(self, layer: int) -> Place:
        place = self.place(layer)
        envoy = self._root.get(place.path)
        why = _why_closed(envoy._module)
        if why is not None:
            raise ClosedAttentionError(place.label, why)
        # Says to the trace that the module's operations are to be counted.
        _ = envoy.source
        return place

    def __getitem__(self, layer: int) -> Any:
        site: Site | None = user_site()
        return read(self._root, self._open(layer), site=site)

    __call__ = __getitem__

    def __setitem__(self, layer: int, value: Any) -> None:
        write(self._root, self._open(layer), value)


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
