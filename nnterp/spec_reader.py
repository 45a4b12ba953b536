"""YAML with line numbers, and readers for single values: the tools with which `spec.py` declares its format.

    root = Place("gpt2.yaml", "", 1, compose(text, "gpt2.yaml"))
    root.entries()["family"].text("a name")       # 'gpt2', or an error that names the line

PyYAML's nodes know their lines; `Place` is a node together with the way that leads to it. Two documents are merged
as nodes, so a merged value keeps the line on which it was written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import yaml

from nnterp.errors import (
    DuplicateKeyError,
    MissingKeyError,
    SpecSyntaxError,
    SpecValueError,
    UnknownKeyError,
    did_you_mean,
)

__all__ = [
    "choice",
    "compose",
    "key",
    "merge",
    "Place",
    "read_keys",
    "read_name",
    "read_names",
    "read_path",
    "read_path_choice",
    "read_path_or_null",
    "read_paths",
    "read_some_names",
    "section",
]

T = TypeVar("T")

_TAG = "tag:yaml.org,2002:"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def compose(text: str, source: str) -> yaml.MappingNode:
    """The text as a tree of nodes; raises `SpecSyntaxError` where it is no YAML, or no mapping."""
    try:
        node = yaml.compose(text, Loader=_LOADER)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise SpecSyntaxError(
            source,
            mark.line + 1 if mark else 1,
            "this is not YAML.",
            found=str(getattr(error, "problem", None) or error),
            expected="keys with values, such as 'family: gpt2'",
            mend="Look for a missing colon, quote or bracket, or for a tab, on this line or the one before.",
        ) from error
    if not isinstance(node, yaml.MappingNode):
        raise SpecSyntaxError(
            source,
            node.start_mark.line + 1 if node else 1,
            "this is no architecture specification.",
            found=_kind(node) if node else "an empty file",
            expected="keys with values, such as 'family: gpt2'",
            mend="architectures/README.md shows a whole file.",
        )
    _refuse_duplicates(node, source, "the file")
    return node


def _refuse_duplicates(node: yaml.Node, source: str, where: str) -> None:
    children: list[tuple[str, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for name, value in node.value:
            line = name.start_mark.line + 1
            if not isinstance(name, yaml.ScalarNode):
                raise SpecSyntaxError(
                    source,
                    line,
                    "a key is no name.",
                    found=_kind(name),
                    expected="a plain name before the colon",
                    mend="Brackets and braces belong after the colon.",
                )
            if name.value in seen:
                raise DuplicateKeyError(source, line, where, name.value, seen[name.value])
            seen[name.value] = line
            children.append((f"`{name.value}`", value))
    elif isinstance(node, yaml.SequenceNode):
        children = [(where, item) for item in node.value]
    for name, child in children:
        _refuse_duplicates(child, source, name)


def merge(base: yaml.Node, over: yaml.Node) -> yaml.Node:
    """`over` laid over `base`: mappings key by key, anything else replaced whole. Both stay as they are."""
    if not (isinstance(base, yaml.MappingNode) and isinstance(over, yaml.MappingNode)):
        return over
    pairs = {name.value: (name, value) for name, value in base.value}
    for name, value in over.value:
        old = pairs.get(name.value)
        pairs[name.value] = (
            old[0] if old and _are_mappings(old[1], value) else name,
            merge(old[1], value) if old else value,
        )
    return yaml.MappingNode(base.tag, list(pairs.values()), base.start_mark, base.end_mark)


def _are_mappings(*nodes: yaml.Node) -> bool:
    return all(isinstance(node, yaml.MappingNode) for node in nodes)


def _kind(node: yaml.Node) -> str:
    """What a reader sees there: 'a list', 'the number 3', 'the text ...'."""
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    kinds = {"int": "the number", "float": "the number", "bool": "the truth value", "str": "the text"}
    name = kinds.get(node.tag.removeprefix(_TAG))
    return f"{name} {node.value!r}" if name else "nothing (null)"


@dataclasses.dataclass(frozen=True)
class Place:
    """A value in a YAML file: its node, its path in the file ('block.order.2'), and the line to show for it."""

    source: str
    path: str
    line: int
    node: yaml.Node

    @property
    def named(self) -> str:
        """The place in a sentence: '`block`', or 'the file'."""
        return f"`{self.path}`" if self.path else "the file"

    def error(self, fact: str, *, found: str, expected: str, mend: str) -> SpecValueError:
        """An error about this value, ready to raise."""
        return SpecValueError(self.source, self.line, fact, found=found, expected=expected, mend=mend)

    def _wrong_kind(self, expected: str) -> SpecValueError:
        return self.error(
            f"{self.named} has a value of the wrong kind.",
            found=_kind(self.node),
            expected=expected,
            mend="architectures/README.md shows what each key takes.",
        )

    def _below(self, name: str, line_of: yaml.Node, node: yaml.Node) -> Place:
        return Place(self.source, f"{self.path}.{name}" if self.path else name, line_of.start_mark.line + 1, node)

    def entries(self) -> dict[str, Place]:
        """The values of a mapping by their keys; an entry's line is the one its key stands on."""
        if not isinstance(self.node, yaml.MappingNode):
            raise self._wrong_kind("keys with values")
        return {name.value: self._below(name.value, name, value) for name, value in self.node.value}

    def items(self, expected: str) -> list[Place]:
        """The items of a list."""
        if not isinstance(self.node, yaml.SequenceNode):
            raise self._wrong_kind(expected)
        return [self._below(str(index), item, item) for index, item in enumerate(self.node.value)]

    def text(self, expected: str) -> str:
        """A text; a number or a truth value is none unless it is quoted."""
        if not isinstance(self.node, yaml.ScalarNode) or self.node.tag != _TAG + "str":
            raise self._wrong_kind(expected)
        return str(self.node.value)

    def scalar(self) -> Any:
        """A single plain value: text, number, truth value or None."""
        if not isinstance(self.node, yaml.ScalarNode):
            raise self._wrong_kind("a single value")
        return yaml.constructor.SafeConstructor().construct_object(self.node)

    def is_null(self) -> bool:
        """Whether null is written here, or nothing."""
        return bool(self.node.tag == _TAG + "null")

    def without(self, name: str) -> yaml.MappingNode:
        """The mapping's node, less one key."""
        pairs = [pair for pair in self.node.value if pair[0].value != name]
        return yaml.MappingNode(self.node.tag, pairs, self.node.start_mark, self.node.end_mark)

    def lines(self) -> Iterator[tuple[str, int]]:
        """The path and line of every value from here down."""
        below: list[Place] = []
        if isinstance(self.node, yaml.MappingNode):
            below = list(self.entries().values())
        elif isinstance(self.node, yaml.SequenceNode):
            below = self.items("a list")
        for place in below:
            yield place.path, place.line
            yield from place.lines()


