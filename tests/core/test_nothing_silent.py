"""Nothing that is asked for is silently not done.

Two tables: what cannot be is an error at once, at that line and with the nearest names; what was asked for and did not
come to pass is an error at the end of the trace. After each the model is as it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nnsight_core import (
    GradientError,
    LanguageModel,
    ModuleNotRunError,
    NNsight,
    NoSuchEntryError,
    NoSuchModuleError,
    NoTraceError,
    OptionError,
    OutOfOrderError,
    RemoteError,
    RenameError,
    StepNotRunError,
    TraceStoppedError,
)
from nnterp.demo_models import demo_model_path
from tests.families import tiny_model

IDS = [5, 6, 7, 8]
TEXT = "The Eiffel Tower is in the city of"
X = torch.ones(1, 3)


class Spare(torch.nn.Module):
    """It has a module that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.spare, self.last = (torch.nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x))


@pytest.fixture(scope="module")
def text() -> LanguageModel:
    return LanguageModel(demo_model_path("demo-gpt2"))


@pytest.fixture(scope="module")
def ids() -> LanguageModel:
    return LanguageModel(tiny_model("gpt2"))


@pytest.fixture
def spare() -> NNsight:
    return NNsight(Spare())


Ask = Callable[[Any, Any], Any]

# With a live trace of a language model: what is asked of the model or the tracer, and what is said.
IN_A_TRACE: dict[str, tuple[Ask, type[Exception], str]] = {
    "a module": (lambda m, t: m.transformer.hh, NoSuchModuleError, "Did you mean 'h'"),
    "a module by way of the tracer": (lambda m, t: t.transfromer, NoSuchModuleError, "Did you mean 'transformer'"),
    "a block for all steps of a module": (
        lambda m, t: m.lm_head.all(),
        NoSuchModuleError,
        r"for step in tracer.all\(\)",
    ),
    "a condition of the trace": (lambda m, t: t.cond(True), NoSuchModuleError, "Write: if value"),
    "a module that stands further down": (lambda m, t: m.ln_f, NoSuchModuleError, r"name is at 'transformer\.ln_f'"),
    "a method": (lambda m, t: m.genrate("Hello"), NoSuchModuleError, "Did you mean 'generate'"),
    "a path": (lambda m, t: m.get("transformer.h.0.atn"), NoSuchModuleError, "Did you mean 'attn'"),
    "a path in brackets": (lambda m, t: m["transformer.h.0.atn"], NoSuchModuleError, "Did you mean 'attn'"),
    "a path beyond a leaf": (lambda m, t: m.get("lm_head.x"), NoSuchModuleError, "It has no modules of its own"),
    "an entry of a list": (lambda m, t: m.transformer.h[9], NoSuchEntryError, r"has 3 modules, \[0\] to \[2\]; \[9\]"),
    "an entry from the end": (lambda m, t: m.transformer.h[-4], NoSuchEntryError, r"\[-4\] is not among them"),
    "an entry of a leaf": (lambda m, t: m.lm_head[0], NoSuchEntryError, "has no modules of its own"),
    "a value": (lambda m, t: m.lm_head.outptu, NoSuchModuleError, "lm_head"),
    "a value to set": (lambda m, t: setattr(m.lm_head, "outptu", 0), NoSuchModuleError, "Did you mean 'output'"),
    "a module to set": (lambda m, t: setattr(m, "lm_haed", 0), NoSuchModuleError, "Did you mean 'lm_head'"),
    "a part of an output to set": (
        lambda m, t: setattr(m.output, "logit", 0),
        AttributeError,
        "setting it would do nothing. Did you mean 'logits'",
    ),
    "a part of a tensor to set": (
        lambda m, t: setattr(m.lm_head.output, "shpae", 0),
        AttributeError,
        "Did you mean 'shape'",
    ),
    "None as an output": (lambda m, t: setattr(m.lm_head, "output", None), ValueError, "cannot be set to None"),
    "skipping nothing": (lambda m, t: m.transformer.hh.skip(0), NoSuchModuleError, "Did you mean 'h'"),
    "skipping a list of modules": (lambda m, t: m.transformer.h.skip(0), ModuleNotRunError, "transformer.h.skip"),
    "a cache of nothing": (lambda m, t: t.cache(modules=[]), OptionError, "keeps nothing"),
    "a cache of neither": (lambda m, t: t.cache(include_output=False), OptionError, "keeps nothing"),
    "a cached path": (lambda m, t: t.cache(modules=["transformer.hh"]), NoSuchModuleError, "Did you mean 'h'"),
    "a cached path with model.": (lambda m, t: t.cache(modules=["model.lm_haed"]), NoSuchModuleError, "'lm_head'"),
    "a single cached path": (lambda m, t: t.cache(modules="lm_haed"), NoSuchModuleError, "Did you mean 'lm_head'"),
    "a cached thing": (lambda m, t: t.cache(modules=[3]), OptionError, "3 is no module"),
    "a cached stranger": (lambda m, t: t.cache(modules=[torch.nn.ReLU()]), NoSuchModuleError, "'ReLU'"),
    "a cached module of another model": (
        lambda m, t: t.cache(modules=[NNsight(torch.nn.Sequential(torch.nn.Tanh()))[0]]),
        NoSuchModuleError,
        "'Tanh'",
    ),
    "an option of a cache": (lambda m, t: t.cache(include_input=True), TypeError, "include_input"),
    "a cache entry": (lambda m, t: t.cache(modules=["lm_head"])["lm_haed"], NoSuchModuleError, "The cache has no"),
    "a step": (lambda m, t: next(iter(t.iter[1])), StepNotRunError, "A trace runs the model once"),
    "steps": (lambda m, t: list(t.iter[0:2]), StepNotRunError, r"tracer.iter\[1\]"),
    "the next step": (lambda m, t: t.next(), StepNotRunError, "A trace runs the model once"),
    "a module's next step": (lambda m, t: m.lm_head.next(), StepNotRunError, r"lm_head.next\(\)"),
    "a step before the first": (lambda m, t: t.next(-1), ValueError, "counted from 0"),
    "a step by name": (lambda m, t: t.iter["first"], TypeError, "not 'first'"),
    "half a step": (lambda m, t: t.iter[1.5], TypeError, "not 1.5"),
    "a step that is a bool": (lambda m, t: t.iter[True], TypeError, "not True"),
    "the last step": (lambda m, t: t.iter[-1], ValueError, "nobody knows the last one"),
    "steps backwards": (lambda m, t: t.iter[3:1], ValueError, "forwards"),
    "a step backwards": (lambda m, t: t.iter[3:1:-1], ValueError, "forwards"),
    "steps in disorder": (lambda m, t: t.iter[[2, 1]], ValueError, "forwards"),
    "a block for several steps": (lambda m, t: t.iter[0:2].__enter__(), TypeError, "Write a loop"),
    "a block for all steps": (lambda m, t: t.iter[:].__enter__(), TypeError, "Write a loop"),
    "an invoke in a trace with an input": (
        lambda m, t: t.invoke(IDS).__enter__(),
        RuntimeError,
        "has an input already",
    ),
}


