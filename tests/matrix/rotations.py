"""What is promised of queries and keys before their rotation, held against what the model's own file hands to the
function that rotates.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from nnterp.errors import MissingPartError
from tests.matrix import hooks
from tests.matrix.models import Case

#: What transformers' files call a function, or a module, that rotates.
_ROTATES = re.compile(r"_?apply_(rotary|multidimensional)\w*(?<!vision)|apply_rotary_emb")
Given = list[torch.Tensor]


def _layers(case: Case) -> list[tuple[int, torch.nn.Module]]:
    """The layers with attention, and the module that runs."""
    found = []
    for index in range(case.num_layers):
        place = case.place("attentions", index, "output")
        path = case.model._plan.layers[index].attention
        if place and path:
            module = case.module.get_submodule(path)
            several = isinstance(module, torch.nn.ModuleList)
            found.append((index, case.module.get_submodule(place[0]) if several else module))
    return found


@contextlib.contextmanager
def _rotating(attention: torch.nn.Module, change: Callable[[int, torch.Tensor], torch.Tensor]) -> Iterator[Given]:
    """While it lasts, what the attention rotates in its first call is written down, tensor by tensor, and changed."""
    given: Given = []
    inside = [False, False]

    def wrapped(plain: Any) -> Any:
        def rotate(*args: Any, **kwargs: Any) -> Any:
            if not inside[0]:
                return plain(*args, **kwargs)
            changed = []
            for each in args:
                if _is_rotated(each):
                    given.append(each.clone())
                    each = change(len(given) - 1, each.clone())
                changed.append(each)
            return plain(*changed, **kwargs)

        return rotate

    def enter(*_: Any) -> None:
        inside[0] = not inside[1]

    def leave(*_: Any) -> None:
        inside[:] = [False, True]

    handles = [attention.register_forward_pre_hook(enter), attention.register_forward_hook(leave)]
    with contextlib.ExitStack() as stack:
        kinds = {type(module) for module in attention.modules()}
        for holder in {*kinds, *(sys.modules[each.__module__] for each in kinds)}:
            for name, value in list(vars(holder).items()):
                plain = value.__func__ if isinstance(value, staticmethod) else value
                if _ROTATES.fullmatch(name) and callable(plain):
                    new = staticmethod(wrapped(plain)) if isinstance(value, staticmethod) else wrapped(plain)
                    stack.enter_context(mock.patch.object(holder, name, new))
        try:
            yield given
        finally:
            for handle in handles:
                handle.remove()


def _is_rotated(given: Any) -> bool:
    # Cosines and sines are the same for all prompts.
    is_tensor = isinstance(given, torch.Tensor) and given.ndim == 4 and given.is_floating_point()
    return is_tensor and given.shape[0] > 1


def _in(tensor: torch.Tensor, seen: torch.Tensor) -> slice | None:
    """Where in the last axis of ``seen``, (batch, head, position, head_dim), what was rotated stands."""
    for given in (tensor, tensor.transpose(1, 2)):
        width = given.shape[-1]
        for start in range(seen.shape[-1] - width + 1):
            if given.shape[:3] == seen.shape[:3] and torch.equal(seen[..., start : start + width], given):
                return slice(start, start + width)
    return None


def rotated(which: int) -> Callable[[Case], None]:
    """Queries, or keys, before their rotation: read, written back, and set, so that the model rotates what was set."""
    name = ("queries_pre_rope", "keys_pre_rope")[which]

    def check(case: Case) -> None:
        access = getattr(case.model, name)
        for index, attention in _layers(case):
            with _rotating(attention, lambda _, each: each) as given:
                hooks.logits(case.module, case.ids)
            if len(given) < which + 1:
                # Nothing is rotated, or the keys are those of another layer.
                _refused(case, access, index)
                continue
            with torch.no_grad(), case.model.trace(case.ids):
                seen = access[index].save()
                access[index] = access[index]
                back = case.model.logits.save()
            assert torch.equal(back, case.logits), f"writing back {name}[{index}]"
            found = [(number, part) for number, each in enumerate(given) if (part := _in(each, seen.value)) is not None]
            assert found, f"{name}[{index}] is nothing that is rotated"
            _set(case, access, index, attention, *found[0])

    return check


def _set(case: Case, access: Any, index: int, attention: torch.nn.Module, number: int, part: slice) -> None:
    def change(which: int, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * 1.5 if which == number else tensor

    with _rotating(attention, change):
        truth = hooks.logits(case.module, case.ids)
    with torch.no_grad(), case.model.trace(case.ids):
        access[index][..., part] *= 1.5
        logits = case.model.logits.save()
    error = float((logits - truth).abs().max() / truth.abs().max())
    assert error < 1e-4, f"logits after a change of {access.name}[{index}]: off by {error:.3g} of their size"
    assert not torch.equal(logits, case.logits), f"{access.name}[{index}]: nothing came of it"


def _refused(case: Case, access: Any, index: int) -> None:
    try:
        with torch.no_grad(), case.model.trace(case.ids):
            access[index].save()
    except MissingPartError as error:
        assert f"{access.name}[{index}]" in str(error)
    else:
        raise AssertionError(f"{access.name}[{index}] can be read, where the layer rotates nothing")


def _has_rotation(case: Case) -> bool:
    for _, attention in _layers(case):
        with _rotating(attention, lambda _, each: each) as given:
            hooks.logits(case.module, case.ids)
        if given:
            return True
    return False


PROMISES: dict[str, Callable[[Case], None]] = {"queries_pre_rope": rotated(0), "keys_pre_rope": rotated(1)}
PRESENT: dict[str, Callable[[Case], bool]] = dict.fromkeys(PROMISES, _has_rotation)
