"""Where a layer keeps its state, as a path: `cache.layers.*.recurrent_states.0`.

The first step says where to begin: at the cache that the mixer is called with, at its output, or at the module. Each
further step is an attribute, a key or an index; `*` is the index of the layer. The steps that are left at a tensor
index its axes, `:` standing for a whole axis.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import yaml

from nnterp.spec_reader import Place

__all__ = ["KeptPath", "read_kept_paths"]

ROOTS = ("cache", "output", "module")
_STEP = re.compile(r"\w+|\*|:")


@dataclasses.dataclass(frozen=True)
class KeptPath:
    """The way to one tensor, read and set.

    >>> KeptPath("output", ("1", "*")).get(("hidden", [10, 20]), layer=1)
    20
    """

    root: str
    steps: tuple[str, ...]

    @property
    def text(self) -> str:
        """The path as the file has it."""
        return ".".join((self.root, *self.steps))

    def get(self, start: Any, layer: int) -> Any:
        """What stands there; None where the way ends before."""
        for index, _ in enumerate(steps := self._steps(layer)):
            if start is None or _is_tensor(start):
                return start if start is None else start[_axes(steps[index:])]
            start = _entry(start, steps[index])
        return start

    def put(self, start: Any, layer: int, value: Any) -> Any:
        """``start`` with ``value`` there. Tuples and lists on the way are made anew, all else is changed in place."""
        return _with(start, self._steps(layer), value)

    def _steps(self, layer: int) -> tuple[str, ...]:
        return tuple(str(layer) if step == "*" else step for step in self.steps)


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "index_select")


def _axes(steps: tuple[str, ...]) -> tuple[Any, ...]:
    return tuple(slice(None) if step == ":" else int(step) for step in steps)


def _entry(owner: Any, step: str) -> Any:
    if isinstance(owner, Mapping):
        return owner.get(int(step) if step.isdigit() else step)
    if not step.isdigit():
        return getattr(owner, step, None)
    return owner[int(step)] if int(step) < len(owner) else None


def _with(owner: Any, steps: tuple[str, ...], value: Any) -> Any:
    if not steps:
        return value
    if _is_tensor(owner):
        changed = owner.clone()
        changed[_axes(steps)] = value
        return changed
    step, rest = steps[0], steps[1:]
    entry = _with(_entry(owner, step), rest, value)
    if isinstance(owner, (tuple, list)):
        return type(owner)(entry if index == int(step) else each for index, each in enumerate(owner))
    if isinstance(owner, Mapping):
        owner[int(step) if step.isdigit() else step] = entry  # type: ignore[index]
    elif step.isdigit():
        owner[int(step)] = entry
    else:
        setattr(owner, step, entry)
    return owner


def read_kept_paths(place: Place) -> tuple[KeptPath, ...]:
    """One path, or a list of them where a state is several tensors; nothing where the file says null."""
    if place.is_null():
        return ()
    several = isinstance(place.node, yaml.SequenceNode)
    return tuple(_read(each) for each in (place.items("a list of paths") if several else [place]))


def _read(place: Place) -> KeptPath:
    text = place.text("a path such as 'cache.layers.*.recurrent_states.0'")
    root, *steps = text.split(".")
    if root not in ROOTS or not steps or not all(_STEP.fullmatch(step) for step in steps):
        raise place.error(
            f"`{place.path}` is no path to a state.",
            found=text,
            expected="cache, output or module, then attributes, keys and indices, joined by dots",
            mend="architectures/README.md shows what each key takes.",
        )
    return KeptPath(root, tuple(steps))