def check_error(caught: pytest.ExceptionInfo[BaseException], kind: type[Exception], message: str) -> None:
    assert caught.type is kind or (issubclass(caught.type, kind) and kind in (AttributeError, ValueError, TypeError))
    assert re.search(message, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("name", IN_A_TRACE)
def test_it_is_an_error_at_once(name: str, ids: LanguageModel) -> None:
    ask, kind, message = IN_A_TRACE[name]
    reached = False
    with pytest.raises(kind) as caught, ids.trace(IDS) as tracer:
        ask(ids, tracer)
        reached = True
    assert not reached
    check_error(caught, kind, message)
    with ids.trace(IDS):
        assert ids.lm_head.output.shape == (1, 4, 320)


# Opening a trace, each with what it is to be opened with.
OPENED: dict[str, tuple[Ask, type[Exception], str]] = {
    "an argument": (lambda m, s: m.trace(TEXT, outputattentions=True), OptionError, "Did you mean 'output_attentions'"),
    "an argument in an invoke": (
        lambda m, s: invoke(m.trace(), TEXT, outputattentions=True),
        OptionError,
        "Did you mean 'output_attentions'",
    ),
    "an argument for all invokes": (
        lambda m, s: invoke(m.trace(output_hiden_states=True), TEXT),
        OptionError,
        "Did you mean 'output_hidden_states'",
    ),
    "an entry of a batch": (
        lambda m, s: m.trace({"input_ids": torch.tensor([IDS]), "attention_masc": torch.ones(1, 4)}),
        OptionError,
        "Did you mean 'attention_mask'",
    ),
    "an argument without a block": (lambda m, s: m.trace(TEXT, trace=False, uses_cache=1), OptionError, "'use_cache'"),
    "an argument of another model": (lambda m, s: s.trace(X, factor=2), TypeError, "factor"),
    "a generation's argument": (lambda m, s: m.trace(TEXT, max_new_tokens=3), OptionError, r"model.generate\(prompt"),
    "a generation": (
        lambda m, s: m.generate(TEXT, max_new_token=3),
        ValueError,
        r"not used by the model.*max_new_token",
    ),
    "a generation's invoke": (
        lambda m, s: invoke(m.generate(max_new_token=3), TEXT),
        ValueError,
        r"not used by the model.*max_new_token",
    ),
    "a tokenizer's option": (
        lambda m, s: m.trace(TEXT, invoker_args={"truncatio": True}),
        OptionError,
        "Did you mean 'truncation'",
    ),
    "a tokenizer's option in an invoke": (
        lambda m, s: invoke(m.trace(), TEXT, invoker_args={"truncatio": True}),
        OptionError,
        "Did you mean 'truncation'",
    ),
    "a tokenizer's option for ids": (
        lambda m, s: m.trace(IDS, invoker_args={"truncation": True}),
        OptionError,
        "this input is not text",
    ),
    "a tokenizer's option beside ids": (lambda m, s: m.trace(IDS, truncation=True), OptionError, "input is not text"),
    "a tokenizer's option for no text": (
        lambda m, s: s.trace(X, invoker_args={"truncation": True}),
        OptionError,
        "takes its inputs as they are",
    ),
    "no dict of options": (lambda m, s: m.trace(TEXT, invoker_args=["truncation"]), OptionError, "it is a list"),
    "another machine": (lambda m, s: m.trace(TEXT, remote=True), RemoteError, "traces run in this process only"),
    "another machine for a runner": (lambda m, s: m.forward(remote=True), RemoteError, "nothing was sent"),
    "another machine for an invoke": (lambda m, s: invoke(m.trace(), TEXT, remote=True), RemoteError, "device_map"),
    "another machine for a generation": (lambda m, s: m.generate(TEXT, remote=True), RemoteError, "nothing was run"),
    "another machine without a block": (
        lambda m, s: s.trace(X, trace=False, remote=True),
        RemoteError,
        "Leave remote out",
    ),
    "inference mode": (lambda m, s: m.forward(inference=True), OptionError, r"with torch.inference_mode\(\)"),
    "a new name": (lambda m, s: NNsight(s._module, rename={"frist": "x"}), RenameError, "Did you mean 'first'"),
    "an alias": (lambda m, s: NNsight(s._module, aliases={"": {"x": "frist"}}), RenameError, "Did you mean 'first'"),
    "a wrapper's option": (lambda m, s: NNsight(s._module, renames={}), TypeError, "renames"),
    "a loaded model's option": (lambda m, s: LanguageModel(m._module, devicemap="x"), TypeError, "devicemap"),
    "a loading option": (
        lambda m, s: LanguageModel(demo_model_path("demo-gpt2"), devicemap="x", dispatch=True),
        TypeError,
        "devicemap",
    ),
}


def invoke(tracer: Any, *inputs: Any, **kwargs: Any) -> Any:
    with tracer:
        with tracer.invoke(*inputs, **kwargs):
            pass
    raise AssertionError("it was silent")


@pytest.mark.parametrize("name", OPENED)
def test_opening_it_is_an_error(name: str, text: LanguageModel, spare: NNsight) -> None:
    ask, kind, message = OPENED[name]
    with pytest.raises(kind) as caught:
        with ask(text, spare):
            pass
        pytest.fail("it was silent")
    check_error(caught, kind, message)


# What was asked for and did not come to pass, live and recorded.


def set_output(m: Any, t: Any) -> None:
    m.spare.output = 0


def set_input(m: Any, t: Any) -> None:
    m.spare.input = X


def change(m: Any, t: Any) -> None:
    m.spare.output[:, 0] += 1


def read(m: Any, t: Any) -> None:
    m.spare.output.save()


def skip(m: Any, t: Any) -> None:
    m.spare.skip(m.first.output)


def cache(m: Any, t: Any) -> None:
    t.cache(modules=[m.first, m.spare])


def cache_too_late(m: Any, t: Any) -> None:
    m.last.output.save()
    t.cache(modules=[m.first])


def cache_half_too_late(m: Any, t: Any) -> None:
    m.first.output.save()
    t.cache(modules=["first"], include_inputs=True)


def log(m: Any, t: Any) -> None:
    t.log(m.spare.output)


def too_late(m: Any, t: Any) -> None:
    m.last.output.save()
    m.first.output = 0


def change_too_late(m: Any, t: Any) -> None:
    hidden = m.first.output
    m.last.output.save()
    hidden[:] = 0


def gradient(m: Any, t: Any) -> None:
    m.first.output.grad.save()


def gradient_of_what_is_not_on_the_way(m: Any, t: Any) -> None:
    other = m.first.output.detach().clone().requires_grad_()
    other.grad.save()
    m.last.output.sum().backward()


def after_stop(m: Any, t: Any) -> None:
    m.first.output.save()
    t.stop()
    m.last.output = 0


NOT_DONE: dict[Callable[[Any, Any], None], type[Exception]] = {
    set_output: ModuleNotRunError,
    set_input: ModuleNotRunError,
    change: ModuleNotRunError,
    read: ModuleNotRunError,
    skip: ModuleNotRunError,
    cache: ModuleNotRunError,
    cache_too_late: ModuleNotRunError,
    cache_half_too_late: ModuleNotRunError,
    log: ModuleNotRunError,
    too_late: OutOfOrderError,
    change_too_late: OutOfOrderError,
    gradient: GradientError,
    gradient_of_what_is_not_on_the_way: GradientError,
    after_stop: TraceStoppedError,
}
#: A recorded body opens its cache before anything runs.
NEVER_LATE = (cache_too_late, cache_half_too_late)


@pytest.mark.parametrize("ask", NOT_DONE, ids=lambda ask: ask.__name__)
@pytest.mark.parametrize("way", ["live", "in an invoke", "in the second invoke", "for the whole batch"])
def test_it_is_an_error_by_the_end(ask: Callable[[Any, Any], None], way: str, spare: NNsight) -> None:
    expected = NOT_DONE[ask]
    if way != "live" and ask in NEVER_LATE:
        with spare.trace() as tracer, tracer.invoke(X):
            ask(spare, tracer)
        return
    with pytest.raises(expected) as caught:
        if way == "live":
            with spare.trace(X) as tracer:
                ask(spare, tracer)
        else:
            with spare.trace() as tracer:
                if way == "in the second invoke":
                    with tracer.invoke(X):
                        spare.output.save()
                with tracer.invoke(X):
                    if way != "for the whole batch":
                        ask(spare, tracer)
                if way == "for the whole batch":
                    with tracer.invoke():
                        ask(spare, tracer)
    assert "test_nothing_silent.py" in str(caught.value)
    with spare.trace(X):
        found = spare.output.save()
    assert torch.equal(found.value, spare._module(X))


def test_a_cache_in_which_nothing_came(spare: NNsight) -> None:
    with pytest.raises(ModuleNotRunError, match=r"Anything at all, for a cache"), spare.trace(X) as tracer:
        tracer.result.save()
        tracer.cache()


def loop(m: Any, t: Any) -> None:
    for _ in t.iter[1:5]:
        m.lm_head.output.save()


def empty_loop(m: Any, t: Any) -> None:
    for _ in t.iter[1:5]:
        pass


def block(m: Any, t: Any) -> None:
    with t.iter[4]:
        m.lm_head.output = 0


def empty_block(m: Any, t: Any) -> None:
    with t.iter[4]:
        pass


def next_module(m: Any, t: Any) -> None:
    m.lm_head.next(4).output.save()


def next_tracer(m: Any, t: Any) -> None:
    t.next(4)
    m.lm_head.output[:] = 0


@pytest.mark.parametrize("ask", [loop, empty_loop, block, empty_block, next_module, next_tracer])
@pytest.mark.parametrize("way", ["live", "in an invoke"])
def test_a_step_that_does_not_come(ask: Callable[[Any, Any], None], way: str, ids: LanguageModel) -> None:
    with pytest.raises(StepNotRunError, match=r"the model ran 2 times"):
        if way == "live":
            with ids.generate(IDS, max_new_tokens=2, do_sample=False) as tracer:
                ask(ids, tracer)
        else:
            with ids.generate(max_new_tokens=2, do_sample=False) as tracer, tracer.invoke(IDS):
                ask(ids, tracer)


def test_values_outside_a_trace(ids: LanguageModel) -> None:
    for ask in (
        lambda: ids.lm_head.output,
        lambda: ids.lm_head.input,
        lambda: setattr(ids.lm_head, "output", 0),
        lambda: ids.lm_head.skip(0),
        lambda: ids.lm_head.next(),
        lambda: ids.generator.output,
    ):
        with pytest.raises(NoTraceError):
            ask()
