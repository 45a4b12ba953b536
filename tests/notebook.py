"""Runs the code blocks of a document one after the other, in one namespace, as a notebook does."""

from __future__ import annotations

import ast
import contextlib
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.documents import blocks

#: Old text -> new text.
Changes = Sequence[tuple[str, str]]


@dataclass
class Outcome:
    """What a block did: its names as they were then, what it printed, the value of its last line, and its error."""

    names: dict[str, Any]
    shown: str
    value: Any = None
    error: Exception | None = None

    def __getitem__(self, name: str) -> Any:
        return self.names[name]


@dataclass
class Notebook:
    """The blocks of a document, by title.

    Args:
        texts: the blocks as they stand, in their order.
        folder: where they run.
        everywhere: what is changed in all of them.
        changes: what is changed in single blocks; text that is not there to be changed is an error.
        before: what runs before a block and is none of the document's.
        goes_on: blocks whose further statements run after one that fails.
    """

    texts: Mapping[str, str]
    folder: Path
    everywhere: Changes = ()
    changes: Mapping[str, Changes] = field(default_factory=dict)
    before: Mapping[str, str] = field(default_factory=dict)
    goes_on: Iterable[str] = ()
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def outcome(self, title: str) -> Outcome:
        """What the block of this title did, after all that come before it."""
        for each in self.texts:
            if each not in self.outcomes:
                self.outcomes[each] = self._run(each)
            if each == title:
                break
        return self.outcomes[title]

    def text(self, title: str) -> str:
        """The text that runs."""
        text = self.texts[title]
        for old, new in self.everywhere:
            text = text.replace(old, new)
        for old, new in self.changes.get(title, ()):
            assert old in text, f"{title} has no {old!r}"
            text = text.replace(old, new)
        return text

    def _run(self, title: str) -> Outcome:
        value, error, shown, here = None, None, io.StringIO(), Path.cwd()
        statements = ast.parse(self.before.get(title, "")).body + ast.parse(self.text(title)).body
        try:
            os.chdir(self.folder)
            with contextlib.redirect_stdout(shown):
                for statement in statements:
                    try:
                        value = self._do(statement, f"<{title}>")
                    except Exception as caught:  # noqa: BLE001 - whatever a block raises is its outcome
                        error = caught
                        if title not in self.goes_on:
                            break
        finally:
            os.chdir(here)
        return Outcome(dict(self.names), shown.getvalue(), value, error)

    def _do(self, statement: ast.stmt, name: str) -> Any:
        if isinstance(statement, ast.Expr):
            return eval(compile(ast.Expression(statement.value), name, "eval", dont_inherit=True), self.names)
        exec(compile(ast.Module([statement], []), name, "exec", dont_inherit=True), self.names)
        return None


def titled_blocks(path: Path) -> dict[str, str]:
    """The Python blocks of a document, by the title behind their fence."""
    found = {block.info.removeprefix("python "): block.text for block in blocks(path.read_text(encoding="utf-8"))}
    assert len(found) == path.read_text(encoding="utf-8").count("```python ")
    return found


def with_indentation_of(mangled: str, text: str) -> str:
    """``mangled``, a text that has lost its indentation and its empty lines, with those of ``text``."""
    lost = iter(mangled.splitlines())
    lines = []
    for line in text.splitlines():
        indentation = line[: len(line) - len(line.lstrip())]
        lines.append(indentation + next(lost) if line.strip() else "")
    assert next(lost, None) is None
    return "\n".join(lines) + "\n"
