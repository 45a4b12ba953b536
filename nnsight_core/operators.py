"""Python's operators for something that stands in for a value."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

from nnsight_core.shapes import refuse_numbers

_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "matmul", "pow", "and", "or", "xor", "lshift", "rshift")
_IN_PLACE = frozenset({f"__i{name}__" for name in _BINARY} | {"__setitem__", "__delitem__"})
# These end in an underscore and yet leave the numbers alone.
_HARMLESS = frozenset({"requires_grad_", "share_memory_"})
#: Methods of lists and dicts that change them.
CONTAINER_CHANGES = frozenset("append clear extend insert pop popitem remove reverse setdefault sort update".split())
#: Methods that turn a value into plain Python, for which it has to be there.
LOOKS = frozenset({"item", "tolist", "numpy"})
_NO_OPTIONS: Mapping[str, Any] = {}


def changes_in_place(name: str, kwargs: Mapping[str, Any] = _NO_OPTIONS) -> bool:
    """Whether the torch function of this name changes its tensor, by torch's convention or because it is told to."""
    if kwargs and kwargs.get("inplace") is True:
        return True
    return (name.endswith("_") and not name.endswith("__") and name not in _HARMLESS) or name in _IN_PLACE


class Operators:
    """Arithmetic and comparison by way of ``_operate``; what Python itself must look at, by way of ``_plain``."""

    __slots__ = ()

    def _plain(self) -> Any:
        raise TypeError(f"{type(self).__name__} has no value to operate on.")

    def _operate(self, function: Callable[..., Any], *args: Any) -> Any:
        raise TypeError(f"{type(self).__name__} has no operations.")

    def _operate_in_place(self, function: Callable[[Any, Any], Any], other: Any) -> Any:
        raise TypeError(f"{type(self).__name__} has no operations.")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        import numpy

        value = self._plain()
        refuse_numbers(value, "numpy")
        found = numpy.asarray(value, dtype=dtype)
        return found.copy() if copy else found

    def __format__(self, spec: str) -> str:
        value = self._plain()
        if spec:
            refuse_numbers(value, "format()")
        return format(value, spec)

    def __hash__(self) -> int:
        return hash(self._plain())

    def __bool__(self) -> bool:
        return bool(self._plain())

    def __int__(self) -> int:
        return int(self._plain())

    def __float__(self) -> float:
        return float(self._plain())

    def __complex__(self) -> complex:
        return complex(self._plain())

    def __index__(self) -> int:
        return operator.index(self._plain())

    def __len__(self) -> int:
        return len(self._plain())


def _function(name: str) -> Callable[..., Any]:
    return getattr(operator, f"{name}_" if name in ("and", "or") else name)  # type: ignore[no-any-return]


def _binary(function: Callable[..., Any]) -> Callable[[Operators, Any], Any]:
    return lambda self, other: self._operate(function, self, other)


def _reflected(function: Callable[..., Any]) -> Callable[[Operators, Any], Any]:
    return lambda self, other: self._operate(function, other, self)


def _in_place(function: Callable[..., Any]) -> Callable[[Operators, Any], Any]:
    return lambda self, other: self._operate_in_place(function, other)


def _unary(function: Callable[..., Any]) -> Callable[[Operators], Any]:
    return lambda self: self._operate(function, self)


for _name in _BINARY:
    setattr(Operators, f"__{_name}__", _binary(_function(_name)))
    setattr(Operators, f"__r{_name}__", _reflected(_function(_name)))
    setattr(Operators, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Operators, f"__{_name}__", _binary(_function(_name)))
for _name in ("neg", "pos", "abs", "invert"):
    setattr(Operators, f"__{_name}__", _unary(_function(_name)))
