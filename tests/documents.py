"""The examples of the documents and docstrings, found and run as they stand.

In a Markdown document, blocks fenced as `python` run in order and share one namespace, as if a reader typed them one
after the other; with `>>>` prompts (or fenced as `pycon`) what they show is compared as well. So is the next block
where it is fenced as `text`: it is what the Python block prints, or the message of the error that ends it, with `...`
for what varies. A block that cannot run says why in its fence: `python no-run: it needs a GPU`. A docstring is a
document of its own, which starts with the names of its module.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import io
import linecache
import re
import textwrap
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

PACKAGES = ("nnsight_core", "nnterp")
_FENCE = re.compile(r"^[ \t]*(?P<marks>`{3,}|~{3,})[ \t]*(?P<info>[^`]*)$")
_NO_RUN = re.compile(r"python\s+no-run\b:?\s*(?P<reason>.*)")
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class DocumentError(AssertionError):
    """A block that does not do what its document says; begins with `file:line`."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its info string, its text without the indentation, and the line its text starts on."""

    info: str
    text: str
    line: int

    @property
    def is_session(self) -> bool:
        """Whether it shows prompts, so that what follows them is compared."""
        return self.info in {"python", "pycon"} and re.search(r"^>>> ", self.text, re.MULTILINE) is not None

    @property
    def is_script(self) -> bool:
        """Whether it is plain Python that runs."""
        return self.info == "python" and not self.is_session

    @property
    def reason_not_to_run(self) -> str | None:
        """The reason that its fence gives, empty if it gives none; None for a block that runs or is not Python."""
        match = _NO_RUN.fullmatch(self.info)
        return None if match is None else match["reason"].strip()


@dataclass(frozen=True)
class Docstring:
    """A docstring: its text as it stands in the file, and the line that it starts on."""

    text: str
    line: int


def blocks(text: str, first_line: int = 1) -> Iterator[Block]:
    """The fenced blocks of a text; one that is never closed is an error, for it would hide what follows."""
    opened: re.Match[str] | None = None
    start, lines = 0, list[str]()
    for number, line in enumerate(text.splitlines(), start=first_line):
        fence = _FENCE.match(line)
        if opened is None:
            if fence is not None:
                opened, start, lines = fence, number + 1, []
        elif fence is not None and fence["marks"].startswith(opened["marks"]) and not fence["info"].strip():
            yield Block(opened["info"].strip(), textwrap.dedent("\n".join(lines)) + "\n", start)
            opened = None
        else:
            lines.append(line)
    if opened is not None:
        raise DocumentError(f"line {start - 1}: this fence is never closed")


def markdown_documents(root: Path) -> list[Path]:
    """README.md, everything in docs/, and the README of the architectures."""
    candidates = [root / "README.md", *sorted((root / "docs").rglob("*.md")), root / "architectures" / "README.md"]
    return [path for path in candidates if path.is_file()]


def python_documents(root: Path) -> list[Path]:
    """The files of the packages that show an example in a docstring."""
    paths = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    return [path for path in paths if any(_has_example(found) for found in docstrings(path))]


def _has_example(found: Docstring) -> bool:
    return ">>> " in found.text or any(block.info.startswith(("python", "pycon")) for block in blocks(found.text))


def docstrings(path: Path) -> Iterator[Docstring]:
    """The docstrings of a module, its classes and its functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and node.body:
            first = node.body[0]
            literal = first.value if isinstance(first, ast.Expr) else None
            if isinstance(literal, ast.Constant) and isinstance(literal.value, str):
                yield Docstring(literal.value, first.lineno)


def all_blocks(path: Path) -> list[Block]:
    """The fenced blocks of a Markdown document, or of all docstrings of a Python file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return [block for found in docstrings(path) for block in blocks(found.text, found.line)]
    return list(blocks(text))


