"""Attention that families write out themselves: its products of matrices and its softmax, found by their order alone.

The softmax is the last of its call, the product of queries and keys the last before it, and that of probabilities and
values the first after it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

Change = Callable[[torch.Tensor], torch.Tensor]
#: Where the operands of a product stand among its arguments, or what they are called there.
_OPERANDS: dict[str, tuple[int | str, int | str]] = {
    "matmul": (0, 1),
    "__matmul__": (0, 1),
    "bmm": (0, 1),
    "einsum": (1, 2),
}
#: How many products of other things stand between that of queries and keys and the softmax: those of positions.
BETWEEN = {"XLNetRelativeAttention": 1}


def _operands(name: str, args: Any, kwargs: Any) -> tuple[int | str, int | str] | None:
    if name == "baddbmm":
        return ("batch1", "batch2") if "batch1" in kwargs else (1, 2)
    found = _OPERANDS.get(name)
    return None if found is None or (name == "einsum" and len(args) < 3) else found


class Steps(TorchFunctionMode):
    """While it is on, the first attention is watched, and ``change`` is made to what has its name.

    Args:
        order: which products of the call are that of queries and keys and that of probabilities and values, and which
            softmax is theirs; None for a call that is only counted.
        change: what is changed.
    """

    def __init__(self, order: tuple[int, int, int] | None, change: dict[str, Change]) -> None:
        super().__init__()
        self.order = order
        self.change = change
        self.names: list[str] = []
        self.seen: dict[str, torch.Tensor] = {}
        self._products = self._softmaxes = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        where = _operands(name, args, kwargs)
        if name == "softmax":
            return self._softmax(function, list(args), kwargs)
        if name == "logsumexp" and self._is_next("softmax"):
            return function(self._scores(args[0]), *args[1:], **kwargs)
        if where is None:
            return function(*args, **kwargs)
        self.names.append("product")
        number, self._products = self._products, self._products + 1
        if self.order is None or number not in self.order[:2]:
            return function(*args, **kwargs)
        return self._product(number == self.order[0], name, function, where, list(args), kwargs)

    def _is_next(self, name: str) -> bool:
        return self.order is not None and name == "softmax" and self._softmaxes == self.order[2]

    def _softmax(self, function: Any, args: list[Any], kwargs: Any) -> Any:
        self.names.append("softmax")
        if self._is_next("softmax"):
            args[0] = self._scores(args[0])
        self._softmaxes += 1
        return function(*args, **kwargs)

    def _scores(self, tensor: torch.Tensor) -> torch.Tensor:
        keys = self.seen["keys"].shape[-2]
        shown = tensor.reshape(self.seen["queries"].shape[:3] + tensor.shape[-1:])
        changed = self._changed("attention_scores", shown[..., :keys])
        return torch.cat([changed, shown[..., keys:]], -1).reshape(tensor.shape)

    def _changed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        self.seen[name] = self.change.get(name, lambda each: each)(tensor)
        return self.seen[name]

    def _product(self, is_first: bool, name: str, function: Any, where: Any, args: list[Any], kwargs: Any) -> Any:
        def shown(tensor: torch.Tensor) -> torch.Tensor:
            # Batch and heads may be on one axis; einsum has positions first.
            return tensor.unflatten(0, (2, -1)) if tensor.ndim == 3 else tensor

        def apart(tensor: torch.Tensor, what: str) -> torch.Tensor:
            if name == "einsum" and what != "attention_probabilities":
                return self._changed(what, tensor.permute(1, 2, 0, 3)).permute(2, 0, 1, 3)
            value = shown(tensor)
            value = value.mT if what == "keys" else value
            value = self._changed(what, value)
            return (value.mT if what == "keys" else value).reshape(tensor.shape)

        what = ("queries", "keys") if is_first else ("attention_probabilities", "values")
        for at, each in zip(where, what, strict=True):
            holder: Any = kwargs if isinstance(at, str) else args
            holder[at] = apart(holder[at], each)
        result = function(*args, **kwargs)
        return result if is_first else apart(result, "heads_output")


@contextlib.contextmanager
def stepwise(module: torch.nn.Module, order: tuple[int, int, int] | None, **change: Change) -> Iterator[Steps]:
    """While it lasts, the module's attention is watched."""
    steps = Steps(order, change)
    before = module.register_forward_pre_hook(lambda *_: steps.__enter__() and None)
    after = module.register_forward_hook(lambda *_: steps.__exit__(None, None, None))
    try:
        yield steps
    finally:
        before.remove()
        after.remove()


def order_of(module: torch.nn.Module, names: list[str]) -> tuple[int, int, int]:
    """The numbers of the products and of the softmax, in a call with operations of these names."""
    last = len(names) - 1 - names[::-1].index("softmax")
    before = names[:last].count("product")
    between = max((BETWEEN.get(type(each).__name__, 0) for each in module.modules()), default=0)
    return before - 1 - between, before, names[:last].count("softmax")