def key(read: Callable[[Place], Any], meaning: str, default: Any = dataclasses.MISSING) -> Any:
    """One key of the format: how its value is read, and what it means in half a sentence."""
    return dataclasses.field(default=default, metadata={"read": read, "meaning": meaning})


def read_path(place: Place) -> str:
    """A dotted module path."""
    text = place.text("a module path such as 'model.layers'")
    if not text or not all(part and part == part.strip() for part in text.split(".")):
        raise place.error(
            f"`{place.path}` is no module path.",
            found=repr(text),
            expected="names joined by single dots, such as 'model.layers'",
            mend="Write the path as `model.named_modules()` gives it; for a part that is not there write null.",
        )
    return text


def read_path_choice(place: Place) -> tuple[str, ...]:
    """One module path, or several of which the first that is there is meant."""
    if not isinstance(place.node, yaml.SequenceNode):
        return (read_path(place),)
    paths = read_paths(place)
    if not paths:
        raise place.error(
            f"`{place.path}` is empty.",
            found="[]",
            expected="at least one module path",
            mend="Name the module; leave the key out where there is none.",
        )
    return paths


def read_path_or_null(place: Place) -> tuple[str, ...]:
    """The same, or nothing where the file says null."""
    return () if place.is_null() else read_path_choice(place)


def read_paths(place: Place) -> tuple[str, ...]:
    """A list of dotted module paths."""
    return tuple(read_path(item) for item in place.items("a list of module paths"))


def read_name(place: Place) -> str:
    """A name that is not empty."""
    text = place.text("a name")
    if not text.strip():
        raise place.error(f"`{place.path}` is empty.", found="''", expected="a name", mend="Write the name.")
    return text


def read_keys(place: Place) -> tuple[str, ...]:
    """A config key, several of which the first that is set wins, or the number itself."""
    value = None if isinstance(place.node, yaml.SequenceNode) else place.scalar()
    return (str(value),) if type(value) is int and value > 0 else read_names(place)


def read_names(place: Place) -> tuple[str, ...]:
    """One name, or several of which the first that is there wins."""
    if isinstance(place.node, yaml.SequenceNode):
        return tuple(read_name(item) for item in place.items("a list of names"))
    return (read_name(place),)


def read_some_names(place: Place) -> tuple[str, ...]:
    """A list of at least one name."""
    names = tuple(read_name(item) for item in place.items("a list of names"))
    if not names:
        raise place.error(
            f"`{place.path}` is empty.", found="[]", expected="at least one name", mend="Name what the file serves."
        )
    return names


def choice(*allowed: str) -> Callable[[Place], str]:
    """A reader for one of the ``allowed`` words."""

    def read(place: Place) -> str:
        text = place.text(" or ".join(allowed))
        if text not in allowed:
            raise place.error(
                f"`{place.path}` cannot be '{text}'.",
                found=text,
                expected=" or ".join(allowed),
                mend=did_you_mean(text, allowed) or "architectures/README.md says what each of them means.",
            )
        return text

    return read


def section(kind: type[T]) -> Callable[[Place], T]:
    """A reader for a mapping with one key for each field of a dataclass."""

    def read(place: Place) -> T:
        entries = place.entries()
        fields = {field.name: field for field in dataclasses.fields(kind) if "read" in field.metadata}  # type: ignore[arg-type]
        for name, entry in entries.items():
            if name not in fields:
                raise UnknownKeyError(place.source, entry.line, place.named, name, [*fields])
        values: dict[str, Any] = {}
        for name, field in fields.items():
            if name in entries:
                values[name] = field.metadata["read"](entries[name])
            elif field.default is dataclasses.MISSING:
                raise MissingKeyError(
                    place.source, place.line, place.named, name, [*entries], field.metadata["meaning"]
                )
        return kind(**values)

    return read
