"""The truth: what plain PyTorch hooks read in a model, and what it gives when they change something.

Nothing here imports the engine or the specifications. What is read is copied at once: some models go on to write into
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from tests.oracle import get as get_at
from tests.oracle import put, tensor_paths

#: A module's path and "input" or "output".
Place = tuple[str, str]
#: From the first tensor at a place to another one.
Change = Callable[[torch.Tensor], torch.Tensor]

Mode = TypeVar("Mode", bound=TorchFunctionMode)


@contextmanager
def hooked(model: torch.nn.Module, place: Place, see: Callable[[Any], Any], always: bool = False) -> Iterator[None]:
    """While it lasts, ``see`` gets what stands at ``place`` in the module's first call, or first in every run.

    What it gives back, if anything, takes the value's place.
    """
    path, kind = place
    module, calls = model.get_submodule(path), 0

    def begin(*_: Any) -> None:
        nonlocal calls
        calls = 0 if always else calls

    def before(_: Any, args: Any, kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return see((args, kwargs)) if calls == 1 else None

    def after(_: Any, args: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        return see(output) if calls == 1 else None

    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True)
        if kind == "input"
        else module.register_forward_hook(after)
    )
    runs = model.register_forward_pre_hook(begin)
    try:
        yield
    finally:
        handle.remove()
        runs.remove()


@contextmanager
def inside(module: torch.nn.Module, mode: Mode) -> Iterator[Mode]:
    """While it lasts, torch functions go through ``mode`` as long as the module's call runs."""
    before = module.register_forward_pre_hook(lambda *_: mode.__enter__() and None)
    after = module.register_forward_hook(lambda *_: mode.__exit__(None, None, None))
    try:
        yield mode
    finally:
        before.remove()
        after.remove()


def first(value: Any) -> torch.Tensor:
    """The first tensor in what a module takes or gives."""
    found: torch.Tensor = get_at(value, tensor_paths(value)[0])
    return found


def with_first(value: Any, new: torch.Tensor) -> Any:
    """The same with another first tensor."""
    return put(value, tensor_paths(value)[0], new)


def logits_of(output: Any) -> torch.Tensor:
    """The logits in what a model gives."""
    found: torch.Tensor = output.logits if hasattr(output, "logits") else first(output)
    return found


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """The plain model's logits, (batch, position, vocab)."""
    with torch.no_grad():
        return logits_of(model(input_ids=ids)).clone()


def read(model: torch.nn.Module, places: Iterable[Place], ids: torch.Tensor) -> dict[Place, torch.Tensor]:
    """A copy of the first tensor at each of ``places``, at the module's first call."""
    found: dict[Place, torch.Tensor] = {}

    def read_from(rest: list[Place]) -> None:
        if not rest:
            logits(model, ids)
            return

        def see(value: Any) -> None:
            found[rest[0]] = first(value).detach().clone()

        with hooked(model, rest[0], see):
            read_from(rest[1:])

    read_from(list(dict.fromkeys(places)))
    return found


def changed_logits(model: torch.nn.Module, place: Place, change: Change, ids: torch.Tensor) -> torch.Tensor:
    """The model's logits when the first tensor at ``place`` is changed."""
    with hooked(model, place, lambda value: with_first(value, change(first(value).clone()))):
        return logits(model, ids)
