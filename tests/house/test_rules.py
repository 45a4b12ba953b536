"""Each rule holds in this repository, and goes off on a tree that breaks it."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tests.house import rules
from tests.house.downhill import ORDER, imports_flow_downhill

ROOT = Path(__file__).resolve().parents[2]
RULES: tuple[rules.Rule, ...] = (
    rules.no_long_file,
    rules.no_long_function,
    rules.everything_public_is_annotated,
    rules.everything_public_is_documented,
    rules.no_swallowed_error,
    rules.no_star_import,
    rules.no_print,
    rules.no_not_implemented,
    rules.one_door_to_transformers,
    rules.no_greenlet_in_nnterp,
    rules.one_door_to_hooks,
    rules.no_stranger_at_the_top,
    rules.no_machine_path,
    imports_flow_downhill,
)

# Nothing in these breaks any rule, though each comes near to one.
HARMLESS = {
    "nnsight_core/__init__.py": '"""The face."""\n\nfrom .hooks import arm\n',
    "nnsight_core/hooks.py": '''
        """The only file that registers."""
        from .values import first_tensor

        def arm(module: object, *rest: int, deep: bool = False) -> None:
            """Say first_tensor of register_forward_hook in a docstring."""
            module.register_forward_hook(first_tensor)
    ''',
    "nnsight_core/values.py": '''
        """Pure."""
        import contextlib

        class Value:
            """A value."""

            def __repr__(self) -> str:
                return "Value()"

            def show(self) -> None:
                """Keep an error."""
                with contextlib.suppress(KeyError):
                    self.seen = 1
                try:
                    self.seen += 1
                except Exception as error:
                    self.error = error

            def _hidden(self, anything):
                def nested(thing):
                    return thing

                return nested

        def first_tensor(value: object) -> object:
            """The value."""
            return value
    ''',
    "nnsight_core/language_model.py": '"""Tokens."""\n\nimport transformers\n\nimport nnsight_core.hooks\n',
    "nnterp/spec.py": '"""A spec."""\n\nfrom nnsight_core import arm\nfrom nnsight_core.values import first_tensor\n',
    "README.md": "See tests/work/ and https://example.org/work/of/others, or ~/work/.\n",
}

FUNCTION = 'def work() -> int:\n    """Work."""\n'
CORE = "nnsight_core/values.py"
NNTERP = "nnterp/spec.py"
# (the rule that must go off, the file, what it holds, what the complaint says)
OFFENCES = (
    (rules.no_long_file, CORE, "x = 1\n" * 401, "401 lines"),
    (rules.no_long_function, CORE, FUNCTION + "    x = 1\n" * 58 + "    return x\n", "work has 61 lines"),
    (rules.no_long_function, CORE, "async " + FUNCTION + "    x = 1\n" * 59, "work has 61 lines"),
    (rules.everything_public_is_annotated, CORE, "def work(thing) -> int: ...", "work does not annotate thing"),
    (rules.everything_public_is_annotated, CORE, "def work(): ...", "work does not annotate its result"),
    (
        rules.everything_public_is_annotated,
        CORE,
        "class A:\n    def f(self, *, k) -> int: ...",
        "f does not annotate k",
    ),
    (rules.everything_public_is_annotated, CORE, "class A:\n    def __call__(self, *x) -> int: ...", "__call__"),
    (rules.everything_public_is_documented, CORE, "x = 1", "the module has no docstring"),
    (rules.everything_public_is_documented, CORE, "class A:\n    x: int", "class A has no docstring"),
    (rules.everything_public_is_documented, CORE, "def work() -> int: ...", "work has no docstring"),
    (rules.no_swallowed_error, CORE, "try:\n    x = 1\nexcept:\n    raise", "bare except"),
    (rules.no_swallowed_error, CORE, "try:\n    x = 1\nexcept Exception:\n    pass", "except Exception drops"),
    (rules.no_swallowed_error, CORE, "try:\n    x = 1\nexcept (OSError, BaseException):\n    ...", "drops every error"),
    (rules.no_swallowed_error, CORE, "with contextlib.suppress(Exception):\n    x = 1", "drops every error"),
    (rules.no_star_import, NNTERP, "from torch import *", "from torch import *"),
    (rules.no_print, NNTERP, "print(1)", "print(...)"),
    (rules.no_not_implemented, CORE, 'raise NotImplementedError("later")', "raise NotImplementedError"),
    (rules.no_not_implemented, CORE, "def f():\n    raise NotImplementedError", "raise NotImplementedError"),
    (rules.one_door_to_transformers, CORE, "def f():\n    from transformers import AutoModel", "transformers is"),
    (rules.one_door_to_transformers, CORE, "import transformers.modeling_utils", "transformers is imported here"),
    (rules.no_greenlet_in_nnterp, NNTERP, "from greenlet import greenlet", "greenlet is imported here"),
    (rules.one_door_to_hooks, CORE, "module.register_forward_pre_hook(f)", "register_forward_pre_hook"),
    (rules.one_door_to_hooks, CORE, "tensor.register_hook(f)", "register_hook"),
    (rules.one_door_to_hooks, NNTERP, "module._forward_hooks.clear()", "_forward_hooks"),
    (rules.one_door_to_hooks, NNTERP, 'getattr(m, "_global_forward_hooks")', "_global_forward_hooks"),
    (rules.no_stranger_at_the_top, "IDEAS.md", "Try this.", "IDEAS.md"),
    (rules.no_stranger_at_the_top, "experiments/one.py", "x = 1", "experiments"),
    (rules.no_machine_path, "docs/start.md", "Open " + "/" + "work/notes.md.", "docs/start.md:1"),
    (rules.no_machine_path, "Makefile", "all:\n\tcat='/" + "root/x'", "Makefile:2"),
    (imports_flow_downhill, CORE, "from nnsight_core.hooks import arm", "imports nnsight_core/hooks.py"),
    (imports_flow_downhill, CORE, "def f():\n    from . import arm", "values.py:2: imports nnsight_core/__init__.py"),
    (imports_flow_downhill, CORE, "import nnterp", "imports nnterp/__init__.py"),
    (imports_flow_downhill, "nnsight_core/deep/x.py", "from ..errors import E", "has no place in the order"),
)


def tree(root: Path, files: dict[str, str]) -> Path:
    """Write the files; the indentation of those written out above is taken off."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip("\n"), encoding="utf-8")
    return root


