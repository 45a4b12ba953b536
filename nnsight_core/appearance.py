"""What a proxy looks like to Python: its class, its text, its copies."""

from __future__ import annotations

import copy
from typing import Any

import torch

from nnsight_core.arguments import NEVER_CAME, PENDING, RELEASED, Standin, unwrap
from nnsight_core.shapes import copied
from nnsight_core.sites import Site


class Appearance(Standin):
    """Shows the value wherever Python asks what kind of thing this is."""

    __slots__ = ()
    _site: Site
    #: Which axis of the value its positions are; 0 where nobody has said so.
    _token_axis = 0

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # isinstance() and the like see the value's class
        # Never a tensor's class where this is none: C code takes the class for a promise of how the memory is laid out.
        value = self._get() if self._value is PENDING else self._value
        gone = value is RELEASED or value is NEVER_CAME
        if gone or (isinstance(value, torch.Tensor) and not issubclass(type(self), torch.Tensor)):
            return type(self)
        return type(self._plain())

    def __contains__(self, item: Any) -> bool:
        return unwrap(item) in self._plain()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._plain().__reduce_ex__(protocol)

    def __copy__(self) -> Any:
        return copy.copy(self._plain())

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copied(self._plain(), memo)

    def __dir__(self) -> list[str]:
        return sorted({"save", "value", "t", *dir(self._plain())})

    def __repr__(self) -> str:
        if self._value is NEVER_CAME:
            return f"<value that never arrived: {self._site.short}>"
        if self._value is RELEASED:
            return f"<value released: {self._site.short} did not save it>"
        return repr(self._value)

    def __str__(self) -> str:
        return repr(self) if self._value in (RELEASED, NEVER_CAME) else str(self._plain())
