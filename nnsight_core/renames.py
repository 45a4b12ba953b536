"""The user's own names for modules -> the extra names that each path answers to. Strings in, strings out.

plan_renames({"transformer.h": "layers"}, ["", "transformer", "transformer.h"])
# {'': {'layers': 'transformer.h'}}
"""

from __future__ import annotations

import keyword
from collections.abc import Callable, Collection, Mapping, Sequence

from nnsight_core.errors import RenameError

#: For each parent path ("" is the root) the extra names of what is below it, each with the full path it stands for.
Aliases = Mapping[str, Mapping[str, str]]
Rename = Mapping[str, "str | Sequence[str]"]


def plan_renames(
    rename: Rename,
    paths: Collection[str],
    taken: Callable[[str, str], bool] = lambda path, name: False,
    aliases: Aliases | None = None,
) -> dict[str, dict[str, str]]:
    """The extra names that a model answers to.

    A key of ``rename`` is a module's name, wherever it occurs, or a dotted path, from any module or, if it begins with
    a dot, from the root; it may use other new names. A value is the new name, or a list of them. A new name stands
    beside the old one; beginning with a dot it stands at the root, and dotted, below the module that it names.

    Args:
        rename: the user's names.
        paths: the paths of all modules.
        taken: whether the module at a path has something else of a name already: ``taken(path, name)``.
        aliases: extra names that there are already.

    Raises:
        RenameError: a key fits no module, a new name belongs to something else or is given twice, or either of them
            is no name.
    """
    if not isinstance(rename, Mapping):
        what = f"it is a {type(rename).__name__}, not a dict from names to new names."
        raise RenameError("rename", what, mend="Write rename={'transformer': 'model'}.")
    names = _Names(paths, taken, aliases or {})
    waiting = {key: _new_names(key, value) for key, value in rename.items()}
    while waiting:
        # A key may use names that another key makes, in whatever order they are written.
        found = {key: places for key in waiting if (places := names.places(key))}
        if not found:
            names.refuse(next(iter(waiting)))
        for key, places in found.items():
            for new in waiting.pop(key):
                for holder, target in places:
                    names.add(key, new, holder, target)
    return names.aliases


def check_aliases(
    aliases: Aliases, paths: Collection[str], taken: Callable[[str, str], bool] = lambda path, name: False
) -> None:
    """Raises:
    RenameError: an alias stands at, or for, a path that is not there, or would never be reached under its name.
    """
    known = frozenset(paths) | {""}
    for holder, names in aliases.items():
        for path in (holder, *names.values()):
            if path not in known:
                what = f"the model has no module {path!r}."
                raise RenameError(f"aliases[{holder!r}]", what, path, _worth_naming(known, path))
        for name, path in names.items():
            if taken(holder, name):
                raise _taken_error(f"the new name {name!r} of {path!r}", holder, name)


def _taken_error(where: str, holder: str, name: str) -> RenameError:
    what = f"{holder or 'the model'} has an attribute {name!r} already."
    return RenameError(where, what, mend="Choose another name.")


def _new_names(key: object, value: object) -> list[str]:
    if not isinstance(key, str) or not _is_path(key):
        raise RenameError("rename", f"{key!r} is no name of a module.", mend="A key is a name or a dotted path.")
    where = f"rename[{key!r}]"
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not names:
        raise RenameError(where, f"{value!r} is no name.", mend="Give a new name, or a list of them.")
    for new in names:
        parts = new.removeprefix(".").split(".") if isinstance(new, str) else [""]
        if not parts[-1].isidentifier() or keyword.iskeyword(parts[-1]) or not all(parts):
            raise RenameError(where, f"{new!r} is no name that Python takes for an attribute.")
    if len(set(names)) < len(names):
        raise RenameError(where, f"{list(names)!r} gives the same name twice.", mend="Give each new name once.")
    return list(names)


def _is_path(key: str) -> bool:
    return all(key.removeprefix(".").split("."))


def _worth_naming(known: Collection[str], asked: str) -> list[str]:
    # One entry of a list stands for all: the others would only say the same again.
    numbers = {"0", *(part for part in asked.split(".") if part.isdigit())}
    return [path for path in known if all(part in numbers for part in path.split(".") if part.isdigit())]


class _Names:
    """The names that there are, the model's own and new ones."""

    def __init__(self, paths: Collection[str], taken: Callable[[str, str], bool], aliases: Aliases) -> None:
        self._paths = frozenset(paths) | {""}
        self._taken = taken
        self.aliases = {holder: dict(names) for holder, names in aliases.items()}
        self._holders: dict[str, list[str]] = {}
        for path in self._paths - {""}:
            holder, _, name = path.rpartition(".")
            self._holders.setdefault(name, []).append(holder)

    def _below(self, holder: str, name: str) -> str | None:
        own = f"{holder}.{name}" if holder else name
        return self.aliases.get(holder, {}).get(name) or (own if own in self._paths else None)

    def _walk(self, holder: str, parts: Sequence[str]) -> str | None:
        path: str | None = holder
        for part in parts:
            path = None if path is None else self._below(path, part)
        return path

    def places(self, key: str) -> list[tuple[str, str]]:
        """Where a key fits: the path that it starts from, and the path that it leads to."""
        parts = key.removeprefix(".").split(".")
        starts = [""]
        if not key.startswith("."):
            by_alias = [holder for holder, names in self.aliases.items() if parts[0] in names]
            starts = sorted({*self._holders.get(parts[0], ()), *by_alias})
        return [(start, target) for start in starts if (target := self._walk(start, parts)) is not None]

    def add(self, key: str, new: str, start: str, target: str) -> None:
        """Let the path ``target`` be called ``new``, seen from ``start``."""
        *way, name = new.removeprefix(".").split(".")
        where = f"rename[{key!r}]"
        holder = self._walk("" if new.startswith(".") else start, way)
        if holder is None:
            what = f"there is no module {'.'.join(way)!r} for {name!r} to stand below."
            raise RenameError(where, what, way[0], self._known(way[0]))
        shown = f"{holder}.{name}" if holder else name
        names = self.aliases.setdefault(holder, {})
        mend = "Choose another name."
        if name in names:
            same = "already, and is given to it twice" if names[name] == target else "already"
            raise RenameError(
                where, f"{shown!r} is a name of {names[name]!r} {same}; it was to be {target!r}.", mend=mend
            )
        if shown in self._paths:
            what = (
                f"{target!r} is called so anyway." if shown == target else f"the model has a module {shown!r} already."
            )
            raise RenameError(where, what, mend=mend)
        if self._taken(holder, name):
            raise _taken_error(where, holder, name)
        names[name] = target

    def refuse(self, key: str) -> None:
        """Raises:
        RenameError: the key fits nothing.
        """
        what = f"the model has no module {key!r}."
        mend = "Give a name or a path as print(model) shows it."
        raise RenameError("rename", what, key.removeprefix("."), self._known(key), mend)

    def _known(self, key: str) -> list[str]:
        paths = _worth_naming(self._paths - {""}, key)
        new = [name for names in self.aliases.values() for name in names]
        singles = [*self._holders, *new]
        return [*paths, *singles] if "." in key else singles