def said(complaints: list[str]) -> str:
    return "\n".join(complaints)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rule_holds_here(rule: rules.Rule) -> None:
    complaints = rule(ROOT)
    assert not complaints, said(complaints)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rule_lets_the_harmless_be(rule: rules.Rule, tmp_path: Path) -> None:
    complaints = rule(tree(tmp_path, HARMLESS))
    assert not complaints, said(complaints)


@pytest.mark.parametrize(
    ("rule", "name", "text", "complaint"),
    [pytest.param(*offence, id=f"{offence[0].__name__}-{number}") for number, offence in enumerate(OFFENCES)],
)
def test_the_rule_goes_off(rule: rules.Rule, name: str, text: str, complaint: str, tmp_path: Path) -> None:
    complaints = rule(tree(tmp_path, {**HARMLESS, name: text}))
    assert complaint in said(complaints)


def test_every_rule_is_broken_once() -> None:
    assert {offence[0] for offence in OFFENCES} == set(RULES)


def test_two_files_of_one_starred_line_may_not_import_each_other(tmp_path: Path) -> None:
    files = {
        "nnterp/interventions/steering.py": "from nnterp.interventions import patching",
        "nnterp/interventions/patching.py": "",
    }
    assert "same line of the order" in said(imports_flow_downhill(tree(tmp_path, files)))


def test_a_line_of_its_own_comes_before_a_star(tmp_path: Path) -> None:
    files = {
        "nnterp/interventions/steering.py": "from .shared import x",
        "nnterp/interventions/shared.py": "",
    }
    order = (*ORDER, "nnterp/interventions/shared.py")
    assert not imports_flow_downhill(tree(tmp_path, files), order)


def test_files_that_git_ignores_do_not_count() -> None:
    names = {path.as_posix() for path in rules.repository_files(ROOT)}
    assert "pyproject.toml" in names
    assert not [name for name in names if "__pycache__" in name or name.startswith((".git/", ".venv/"))]
