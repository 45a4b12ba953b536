"""Makes Markdown of the docstrings: examples and code become fenced blocks, roles the names that they lead to."""

from __future__ import annotations

import ast
import re
from textwrap import dedent
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":\w+:`~?(?:[\w.]+\.)?(\w+)`")


def _is_code(paragraph: str) -> bool:
    """Whether it is Python that calls something; prose is no Python."""
    try:
        tree = ast.parse(dedent(paragraph))
    except SyntaxError:
        return False
    return any(isinstance(node, ast.Call) for node in ast.walk(tree))


def _fenced(paragraph: str) -> str:
    if not _is_code(paragraph):
        return paragraph
    return f"```python\n{dedent(paragraph)}\n```"


def markdown(docstring: str) -> str:
    """The same text with code, and each run of `>>>` lines up to the next empty line, in a fence of its own."""
    lines: list[str] = []
    is_example = False
    text = "\n\n".join(map(_fenced, docstring.split("\n\n")))
    for line in _ROLE.sub(r"`\1`", text).splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        if not is_example and line.lstrip().startswith(">>> "):
            lines += ["", f"{indent}```pycon"]
            is_example, fence = True, f"{indent}```"
        elif is_example and not line.strip():
            lines.append(fence)
            is_example = False
        lines.append(line)
    return "\n".join([*lines, fence] if is_example else lines)


class Docstrings(Extension):
    """Applies :func:`markdown` to everything that is documented."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)
