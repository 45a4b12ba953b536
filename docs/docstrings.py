"""Makes Markdown of the docstrings: examples become fenced blocks, and roles the names that they lead to."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":\w+:`~?(?:[\w.]+\.)?(\w+)`")


def markdown(docstring: str) -> str:
    """The same text with each run of `>>>` lines, up to the next empty line, in a fence of its own."""
    lines: list[str] = []
    is_example = False
    for line in _ROLE.sub(r"`\1`", docstring).splitlines():
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
