"""Proxies among the arguments of a call: found, replaced by their values, and watched for being changed."""

from __future__ import annotations

import array
import collections
import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy
import torch

from nnsight_core.values import entries_of, is_dataclass_value, rebuilt

#: Stands in a proxy for a value that has yet to arrive.
PENDING: Any = type("Pending", (), {"__repr__": lambda self: "<pending>"})()
#: Stands in a proxy for a value that was to be kept and never came.
NEVER_CAME: Any = type("NeverCame", (), {"__repr__": lambda self: "<never arrived>"})()
#: Stands in a proxy for a value that was let go.
RELEASED: Any = type("Released", (), {"__repr__": lambda self: "<released>"})()

#: Tensors of up to so many numbers are copied when a step is recorded that uses them.
_SMALL = 2**20
#: What is no container of proxies, and can be changed in place.
_CHANGEABLE = (numpy.ndarray, bytearray, set, collections.deque, array.array)
_LEAVES = (torch.Tensor, str, int, float, bool, type(None), torch.nn.Module)


class Standin:
    """What every proxy is at bottom: a value, the scope that it lives in, and its place in the model."""

    __slots__ = ()
    _value: Any
    _scope: Any
    _origin: Any
    _tape: Any

    def _get(self) -> Any:
        raise TypeError(f"{type(self).__name__} has no value.")

    def _plain(self) -> Any:
        raise TypeError(f"{type(self).__name__} has no value.")

    def save(self) -> Any:
        """Keep the value beyond the trace."""
        raise TypeError(f"{type(self).__name__} has no value.")


def is_same_value(proxy: Any, other: Any) -> bool:
    """Whether ``other`` is a proxy, too, of the very value that ``proxy`` has; False where that has yet to arrive."""
    return issubclass(type(other), Standin) and other._value is proxy._value and proxy._value is not PENDING


def _version(tensor: Any) -> int:
    # Tensors made in inference mode do not count their changes.
    return -1 if not isinstance(tensor, torch.Tensor) or tensor.is_inference() else tensor._version


class Met:
    """The proxies that were met while arguments were unwrapped."""

    __slots__ = ("_places", "scope")

    def __init__(self) -> None:
        #: The scope of the first proxy whose trace is still open.
        self.scope: Any = None
        self._places: list[tuple[Any, Any, int]] = []

    def add(self, proxy: Any, value: Any) -> None:
        """Note a proxy and its value."""
        if proxy._scope.open:
            self.scope = self.scope or proxy._scope
            if proxy._origin is not None:
                self._places.append((proxy._origin, value, _version(value)))

    def check_changes(self) -> None:
        """Raises:
        OutOfOrderError: the call has changed a value in place that the model has gone by.
        """
        for origin, value, version in self._places:
            if _version(value) != version:
                origin.event.check_writable()


def unwrap(value: Any, met: Met | None = None) -> Any:
    """``value`` with every proxy inside containers of any kind replaced by its value."""
    kind = type(value)
    if issubclass(kind, Standin):
        inner = value._plain()
        if met is not None:
            met.add(value, inner)
        return inner
    if issubclass(kind, _LEAVES):
        return value
    if kind is tuple:
        return tuple([unwrap(entry, met) for entry in value])
    if kind is list:
        return [unwrap(entry, met) for entry in value]
    if kind is dict:
        return {key: unwrap(entry, met) for key, entry in value.items()}
    if kind is slice:
        return slice(unwrap(value.start, met), unwrap(value.stop, met), unwrap(value.step, met))
    if issubclass(kind, (tuple, list, Mapping)) or is_dataclass_value(value):
        return rebuilt(value, lambda entry: unwrap(entry, met))
    return value


def pending_tape(value: Any) -> Any:
    """The tape of the first pending proxy inside containers of any kind; None if all values are there."""
    kind = type(value)
    if issubclass(kind, Standin):
        return value._tape if value._value is PENDING else None
    if issubclass(kind, _LEAVES):
        return None
    entries: Iterable[Any]
    if kind is tuple or kind is list:
        entries = value
    elif kind is slice:
        entries = (value.start, value.stop, value.step)
    elif issubclass(kind, (tuple, list, Mapping)) or dataclasses.is_dataclass(kind):
        entries = [entry for _, entry in entries_of(value)]
    else:
        return None
    for entry in entries:
        tape = pending_tape(entry)
        if tape is not None:
            return tape
    return None


def frozen(value: Any) -> Any:
    """``value`` with containers, arrays and small tensors copied: what a script later does to its own changes nothing.

    Large tensors are kept as they are; that they have been changed is noticed when they are used.
    """
    return mapped(value, _frozen)


def _frozen(value: Any) -> Any:
    if issubclass(type(value), Standin):
        return value._tape.standing(value) if value._value is PENDING else value
    return copied_if_plain(value)


def copied_if_small(value: Any) -> Any:
    """A copy of a tensor that is not too large for one; anything else as it is."""
    return value.clone() if type(value) is torch.Tensor and value.numel() <= _SMALL else value


def copied_if_plain(value: Any) -> Any:
    """A copy of what a script may change in place: arrays, sets, and tensors that are not too large for it."""
    return copy.copy(value) if isinstance(value, _CHANGEABLE) else copied_if_small(value)


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """``value`` with ``change`` applied to everything inside containers of any kind; the containers are new ones."""
    kind = type(value)
    if issubclass(kind, (Standin, *_LEAVES)):
        return change(value)
    if kind is list or kind is tuple:
        return kind([mapped(entry, change) for entry in value])
    if kind is dict:
        return {key: mapped(entry, change) for key, entry in value.items()}
    if kind is slice:
        return slice(*(mapped(each, change) for each in (value.start, value.stop, value.step)))
    if issubclass(kind, (tuple, list, Mapping)) or is_dataclass_value(value):
        return rebuilt(value, lambda entry: mapped(entry, change))
    return change(value)


def apply(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``function`` on the values of proxies, wherever they stand in the arguments.

    Inside a trace the result is a proxy again; once all proxies are finished it is the plain result.
    """
    tape = pending_tape((args, kwargs))
    if tape is not None:
        # Not the function alone, which would get the proxies of what has arrived by then.
        return tape.record(apply, function, *args, **kwargs)
    met = Met()
    plain_args, plain_kwargs = unwrap(args, met), unwrap(kwargs, met) if kwargs else kwargs
    result = function(*plain_args, **plain_kwargs)
    met.check_changes()
    # What came in plainly and comes back itself, as `total += value` does, stays what it was.
    if met.scope is None or any(result is each for each in args):
        return result
    return met.scope.wrap(result)


def call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``, as a step that can be recorded."""
    return function(*args, **kwargs)


def call_method(proxy: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """``proxy.name(*args, **kwargs)``, as a step that can be recorded."""
    return getattr(proxy, name)(*args, **kwargs)
