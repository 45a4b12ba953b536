"""Plain objects of the script's own: kept beyond a trace, with every value that they hold by then."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch

from nnsight_core.arguments import Standin, apply

_open: ContextVar[tuple[weakref.ref[Keeper], ...]] = ContextVar("nnsight_core_keepers", default=())
#: What may hold values, but is not looked into.
_CLOSED = (str, bytes, torch.Tensor, torch.nn.Module, type, ModuleType, FunctionType, MethodType)


class Keeper:
    """The objects that a script wants to have beyond one block; filled as they may be when the block ends."""

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def open(self) -> None:
        """The block begins."""
        _open.set((*_open.get(), weakref.ref(self)))

    def keep(self, value: Any) -> None:
        """Save what ``value`` holds at the end of the block."""
        self._kept.append(value)

    def close(self) -> None:
        """The block ends."""
        opened = _open.get()
        if opened and opened[-1]() is self:
            _open.set(opened[:-1])
        else:
            # Generators and tasks do not end in reverse order.
            _open.set(tuple(each for each in opened if each() is not None and each() is not self))
        kept, self._kept = self._kept, []
        for value in kept:
            _save_inside(value)


def save(value: Any) -> Any:
    """Keep ``value`` beyond the trace: a proxy, or an object of one's own with every proxy in it.

    A list, a dict or another object may be saved first and filled later; what counts is what it holds at the end of
    the trace. It comes back itself.

    >>> from nnsight_core import NNsight, save
    >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)))
    >>> with model.trace(torch.ones(1, 2)):
    ...     found = save([])
    ...     for layer in model:
    ...         found.append(layer.output)
    >>> [tuple(each.shape) for each in found]
    [(1, 2), (1, 2)]
    """
    if issubclass(type(value), Standin):
        return value.save()
    _save_inside(value)
    if not isinstance(value, (*_CLOSED, int, float, complex, type(None))):
        for reference in _open.get():
            keeper = reference()
            if keeper is not None:
                keeper.keep(value)
    return value


def _save_inside(value: Any) -> None:
    for proxy in _proxies(value, set(), is_outermost=True):
        if proxy._scope.open:
            proxy.save()


def _proxies(value: Any, seen: set[int], is_outermost: bool = False) -> Iterator[Any]:
    kind = type(value)
    if issubclass(kind, Standin):
        yield value
        return
    if issubclass(kind, _CLOSED) or id(value) in seen:
        return
    seen.add(id(value))
    entries: Iterable[Any] = ()
    if isinstance(value, Mapping):
        entries = list(value.values())
    elif isinstance(value, (list, tuple, set, frozenset)):
        entries = value
    # Objects lead to objects without end, so only the one that was given, and records, are looked into.
    if is_outermost or hasattr(kind, "__dataclass_fields__"):
        entries = [*entries, *getattr(value, "__dict__", {}).values()]
        entries += [getattr(value, name, None) for name in getattr(kind, "__slots__", ()) if isinstance(name, str)]
    for entry in entries:
        yield from _proxies(entry, seen)


def log(*values: Any) -> None:
    """Print values, as ``print`` does; values that have yet to arrive are printed when they are there.

    >>> from nnsight_core import NNsight, log
    >>> model = NNsight(torch.nn.Sequential(torch.nn.Linear(2, 3)))
    >>> with model.trace() as tracer:
    ...     with tracer.invoke(torch.ones(1, 2)):
    ...         log("features:", model[0].output.size(-1))
    features: 3
    """
    apply(write_line, *values)


def write_line(*values: Any) -> None:
    """The values on one line of the standard output."""
    sys.stdout.write(" ".join(str(each) for each in values) + "\n")
