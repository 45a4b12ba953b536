"""Pure functions on what modules hand on: tensors, tuples, dicts, dataclasses, nested in any way."""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any

import torch

Pair = tuple[tuple[Any, ...], dict[str, Any]]


class NoTensorError(TypeError):
    """A value in which a tensor was looked for holds none."""

    def __init__(self, value: Any) -> None:
        super().__init__(f"There is no tensor in this {type(value).__name__}: {value!r:.200}")


def is_dataclass_value(value: Any) -> bool:
    """Whether ``value`` is an instance of a dataclass (and not the class itself)."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def fitting(old: Any, new: Any) -> Any:
    """``new`` for the place of ``old``: a plain number in the place of a tensor fills it.

    >>> fitting(torch.ones(2), 3)
    tensor([3., 3.])
    """
    if isinstance(old, torch.Tensor) and isinstance(new, (int, float)):
        return torch.full_like(old, new)
    return new


def fitting_copy(old: Any, new: Any) -> Any:
    """The same, and a copy of another tensor: the model may write into what it goes on with."""
    return new.clone() if isinstance(new, torch.Tensor) and new is not old else fitting(old, new)


def fitting_call(old: Pair, new: Pair) -> Pair:
    """The call ``new`` for the place of ``old``: the tensors that are not of ``old`` are copied.

    >>> fitting_call(((), {}), ((1,), {}))
    ((1,), {})
    """
    known = {id(each) for each in (*old[0], *old[1].values())}

    def own(value: Any) -> Any:
        return value.clone() if isinstance(value, torch.Tensor) and id(value) not in known else value

    args, kwargs = new
    return tuple(own(each) for each in args), kwargs and {name: own(each) for name, each in kwargs.items()}


def with_item(container: tuple[Any, ...], index: Any, item: Any) -> tuple[Any, ...]:
    """A tuple (or named tuple) like ``container`` with the entries at ``index`` replaced.

    >>> with_item((1, 2, 3), 0, 9)
    (9, 2, 3)
    """
    entries = list(container)
    entries[index] = fitting(entries[index], item)
    return like_tuple(container, entries)


def like_tuple(container: tuple[Any, ...], entries: list[Any]) -> tuple[Any, ...]:
    """A tuple of ``entries`` of the kind that ``container`` is: plain, named, or torch's pair of values and indices.

    >>> like_tuple(torch.ones(2).max(0), [1, 0]).values
    1
    """
    if hasattr(container, "_fields"):
        return type(container)(*entries)
    return type(container)(entries) if hasattr(container, "n_sequence_fields") else tuple(entries)


def with_entry(container: Any, key: Any, entry: Any) -> Any:
    """A copy of ``container`` (tensor, tuple, list, dict and the like) with ``entry`` at ``key``.

    >>> with_entry(torch.zeros(3), 1, 5.0)
    tensor([0., 5., 0.])
    """
    if isinstance(container, tuple):
        return with_item(container, key, entry)
    changed = own_copy(container)
    if not isinstance(container, torch.Tensor) and not isinstance(key, slice):
        known = not isinstance(container, Mapping) or key in container
        entry = fitting(container[key], entry) if known else entry
    changed[key] = entry
    return changed


def with_attribute(owner: Any, name: str, value: Any) -> Any:
    """``owner`` with its attribute set: a changed copy of a dataclass or named tuple, and anything else in place.

    Raises:
        AttributeError: there is no such attribute, so that nobody would look at it.
    """
    known = hasattr(owner, "_fields") or is_dataclass_value(owner) or isinstance(owner, torch.Tensor)
    # torch's own code marks tensors with names that begin so.
    if known and not name.startswith("_") and not hasattr(owner, name):
        raise _no_attribute(owner, name)
    if hasattr(owner, "_fields") and name in owner._fields:
        return owner._replace(**{name: fitting(getattr(owner, name), value)})
    if hasattr(owner, "n_sequence_fields") and name in owner.__match_args__:
        return with_item(owner, owner.__match_args__.index(name), value)
    value = fitting(getattr(owner, name, None), value)
    if not is_dataclass_value(owner):
        setattr(owner, name, value)
        return owner
    if getattr(type(owner), "__dataclass_params__").frozen:  # noqa: B009 - not in typeshed
        return dataclasses.replace(owner, **{name: value})
    changed = copy.copy(owner)
    setattr(changed, name, value)
    return changed


def _no_attribute(owner: Any, name: str) -> AttributeError:
    names = [each for each in dir(owner) if not each.startswith("_")]
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    mend = f" Did you mean {' or '.join(repr(each) for each in near)}?" if near else ""
    return AttributeError(f"{type(owner).__name__} has no attribute {name!r}, so setting it would do nothing.{mend}")


def own_copy(value: Any) -> Any:
    """A copy that can be changed without anybody else's seeing it; objects of unknown classes are given as they are."""
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, (list, Mapping)) or is_dataclass_value(value):
        return copy.copy(value)
    return value