def run_document(path: Path, root: Path) -> None:
    """Run the examples of one file; raises DocumentError at the first that fails."""
    name = path.relative_to(root).as_posix()
    if path.suffix == ".py":
        for found in docstrings(path):
            if _has_example(found):
                _run_docstring(found, path, root)
        return
    # The name of a script, so that classes defined in a document can be pickled and errors point at the document.
    namespace: dict[str, Any] = {"__name__": "__main__", "__file__": str(path)}
    found = all_blocks(path)
    for block, after in zip_longest(found, found[1:]):
        if block.is_session:
            _run_session(block.text, block.line, name, namespace)
        elif block.is_script and after is not None and after.info == "text":
            _run_shown(block, after, str(path), name, namespace)
        elif block.is_script:
            _run_script(block, str(path), name, namespace)


def _run_docstring(found: Docstring, path: Path, root: Path) -> None:
    name = path.relative_to(root).as_posix()
    module = importlib.import_module(".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"))
    namespace = {**vars(module), "__name__": "__main__"}
    # The fences themselves, and what is not to run, would count as expected output.
    lines = found.text.splitlines()
    for number, line in enumerate(lines):
        if _FENCE.match(line):
            lines[number] = ""
    for block in blocks(found.text):
        if not block.is_session:
            lines[block.line - 1 : block.line - 1 + block.text.count("\n")] = [""] * block.text.count("\n")
    _run_session("\n".join(lines), found.line, name, namespace)
    # Not the file's own name: an error that looks for the user's line must not take the file for the user's.
    shown = f"<{name} docstring>"
    linecache.cache[shown] = (0, None, path.read_text(encoding="utf-8").splitlines(keepends=True), shown)
    for block in blocks(found.text, found.line):
        if block.is_script:
            _run_script(block, shown, name, namespace)


def _run_session(text: str, line: int, name: str, namespace: dict[str, Any]) -> None:
    test = doctest.DocTestParser().get_doctest(text, namespace, name, name, line - 1)
    said: list[str] = []
    doctest.DocTestRunner(optionflags=_FLAGS, verbose=False).run(test, out=said.append, clear_globs=False)
    namespace.update(test.globs)
    if said:
        output = "".join(said)
        failed = re.search(r", line (\d+), in ", output)
        raise DocumentError(f"{name}:{failed[1] if failed else line}: the example gives something else\n{output}")


def _run_script(block: Block, filename: str, name: str, namespace: dict[str, Any]) -> None:
    try:
        # Empty lines stand for all that comes before, so that every line number is the document's own.
        code = compile("\n" * (block.line - 1) + block.text, filename, "exec", dont_inherit=True)
        exec(code, namespace)
    except SyntaxError as error:
        raise DocumentError(f"{name}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        inside = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == filename]
        line = inside[-1] if inside else block.line
        raise DocumentError(f"{name}:{line}: {type(error).__name__}: {error}") from error


def _run_shown(block: Block, shown: Block, filename: str, name: str, namespace: dict[str, Any]) -> None:
    """Run a script whose output, or the message of whose error, stands in the block after it."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            _run_script(block, filename, name, namespace)
        except DocumentError as failed:
            if failed.__cause__ is None or isinstance(failed.__cause__, SyntaxError):
                raise
            printed.write(f"{failed.__cause__}\n")
    got = printed.getvalue()
    if not doctest.OutputChecker().check_output(shown.text, got, doctest.ELLIPSIS):
        raise DocumentError(
            f"{name}:{shown.line}: the block before it at line {block.line} gives something else\n{got}"
        )


def fence_complaints(path: Path, root: Path) -> list[str]:
    """Blocks left out without a reason, and Python fences that say something unknown (and so would never run)."""
    complaints = []
    for block in all_blocks(path):
        place = f"{path.relative_to(root).as_posix()}:{block.line - 1}"
        if block.reason_not_to_run == "":
            complaints.append(f"{place}: `python no-run: REASON` needs its reason")
        elif block.reason_not_to_run is None and block.info != "python" and re.match(r"(?i)py(thon|3|\b)", block.info):
            complaints.append(f"{place}: `{block.info}`; write `python`, `pycon` or `python no-run: REASON`")
    return complaints


def not_run(root: Path) -> dict[str, str]:
    """Every Python block that does not run, `file:line` -> its reason."""
    return {
        f"{path.relative_to(root).as_posix()}:{block.line - 1}": block.reason_not_to_run
        for path in (*markdown_documents(root), *python_documents(root))
        for block in all_blocks(path)
        if block.reason_not_to_run is not None
    }
