"""The rules of the house, each a function from a source tree to the list of its complaints.

A rule takes the root of a tree rather than knowing where this repository is, so that its twin in test_rules.py can
hand it a tree that breaks the rule. A complaint reads `file:line: what is wrong`, and says the mend where it can.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGES = ("nnsight_core", "nnterp")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
Rule = Callable[[Path], list[str]]

# The only files of the core that may import transformers, and the only one that may register with torch.
TRANSFORMERS_DOORS = ("nnsight_core/language_model.py", "nnsight_core/loading.py")
HOOKS_DOOR = "nnsight_core/hooks.py"
GREENLET_ROOM = "nnsight_core"
# What was trained is judged without the library, or the library would be judged by itself.
INDEPENDENT_WITNESS = "nnterp/demo_models/evaluate.py"

TOP_LEVEL = frozenset(
    {
        ".ci",
        ".gitignore",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "Makefile",
        "README.md",
        "architectures",
        "benchmarks",
        "docs",
        "examples",
        "mkdocs.yml",
        "nnsight_core",
        "nnterp",
        "pyproject.toml",
        "tests",
    }
)

_HOOK_NAME = re.compile(r"register_\w*hooks?|_(global_)?(forward|backward|full_backward)_(pre_)?hooks\w*")
_MACHINE_PATH = re.compile(r"""(^|[\s"'(=])/(work|farm|root|tmp/dev)/""")


def repository_files(root: Path) -> list[Path]:
    """The files that are in the repository or would be after `git add .`, relative to its root.

    Without git (in an unpacked source distribution), every file outside hidden folders and caches.
    """
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    if (root / ".git").exists():
        listed = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
        candidates = [Path(name) for name in listed.split("\0") if name]
    else:
        candidates = [path.relative_to(root) for path in root.rglob("*")]
        candidates = [path for path in candidates if not _is_litter(path)]
    return sorted(path for path in candidates if (root / path).is_file())


def _is_litter(path: Path) -> bool:
    hidden = any(part.startswith(".") and part not in TOP_LEVEL for part in path.parts)
    return hidden or "__pycache__" in path.parts or path.parts[0] in {"build", "dist", "out", "PKG-INFO"}


def sources(root: Path) -> Iterator[tuple[str, ast.Module]]:
    """The path (with forward slashes, from the root) and the syntax tree of every file of the two packages."""
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            yield path.relative_to(root).as_posix(), ast.parse(path.read_text(encoding="utf-8"), str(path))


def _nodes(root: Path) -> Iterator[tuple[str, ast.AST]]:
    for name, tree in sources(root):
        for node in ast.walk(tree):
            yield name, node


def no_long_file(root: Path) -> list[str]:
    """One concept a file; one that grew past the limit holds two."""
    complaints = []
    for name, _ in sources(root):
        lines = len((root / name).read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            complaints.append(f"{name}:1: {lines} lines, {MAX_FILE_LINES} at most")
    return complaints


def no_long_function(root: Path) -> list[str]:
    """Counted from the `def` to the last line, docstring included."""
    complaints = []
    for name, node in _nodes(root):
        if isinstance(node, FunctionNode):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_FUNCTION_LINES:
                complaints.append(f"{name}:{node.lineno}: {node.name} has {lines} lines, {MAX_FUNCTION_LINES} at most")
    return complaints


def everything_public_is_annotated(root: Path) -> list[str]:
    """Every argument and result of what users can reach; mypy holds the rest."""
    complaints = []
    for name, function in _public_functions(root):
        arguments = function.args
        positional = [*arguments.posonlyargs, *arguments.args]
        if positional and positional[0].arg in {"self", "cls", "mcs"}:
            positional = positional[1:]
        rest = [argument for argument in (arguments.vararg, arguments.kwarg) if argument is not None]
        bare = [a.arg for a in (*positional, *arguments.kwonlyargs, *rest) if a.annotation is None]
        if function.returns is None:
            bare.append("its result")
        if bare:
            complaints.append(f"{name}:{function.lineno}: {function.name} does not annotate {', '.join(bare)}")
    return complaints


def everything_public_is_documented(root: Path) -> list[str]:
    """Modules, classes, functions, methods; not what Python itself gives a meaning to (dunders, setters, overloads)."""
    complaints = []
    for name, tree in sources(root):
        if ast.get_docstring(tree) is None and tree.body:
            complaints.append(f"{name}:1: the module has no docstring")
        for owner in (tree, *_public_classes(tree)):
            if isinstance(owner, ast.ClassDef) and ast.get_docstring(owner) is None:
                complaints.append(f"{name}:{owner.lineno}: class {owner.name} has no docstring")
    for name, function in _public_functions(root):
        decorators = {ast.unparse(decorator).rpartition(".")[2] for decorator in function.decorator_list}
        exempt = function.name.startswith("__") or decorators & {"overload", "override", "setter", "deleter"}
        if not exempt and ast.get_docstring(function) is None:
            complaints.append(f"{name}:{function.lineno}: {function.name} has no docstring")
    return complaints


def _public_functions(root: Path) -> Iterator[tuple[str, FunctionNode]]:
    for name, tree in sources(root):
        for owner in (tree, *_public_classes(tree)):
            for node in owner.body:
                dunder = isinstance(node, FunctionNode) and node.name.startswith("__") and node.name.endswith("__")
                if isinstance(node, FunctionNode) and (dunder or not node.name.startswith("_")):
                    yield name, node


def _public_classes(tree: ast.Module | ast.ClassDef) -> Iterator[ast.ClassDef]:
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield node
            yield from _public_classes(node)


def no_swallowed_error(root: Path) -> list[str]:
    """No bare except; nothing that catches every exception only to drop it."""
    complaints = []
    for name, node in _nodes(root):
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                complaints.append(f"{name}:{node.lineno}: bare except; name what is caught")
            elif _catches_everything(node.type) and all(_does_nothing(statement) for statement in node.body):
                complaints.append(f"{name}:{node.lineno}: except {ast.unparse(node.type)} drops every error in silence")
        elif isinstance(node, ast.Call) and _suppresses_everything(node):
            complaints.append(f"{name}:{node.lineno}: {ast.unparse(node)} drops every error in silence")
    return complaints


def _suppresses_everything(call: ast.Call) -> bool:
    named = ast.unparse(call.func).rpartition(".")[2] == "suppress"
    return named and any(_catches_everything(argument) for argument in call.args)


def _catches_everything(kind: ast.expr) -> bool:
    kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(ast.unparse(one).rpartition(".")[2] in {"Exception", "BaseException"} for one in kinds)


def _does_nothing(statement: ast.stmt) -> bool:
    constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return constant or isinstance(statement, (ast.Pass, ast.Continue))


def no_star_import(root: Path) -> list[str]:
    """A name that is used can be found where it was imported."""
    return [
        f"{name}:{node.lineno}: from {node.module} import *"
        for name, node in _nodes(root)
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    ]


def no_print(root: Path) -> list[str]:
    """A library does not talk; a command line writes to the stream that it was given."""
    return [
        f"{name}:{node.lineno}: {node.func.id}(...)"
        for name, node in _nodes(root)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in {"print", "pprint"}
    ]


def no_not_implemented(root: Path) -> list[str]:
    """What is offered works; what must be given by a subclass is an abstract method."""
    complaints = []
    for name, node in _nodes(root):
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if ast.unparse(raised) == "NotImplementedError":
                complaints.append(f"{name}:{node.lineno}: raise NotImplementedError")
    return complaints


def imported_modules(tree: ast.Module, name: str) -> Iterator[tuple[int, str]]:
    """The line and the dotted name of all that a file imports, also inside functions.

    `from package import thing` gives `package.thing`: whoever asks knows whether that is a module.
    """
    package = name.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = [] if node.level == 0 else package[: len(package) - node.level + 1]
            parts = [*base, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                yield node.lineno, ".".join([*parts, alias.name])


def one_door_to_transformers(root: Path) -> list[str]:
    """The engine wraps any module; only its language model, and what loads one, know of transformers."""
    return _imports_outside(root, "transformers", lambda name: name.startswith("nnterp/") or name in TRANSFORMERS_DOORS)


def no_greenlet_in_nnterp(root: Path) -> list[str]:
    """How a forward pass is suspended is the core's own affair."""
    return _imports_outside(root, "greenlet", lambda name: name.startswith(GREENLET_ROOM + "/"))


def _imports_outside(root: Path, module: str, allowed: Callable[[str], bool]) -> list[str]:
    return [
        f"{name}:{line}: {module} is imported here"
        for name, tree in sources(root)
        if not allowed(name)
        for line, imported in imported_modules(tree, name)
        if imported.split(".")[0] == module
    ]


def one_door_to_hooks(root: Path) -> list[str]:
    """What one file registers, one file can be trusted to remove."""
    complaints = []
    for name, node in _nodes(root):
        if name not in {HOOKS_DOOR, INDEPENDENT_WITNESS}:
            used = _spelled_name(node)
            if used is not None and _HOOK_NAME.fullmatch(used):
                line = getattr(node, "lineno", 1)
                complaints.append(f"{name}:{line}: {used}; only {HOOKS_DOOR} registers with torch")
    return complaints


def _spelled_name(node: ast.AST) -> str | None:
    """A name however it is written: `m.name`, `name`, and the string in `getattr(m, "name")`."""
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Name):
        return node.id
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def no_stranger_at_the_top(root: Path) -> list[str]:
    """Notes and experiments have no place beside the packages."""
    names = sorted({path.parts[0] for path in repository_files(root)} - TOP_LEVEL)
    return [f"{name}: not among the names allowed at the top (TOP_LEVEL in tests/house/rules.py)" for name in names]


def no_machine_path(root: Path) -> list[str]:
    """What is committed holds on every machine."""
    complaints = []
    for path in repository_files(root):
        try:
            text = (root / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), start=1):
            if _MACHINE_PATH.search(line):
                complaints.append(f"{path.as_posix()}:{number}: names a path of one machine")
    return complaints
