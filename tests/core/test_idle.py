"""Once a trace is over nothing is kept: what is deleted is gone at once, without the garbage collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_core import NNsight, OrderError

X = torch.randn(2, 3)


def network() -> nn.Sequential:
    """Its values have no graph, which would keep the parameters, unless the input asks for one."""
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)).requires_grad_(False)


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    """Whatever goes, goes because nobody refers to it any more."""
    gc.disable()
    # What was there before is nobody's concern, and looking through it takes a while.
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        gc.enable()


def nothing(model: NNsight) -> Any:
    with model.trace(X):
        pass


def reading(model: NNsight) -> Any:
    with model.trace(X):
        first = model[0].output.save()
        second = model[1].output
        return [first, (second * 2).save(), model[2].input[0][0].save()]


def writing(model: NNsight) -> Any:
    with model.trace(X):
        model[0].output[:, 0] = 1
        model[1].output += 1
        model[2].input = 3.0
        return [model.output.save()]


def stopping(model: NNsight) -> Any:
    with model.trace(X) as tracer:
        first = model[0].output.save()
        tracer.stop()
    return [first]


def skipping(model: NNsight) -> Any:
    with model.trace(X):
        model[1].skip(model[0].output)
        return [model.output.save()]


def caching(model: NNsight) -> Any:
    with model.trace(X) as tracer:
        cache = tracer.cache(include_inputs=True)
    return [cache["0"].output, cache["1"].input]


def invoking(model: NNsight) -> Any:
    with model.trace() as tracer:
        with tracer.invoke(X):
            first = model[0].output.save()
        with tracer.invoke(X):
            model[0].output[:] = first
            second = (model[1].output * 2).save()
    return [first, second]


def looking(model: NNsight) -> Any:
    with model.trace() as tracer:
        with tracer.invoke(X):
            first = model[0].output.save()
        with tracer.invoke(X):
            if model[0].output.sum() < 1000:
                second = model[2].output.save()
    return [first, second]


def splitting(model: NNsight) -> Any:
    with model.trace() as tracer:
        with tracer.invoke(X):
            last = model[2].output.save()
        with tracer.invoke(X):
            model[0].output[:] = last
            changed = model.output.save()
    assert tracer.forward_passes == 2
    return [last, changed]


def gradients(model: NNsight) -> Any:
    with model.trace(X.clone().requires_grad_()):
        hidden = model[0].output
        with model.output.sum().backward():
            return [hidden.grad.save()]


def gradients_beforehand(model: NNsight) -> Any:
    with model.trace(X.clone().requires_grad_()):
        hidden = model[0].output
        gradient = hidden.grad.save()
        model.output.sum().backward()
    return [gradient]


def too_late(model: NNsight) -> Any:
    with pytest.raises(OrderError), model.trace(X):
        later = model[1].output.save()
        model[0].output.save()
    return [later]


def failing_body(model: NNsight) -> Any:
    with pytest.raises(ZeroDivisionError), model.trace(X):
        kept = [model[1].output.save()]
        1 / 0  # noqa: B018
    return kept


def failing_model(model: NNsight) -> Any:
    with pytest.raises(RuntimeError), model.trace(torch.randn(2, 9)):
        model[1].output.save()


TRACES = [
    nothing,
    reading,
    writing,
    stopping,
    skipping,
    caching,
    invoking,
    looking,
    splitting,
    gradients,
    gradients_beforehand,
    too_late,
    failing_body,
    failing_model,
]
every_trace = pytest.mark.parametrize("trace", TRACES, ids=lambda each: each.__name__)


def values_of(kept: Any) -> list[torch.Tensor]:
    return [getattr(each, "value", each) for each in kept or ()]


@every_trace
def test_what_was_saved_is_gone_when_it_is_deleted(trace: Callable[[NNsight], Any]) -> None:
    kept = trace(NNsight(network()))
    references = [weakref.ref(each) for each in values_of(kept)]
    references += [weakref.ref(each) for each in kept or ()]
    del kept
    assert [reference() for reference in references] == [None] * len(references)


@every_trace
def test_a_model_is_gone_when_it_is_deleted(trace: Callable[[NNsight], Any]) -> None:
    module = network()
    parameter, reference = weakref.ref(module[0].weight), weakref.ref(module)
    model = NNsight(module)
    kept = trace(model)
    del model, module
    assert reference() is None and parameter() is None
    del kept


def garbage_of(trace: Callable[[NNsight], Any], model: NNsight) -> list[Any]:
    """What a trace leaves for the collector."""
    trace(model)
    gc.collect()
    trace(model)
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        gc.collect()
        return list(gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


def is_ours(thing: Any) -> bool:
    return type(thing).__module__.startswith("nnsight_core") or isinstance(thing, (torch.Tensor, nn.Module))


@every_trace
def test_a_trace_leaves_nothing_for_the_collector(trace: Callable[[NNsight], Any]) -> None:
    assert [each for each in garbage_of(trace, NNsight(network())) if is_ours(each)] == []


def test_what_is_left_for_the_collector_is_seen() -> None:
    def careless(model: NNsight) -> None:
        loop: list[Any] = [torch.zeros(1)]
        loop.append(loop)

    assert any(is_ours(each) for each in garbage_of(careless, NNsight(network())))
