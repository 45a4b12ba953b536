"""Spellings of other eras that are not there: the error stands at the line and says what to write instead."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import nnsight_core
from nnsight_core import LanguageModel, NNsight, OptionError, RemoteError
from nnterp.demo_models import demo_model_path

X = torch.linspace(-1, 1, 6).reshape(2, 3)
PROMPT = "The Eiffel Tower is in the city of"


@pytest.fixture
def small() -> NNsight:
    return NNsight(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(demo_model_path("demo-gpt2"))


def a_list_is_saved(tracer: Any, model: Any) -> None:
    list().save()  # type: ignore[attr-defined]  # noqa: C408


def a_dict_is_saved(tracer: Any, model: Any) -> None:
    {"kept": model[0].output}.save()  # type: ignore[attr-defined]


def a_plain_tensor_is_saved(tracer: Any, model: Any) -> None:
    torch.ones(2).save()  # type: ignore[attr-defined]


def a_value_stops(tracer: Any, model: Any) -> None:
    model[0].output.stop()


def a_value_is_updated(tracer: Any, model: Any) -> None:
    model[0].output.update(model[0].output * 2)


def a_value_has_a_node(tracer: Any, model: Any) -> None:
    str(model[0].output.node)


def a_session_of_the_trace(tracer: Any, model: Any) -> None:
    for _ in tracer.session.iter([1]):
        pass


def a_condition(tracer: Any, model: Any) -> None:
    with tracer.cond(model[0].output.sum() > 0):
        pass


def a_list_of_the_trace(tracer: Any, model: Any) -> None:
    tracer.list()


ABSENT: dict[Callable[[Any, Any], None], str] = {
    a_list_is_saved: r"'list' object has no attribute 'save'\n.*save\(it\)",
    a_dict_is_saved: r"'dict' object has no attribute 'save'\n.*save\(it\)",
    a_plain_tensor_is_saved: r"plain tensor of the script's own.*leave .save\(\) out",
    a_value_stops: r"tracer\.stop\(\)",
    a_value_is_updated: r"module\.output = new",
    a_value_has_a_node: "no graph behind a value",
    a_session_of_the_trace: r"with model\.session\(\)",
    a_condition: "Write: if value",
    a_list_of_the_trace: r"save\(\[\]\)",
}


@pytest.mark.parametrize("body", ABSENT, ids=lambda each: each.__name__)
def test_what_is_not_there(body: Callable[[Any, Any], None], small: NNsight) -> None:
    with pytest.raises(AttributeError, match=f"(?s){ABSENT[body]}") as caught, small.trace(X) as tracer:
        body(tracer, small)
    lines = [each.name for each in traceback.extract_tb(caught.value.__traceback__) if each.filename == __file__]
    assert lines[-1] == body.__name__
    with small.trace(X):
        after = small.output.save()
    torch.testing.assert_close(after.value, small._module(X))


@pytest.mark.parametrize("body", ABSENT, ids=lambda each: each.__name__)
def test_what_is_not_there_in_an_invoke(body: Callable[[Any, Any], None], small: NNsight) -> None:
    with pytest.raises(AttributeError, match=f"(?s){ABSENT[body]}") as caught, small.trace() as tracer:
        with tracer.invoke(X):
            body(tracer, small)
    # What waits for a value is found out later, and names its line.
    lines = [each.name for each in traceback.extract_tb(caught.value.__traceback__) if each.filename == __file__]
    assert body.__name__ in lines or f"{Path(__file__).name}:" in str(caught.value)


def test_errors_of_other_kinds_stay_as_they_are(small: NNsight) -> None:
    with pytest.raises(AttributeError) as caught, small.trace(X):
        small[0].output.foo()
    assert str(caught.value) == "'Tensor' object has no attribute 'foo'"
    with pytest.raises(AttributeError) as caught, small.trace(X):
        [].update()  # type: ignore[attr-defined]
    assert str(caught.value) == "'list' object has no attribute 'update'"


def test_a_dict_that_a_module_gives_is_still_updated() -> None:
    class Gives(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"hidden": x}

    with NNsight(Gives()).trace(X) as tracer:
        tracer.output.update(more=X)
        found = tracer.output.save()
    assert sorted(found.value) == ["hidden", "more"]


def test_in_a_session_and_in_an_edit(small: NNsight) -> None:
    with pytest.raises(AttributeError, match="Write: if value"), small.session() as session:
        with session.cond(True):
            pass
    with pytest.raises(AttributeError, match=r"save\(it\)"), small.session():
        [].save()  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"save\(it\)"), small.edit() as edited:
        (edited[0].output,).save()
    with pytest.raises(AttributeError, match="A session has no 'anything'"), small.session() as session:
        str(session.anything)


def test_a_block_for_all_steps(model: LanguageModel) -> None:
    with pytest.raises(TypeError, match="Write a loop"), model.generate(PROMPT, max_new_tokens=2) as tracer:
        with tracer.iter[:]:
            pass
    with pytest.raises(TypeError, match="Write a loop"), model.generate(PROMPT, max_new_tokens=2) as tracer:
        with tracer.all():
            pass
    with pytest.raises(TypeError, match="Write a loop"), model.generate(PROMPT, max_new_tokens=2), model.all():
        pass


def test_names_of_the_package() -> None:
    with pytest.raises(ImportError, match=r"no 'CONFIG'.\nNothing needs to be set up"):
        from nnsight_core import CONFIG  # type: ignore[attr-defined]  # noqa: F401
    with pytest.raises(ImportError, match=r"with model\.trace\(prompt\)"):
        nnsight_core.trace  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(AttributeError, match="no 'anything'"):
        nnsight_core.anything  # type: ignore[attr-defined]  # noqa: B018
    assert not hasattr(nnsight_core, "__wrapped__")


def test_options_of_a_wrapper() -> None:
    with pytest.raises(OptionError, match=r"envoys: .*\nFor other names, write rename="):
        NNsight(torch.nn.Linear(2, 2), envoys={})
    with pytest.raises(OptionError, match=r"envoys: .*\nFor other names, write rename="):
        LanguageModel(demo_model_path("demo-gpt2"), envoys={})
    with pytest.raises(OptionError, match="Did you mean 'rename'"):
        NNsight(torch.nn.Linear(2, 2), renames={})


REMOTE: dict[str, Callable[[Any], Any]] = {
    "trace": lambda model: model.trace(PROMPT, remote=True),
    "generate": lambda model: model.generate(PROMPT, remote=True),
    "scan": lambda model: model.scan(PROMPT, remote=True),
    "forward": lambda model: model.forward(PROMPT, remote=True),
    "a call without a block": lambda model: model.trace(PROMPT, remote=True, trace=False),
}


@pytest.mark.parametrize("ask", REMOTE.values(), ids=REMOTE)
def test_elsewhere_and_in_another_mode(ask: Callable[[Any], Any], model: LanguageModel) -> None:
    with pytest.raises(RemoteError, match="Leave remote out"):
        ask(model)


def test_a_mode_is_opened_by_the_script(model: LanguageModel) -> None:
    for open_it in (model.trace, model.generate, model.forward):
        with pytest.raises(OptionError, match=r"with torch\.inference_mode\(\)"):
            open_it(PROMPT, inference=True)
