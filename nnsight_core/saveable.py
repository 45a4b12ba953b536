"""Results that leave a trace plainly: descriptions of values, and Python's own numbers.

A number lives as long as its variable and needs no saving, but scripts that save everything may save it too.
"""

from __future__ import annotations

from typing import Any

import torch

#: Results that are handed out as they are: descriptions of a value rather than values of the model.
_PLAIN = (type(None), bool, str, bytes, torch.Size, torch.dtype, torch.device, torch.layout, type(NotImplemented))


class _Saveable:
    """Plain numbers that come out of a trace still answer to ``.save()`` and ``.value``."""

    def save(self) -> Any:
        """The number itself."""
        return self

    @property
    def value(self) -> Any:
        """The number itself."""
        return self


class SaveableInt(_Saveable, int):
    """An ``int`` that a script may call ``.save()`` on."""


class SaveableFloat(_Saveable, float):
    """A ``float`` that a script may call ``.save()`` on."""


_SAVEABLE: dict[type, type] = {int: SaveableInt, float: SaveableFloat}


def as_plain_result(value: Any) -> Any:
    """``value`` as a trace hands it out if that is plainly, and NotImplemented if it is to be a proxy."""
    if isinstance(value, _PLAIN):
        return value
    kind = _SAVEABLE.get(type(value))
    return NotImplemented if kind is None else kind(value)
