"""A mapping that nobody can change, and that can be hashed, copied and pickled."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import TypeVar

__all__ = ["FrozenMapping"]

K = TypeVar("K", bound=Hashable)
V = TypeVar("V", covariant=True)


class FrozenMapping(Mapping[K, V]):
    """A read-only copy of a mapping.

        FrozenMapping({"a": 1})["a"]        # 1

    `types.MappingProxyType` is a view of a dictionary that others may change, cannot be hashed and cannot be pickled,
    so what holds one can be neither a dataclass default nor part of a model that is copied.
    """

    __slots__ = ("_entries",)

    def __init__(self, entries: Mapping[K, V] | None = None) -> None:
        self._entries = dict(entries or {})

    def __getitem__(self, key: K) -> V:
        return self._entries[key]

    def __iter__(self) -> Iterator[K]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __hash__(self) -> int:
        return hash(frozenset(self._entries.items()))

    def __repr__(self) -> str:
        return f"FrozenMapping({self._entries!r})"