def entries_of(value: Any) -> list[tuple[Any, Any]]:
    """What ``value`` directly holds, as (key, entry); empty for anything that is not a container."""
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    if isinstance(value, Mapping):
        return list(value.items())
    if is_dataclass_value(value):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return []


def tensors_by_place(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], torch.Tensor]]:
    """The tensors in ``value``, and the keys that lead to each.

    >>> [(path, tuple(tensor.shape)) for path, tensor in tensors_by_place({"a": (torch.zeros(2), None)})]
    [(('a', 0), (2,))]
    """
    if isinstance(value, torch.Tensor):
        return [(path, value)]
    return [found for key, entry in entries_of(value) for found in tensors_by_place(entry, (*path, key))]


def _path_to_first_tensor(value: Any) -> tuple[Any, ...] | None:
    if isinstance(value, torch.Tensor):
        return ()
    for key, entry in entries_of(value):
        rest = _path_to_first_tensor(entry)
        if rest is not None:
            return (key, *rest)
    return None


def _get(container: Any, key: Any) -> Any:
    return container[key] if isinstance(container, (tuple, list, Mapping)) else getattr(container, key)


def _with(container: Any, key: Any, entry: Any) -> Any:
    if isinstance(container, (tuple, list, Mapping)):
        return with_entry(container, key, entry)
    return with_attribute(container, key, entry)


def rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    """``value`` with ``change`` applied to each of its entries; itself where that changes none of them."""
    for key, entry in entries_of(value):
        new = change(entry)
        if new is not entry:
            value = _with(value, key, new)
    return value


def first_tensor(value: Any) -> torch.Tensor:
    """The first tensor that ``value`` holds, looked for depth first.

    >>> first_tensor((torch.tensor([1.0]), None))
    tensor([1.])

    Raises:
        NoTensorError: there is none.
    """
    if isinstance(value, torch.Tensor):
        return value
    path = _path_to_first_tensor(value)
    if path is None:
        raise NoTensorError(value)
    for key in path:
        value = _get(value, key)
    return value  # type: ignore[no-any-return]


def with_first_tensor(value: Any, tensor: Any) -> Any:
    """``value`` with its first tensor replaced by ``tensor``: the writing half of :func:`first_tensor`.

    Putting back what was got changes nothing, and what was put is what is got.

    >>> with_first_tensor((torch.tensor([1.0]), "cache"), torch.tensor([2.0]))
    (tensor([2.]), 'cache')
    """
    if isinstance(value, torch.Tensor):
        return tensor
    path = _path_to_first_tensor(value)
    if path is None:
        raise NoTensorError(value)
    owners = []
    for key in path:
        owners.append((value, key))
        value = _get(value, key)
    for owner, key in reversed(owners):
        tensor = _with(owner, key, tensor)
    return tensor


def first_argument(pair: Pair) -> Any:
    """The first argument of a call given as ``(args, kwargs)``: by position if there is one, else the first by name."""
    args, kwargs = pair
    if args:
        return args[0]
    if kwargs:
        return next(iter(kwargs.values()))
    raise IndexError("This call has no arguments at all, so it has no first one.")


def with_first_argument(pair: Pair, value: Any) -> Pair:
    """The call ``pair`` with its first argument replaced by ``value``."""
    args, kwargs = pair
    if args:
        return (fitting(args[0], value), *args[1:]), kwargs
    if kwargs:
        name = next(iter(kwargs))
        return args, {**kwargs, name: fitting(kwargs[name], value)}
    return (value,), kwargs


def is_pair(value: Any) -> bool:
    """Whether ``value`` has the shape of a call: a tuple of arguments and a dict of keyword arguments."""
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], tuple) and isinstance(value[1], dict)


def map_tensors(function: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """``value`` with ``function`` applied to every tensor inside containers of any kind; all else is kept."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)([map_tensors(function, entry) for entry in value])
    if type(value) is dict:
        return {key: map_tensors(function, entry) for key, entry in value.items()}
    return rebuilt(value, lambda entry: map_tensors(function, entry))


def share_storage(one: Any, other: Any) -> bool:
    """Whether two tensors lie in the same memory, so that writing into one may change the other."""
    for each in (one, other):
        if not isinstance(each, torch.Tensor) or each.layout is not torch.strided:
            return False
    return memory_of(one) == memory_of(other)


def memory_of(tensor: torch.Tensor) -> int:
    """Tells memory that a strided tensor lies in from any other, as long as it is in use."""
    try:
        return tensor.untyped_storage()._cdata  # type: ignore[no-any-return]
    except NotImplementedError:
        # Inside torch.func's transformations a tensor is wrapped, once for each of them.
        return _innermost(tensor).untyped_storage()._cdata  # type: ignore[no-any-return]


def _innermost(tensor: torch.Tensor) -> torch.Tensor:
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor
