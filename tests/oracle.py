"""The same reads and writes with plain `register_forward_hook` and `register_forward_pre_hook`: the truth.

Nothing here imports the engine, and containers are taken apart by code of its own. A change is made on a copy of the
value, which then takes the value's place, as an engine must that lets other readers keep what they have read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

#: A module's path and "input" or "output".
Place = tuple[str, str]
#: The keys that lead from a value to a tensor inside it.
Path = tuple[Any, ...]
#: Called with each value as it passes; gives its replacement in a one-tuple, or None for no change.
Visit = Callable[[Place, Any], "tuple[Any] | None"]


def get(value: Any, path: Path) -> Any:
    """What stands at `path` inside `value`."""
    for key in path:
        value = getattr(value, key) if dataclasses.is_dataclass(value) else value[key]
    return value


def put(value: Any, path: Path, new: Any) -> Any:
    """A copy of `value` with `new` at `path`."""
    if not path:
        return new
    key, *rest = path
    entry = put(get(value, (key,)), tuple(rest), new)
    if dataclasses.is_dataclass(value):
        return dataclasses.replace(value, **{key: entry})
    if isinstance(value, dict):
        return {**value, key: entry}
    entries = [entry if number == key else old for number, old in enumerate(value)]
    if hasattr(value, "_fields"):
        return type(value)(*entries)
    return tuple(entries) if isinstance(value, tuple) else entries


def tensor_paths(value: Any, path: Path = ()) -> list[Path]:
    """Where in `value` tensors stand."""
    if isinstance(value, torch.Tensor):
        return [path]
    keys: Iterable[Any] = ()
    if dataclasses.is_dataclass(value):
        keys = [field.name for field in dataclasses.fields(value)]
    elif isinstance(value, dict):
        keys = list(value)
    elif isinstance(value, (tuple, list)):
        keys = range(len(value))
    return [found for key in keys for found in tensor_paths(get(value, (key,)), (*path, key))]


@contextmanager
def visiting(model: torch.nn.Module, visit: Visit) -> Iterator[None]:
    """While it lasts, `visit` sees the input `(args, kwargs)` and the output of every call of every module."""
    handles = []
    for path, module in model.named_modules():

        def before(_: Any, args: Any, kwargs: Any, path: str = path) -> Any:
            changed = visit((path, "input"), (args, kwargs))
            return None if changed is None else changed[0]

        def after(_: Any, args: Any, output: Any, path: str = path) -> Any:
            changed = visit((path, "output"), output)
            return None if changed is None else changed[0]

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def order(model: torch.nn.Module, *args: Any, **kwargs: Any) -> list[tuple[Place, list[Path]]]:
    """Every value that passes in one run, in order, and where tensors stand in it."""
    seen: list[tuple[Place, list[Path]]] = []

    def visit(place: Place, value: Any) -> None:
        seen.append((place, tensor_paths(value)))

    with torch.no_grad(), visiting(model, visit):
        model(*args, **kwargs)
    return seen


def read(model: torch.nn.Module, places: Iterable[Place], *args: Any, **kwargs: Any) -> dict[Place, Any]:
    """The first value at each of `places`."""
    wanted, found = set(places), dict[Place, Any]()

    def visit(place: Place, value: Any) -> None:
        if place in wanted:
            found.setdefault(place, value)

    with visiting(model, visit):
        model(*args, **kwargs)
    return found


def write(model: torch.nn.Module, changes: Mapping[Place, Callable[[Any], Any]], *args: Any, **kwargs: Any) -> Any:
    """The model's output when the first value at each place of `changes` is replaced by what its function gives."""
    left = dict(changes)

    def visit(place: Place, value: Any) -> tuple[Any] | None:
        change = left.pop(place, None)
        return None if change is None else (change(value),)

    with visiting(model, visit):
        return model(*args, **kwargs)


def logits_with_hook(module: Any, ids: torch.Tensor, at: Any = None, hook: Any = None) -> torch.Tensor:
    """The logits of a plain language model, with a forward hook on one of its modules."""
    handle = None if at is None else at.register_forward_hook(hook)
    try:
        logits: torch.Tensor = module(ids).logits
    finally:
        if handle is not None:
            handle.remove()
    return logits


def seen_by_hook(at: Any, run: Callable[[], Any]) -> list[Any]:
    """What the module ``at`` gives, call by call, while ``run()`` lasts."""
    seen: list[Any] = []
    handle = at.register_forward_hook(lambda m, args, output: seen.append(output))
    try:
        run()
    finally:
        handle.remove()
    return seen
