"""Every public name of nnterp 1.3 is here, and takes what it took there, by position and by name.

`nnterp_1_3_names.json` has its names: for a function its parameters with their defaults, for a class null, for a field
of a class `{"field": default}`, for a property `property` or `settable property`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from nnterp import StandardizedTransformer

NAMES: dict[str, Any] = json.loads((Path(__file__).parent / "nnterp_1_3_names.json").read_text(encoding="utf-8"))

#: What differs and is meant to, with the reason.
DELIBERATE = {
    "nnterp.prompt_utils.run_prompts": "tqdm=tqdm is a function and no literal; that one is a bar by default, too.",
}


def found(name: str) -> Any:
    """What a dotted name means: all modules of nnterp 1.3 are of two parts."""
    package, module, *parts = name.split(".")
    value: Any = importlib.import_module(f"{package}.{module}")
    for part in parts:
        value = inspect.getattr_static(value, part) if inspect.isclass(value) else getattr(value, part)
    return value


def disagreement(name: str, wanted: list[str]) -> str | None:
    """How a call that nnterp 1.3 takes could go wrong here."""
    value = found(name)
    function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
    given = list(inspect.signature(function).parameters.values())
    if given and given[0].name in ("self", "cls"):
        given = given[1:]
    by_name = {each.name: each for each in given}
    takes_any = any(each.kind is each.VAR_KEYWORD for each in given)
    for index, word in enumerate(wanted):
        parameter, _, default = word.partition("=")
        if parameter.startswith("*"):
            if not takes_any:
                return f"takes no {parameter}"
            continue
        here = by_name.get(parameter)
        if here is None or given[index] is not here or here.kind is not here.POSITIONAL_OR_KEYWORD:
            return f"{parameter} is not parameter {index}"
        if default and here.default != ast.literal_eval(default):
            return f"{parameter}={here.default!r} and not {default}"
    more = [
        each.name for each in given[len(wanted) :] if each.default is each.empty and each.kind < each.VAR_POSITIONAL
    ]
    return f"asks for {more}, too" if more else None


@pytest.mark.parametrize("name", [name for name, what in NAMES.items() if isinstance(what, list)])
def test_a_function_takes_what_it_took(name: str) -> None:
    wrong = disagreement(name, [word for word in NAMES[name] if name not in DELIBERATE or not word.startswith("tqdm=")])
    assert wrong is None, f"{name}: {wrong}"


def test_classes_and_what_they_hold(demo_gpt2: StandardizedTransformer) -> None:
    for name, what in NAMES.items():
        owner = name.rpartition(".")[0]
        if what is None:
            assert inspect.isclass(found(name)), name
        elif isinstance(what, dict) and owner.endswith("StandardizedTransformer"):
            assert isinstance(getattr(demo_gpt2, name.rpartition(".")[2]), int), name
        elif isinstance(what, dict):
            here = inspect.signature(found(owner)).parameters[name.rpartition(".")[2]]
            default = inspect.Parameter.empty if what["field"] is None else ast.literal_eval(what["field"])
            assert here.default == default, name
        elif isinstance(what, str):
            value = found(name)
            assert isinstance(value, property), name
            assert what == "property" or value.fset is not None, name


def test_what_differs_is_named() -> None:
    assert set(DELIBERATE) <= set(NAMES) and len(NAMES) == 130


def test_a_difference_is_seen() -> None:
    """The twin: what would not run here is told."""
    name = "nnterp.prompt_utils.get_first_tokens"
    good = NAMES[name]
    assert disagreement(name, good) is None
    assert disagreement(name, good[::-1]) == "use_hacky_implementation is not parameter 0"
    assert disagreement(name, [*good[:2], "use_hacky_implementation=True"]) == (
        "use_hacky_implementation=False and not True"
    )
    assert disagreement(name, [*good, "more=1"]) == "more is not parameter 3"
    assert disagreement(name, good[:1]) == "asks for ['llm_or_tokenizer'], too"
    assert disagreement(name, [*good, "**kwargs"]) == "takes no **kwargs"
