"""A wrapped model is the plain module: it is copied, written to files, scripted, changed and let go as ever."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_core import LanguageModel, NNsight, NoTraceError
from tests import leaks
from tests.families import tiny_model

X = torch.linspace(-1, 1, 6).reshape(2, 3)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))


def written_and_read(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": written_and_read,
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_a_model_copied_during_a_trace_is_a_plain_model(make: Callable[[Any], Any]) -> None:
    plain = net()
    model = NNsight(plain)
    with model.trace(X):
        # Its input could still be skipped, its output is waited for, and its ancestors are armed.
        assert model[1].input is not None
        during = make(plain)
        model[1].output *= 2
        output = model.output.save()
        beside = during(X)
    assert torch.equal(beside, plain(X)) and torch.equal(during(X), plain(X))
    assert torch.equal(output.value, plain[2](plain[1](plain[0](X)) * 2))
    with NNsight(during).trace(X):
        again = make(during)
    assert torch.equal(again(X), plain(X))
    assert list(during.state_dict()) == list(plain.state_dict())


def test_a_model_with_a_forward_of_its_own_copied_during_a_trace() -> None:
    plain = net()
    plain[1].forward = torch.relu
    model = NNsight(plain)
    with model.trace(X):
        assert model[1].input is not None
        during = copy.deepcopy(plain)
    assert torch.equal(during(X), plain[2](plain[0](X).relu()))


@pytest.mark.parametrize("make", [copy.deepcopy, COPIES["pickle"]])
def test_a_wrapped_model_is_copied_with_its_module(make: Callable[[Any], Any]) -> None:
    model = NNsight(net())
    other = make(model)
    with other.trace(X):
        other[0].output = 0
        changed = other.output.save()
    assert torch.equal(model[0]._module.weight, other[0]._module.weight)
    assert not torch.equal(changed.value, model._module(X))


def test_a_copy_is_made_of_a_model_that_generates() -> None:
    module = tiny_model("gpt2")
    model = LanguageModel(module)
    with model.generate([3, 4, 5], max_new_tokens=2, do_sample=False) as tracer:
        for _ in tracer.iter[:]:
            assert model.transformer.h[0].output is not None
            during = pickle.loads(pickle.dumps(module))
        tokens = model.generator.output.save()
    again = during.generate(
        torch.tensor([[3, 4, 5]]), attention_mask=torch.ones(1, 3), max_new_tokens=2, do_sample=False
    )
    assert torch.equal(tokens.value, again)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_scripting_and_a_forward_of_ones_own_after_a_trace() -> None:
    plain = net()
    model = NNsight(plain)
    with model.trace(X):
        assert model[1].input is not None
        model[1].output *= 2
        model[2].skip(model[1].output)
    assert torch.equal(torch.jit.script(plain)(X), plain(X))
    model[1].forward = lambda x: x * 0
    assert not plain[1](X).any()
    with model.trace(X):
        hidden = model[1].output.save()
    assert not hidden.value.any()
    del plain[1].forward
    assert torch.equal(plain[1](X), X.tanh())


def test_the_state_is_the_same_during_a_trace() -> None:
    plain = net()
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    with NNsight(plain).trace(X) as tracer:
        assert tracer.output is not None
        during = plain.state_dict()
        assert plain.load_state_dict(during) is not None
    assert list(during) == list(before)
    assert all(torch.equal(during[name], before[name]) for name in before)


# What is let go is gone at once.


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Reference counts alone free memory."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _save(model: NNsight) -> list[Any]:
    with model.trace(X):
        return [model[1].output.save(), model.output.save()]


def _change(model: NNsight) -> list[Any]:
    with model.trace(X):
        model[0].input *= 2
        model[1].output[:] = model[0].output
        return [model.output.save()]


def _skip(model: NNsight) -> list[Any]:
    with model.trace(X):
        model[1].skip(model[0].output)
        return [model.output.save()]


def _stop(model: NNsight) -> list[Any]:
    with model.trace(X) as tracer:
        hidden = model[1].output.save()
        tracer.stop()
    return [hidden]


def _gradients(model: NNsight) -> list[Any]:
    with model.trace(X):
        hidden = model[1].output
        with model.output.sum().backward():
            return [hidden.grad.save()]


def _fail(model: NNsight) -> list[Any]:
    try:
        with model.trace(X):
            hidden = model[1].output.save()
            raise KeyError
    except KeyError:
        return [hidden]


USES = {use.__name__.strip("_"): use for use in (_save, _change, _skip, _stop, _gradients, _fail)}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_model_and_what_was_saved_of_it_are_free_at_once(
    no_collector: None, use: Callable[[NNsight], list[Any]]
) -> None:
    def run() -> tuple[weakref.ref[Any], list[weakref.ref[Any]]]:
        plain = net()
        saved = use(NNsight(plain))
        values = [weakref.ref(each.value) for each in saved]
        assert all(each() is not None for each in values)
        saved.clear()
        assert not [each() for each in values if each() is not None]
        return weakref.ref(plain), values

    module, _ = run()
    assert module() is None


def _traced(plain: Any) -> tuple[Any, list[Any]]:
    with NNsight(plain).trace(X) as tracer:
        return tracer, [tracer.output.save()]


def _invoked(plain: Any) -> tuple[Any, list[Any]]:
    model = NNsight(plain)
    with model.trace() as tracer:
        with tracer.invoke(X):
            hidden = model[0].output.save()
        with tracer.invoke(X):
            model[0].output = hidden
            return tracer, [hidden, model.output.save()]


def _forward(plain: Any) -> tuple[Any, list[Any]]:
    model = NNsight(plain)
    with model.forward() as tracer, tracer.invoke(X):
        hidden = model[0].output.save()
    assert torch.equal(tracer.output, plain(X))
    return tracer, [hidden]


def _edited(plain: Any) -> tuple[Any, list[Any]]:
    model = NNsight(plain)
    with model.edit() as edited:
        edited[0].output *= 2
    with edited.trace(X) as tracer:
        return tracer, [edited.output.save()]


def _with_gradients(plain: Any) -> tuple[Any, list[Any]]:
    model = NNsight(plain)
    with torch.enable_grad(), model.trace(X) as tracer:
        hidden = model[0].output
        with model.output.sum().backward():
            gradient = hidden.grad.save()
    return tracer, [gradient]


def _scanned(plain: Any) -> tuple[Any, list[Any]]:
    model = NNsight(plain)
    with model.scan(X) as tracer:
        return tracer, [tracer.output.save()]


def _cached(plain: Any) -> tuple[Any, list[Any]]:
    with NNsight(plain).trace(X) as tracer:
        tracer.cache()
        return tracer, [tracer.output.save()]


def _failed(plain: Any) -> tuple[Any, list[Any]]:
    tracer = NNsight(plain).trace(X)
    with pytest.raises(KeyError), tracer:
        hidden = tracer.output.save()
        raise KeyError
    return tracer, [hidden]


TRACERS = {
    use.__name__.strip("_"): use
    for use in (_traced, _invoked, _forward, _edited, _with_gradients, _scanned, _cached, _failed)
}


@pytest.mark.parametrize("use", TRACERS.values(), ids=TRACERS)
@torch.no_grad()
def test_a_tracer_that_lives_on_keeps_no_model(no_collector: None, use: Callable[[Any], tuple[Any, list[Any]]]) -> None:
    plain = net()
    module, weight = weakref.ref(plain), weakref.ref(plain[0].weight)
    tracer, saved = use(plain)
    del plain
    assert module() is None and weight() is None
    assert all(each.shape == X.shape for each in saved) and tracer.forward_passes >= 1
    with pytest.raises(NoTraceError, match=r"model\.linear was asked for outside a trace"):
        tracer.linear  # noqa: B018
    with pytest.raises(RuntimeError, match=r"has been run. Call \.trace"), tracer:
        pass


def test_that_a_hoarder_is_caught(no_collector: None) -> None:
    plain = net()
    hoard = [plain]
    reference = weakref.ref(plain)
    del plain
    assert reference() is not None and hoard


def test_hooks_of_a_copy_are_nobodys() -> None:
    plain = net()
    with NNsight(plain).trace(X) as tracer:
        assert tracer.output is not None
        during = copy.deepcopy(plain)
    assert not leaks.hooks_on([plain])
    seen: list[Any] = []
    handle = during[1].register_forward_hook(lambda *each: seen.append(each[0]))
    during(X)
    handle.remove()
    assert seen == [during[1]]
