"""Modules that torch has scripted or compiled are read and set from the outside like any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_core import NNsight, NNsightError

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
X = torch.linspace(-1, 1, 6).reshape(2, 3)


def check_read_and_set(net: nn.Sequential) -> None:
    """The middle module is read, set, and stopped at."""
    model = NNsight(net)
    plain = net(X)
    with model.trace(X):
        given = model[1].input.save()
        hidden = model[1].output.save()
        output = model.output.save()
    assert torch.equal(given + 0, net[0](X))
    assert torch.equal(hidden.value, net[1](net[0](X)))
    assert torch.equal(output.value, plain)
    with model.trace(X):
        model[1].input = model[1].input + 1
        model[1].output = model[1].output * 2
        output = model.output.save()
    assert torch.equal(output.value, net[2](net[1](net[0](X) + 1) * 2))
    with model.trace(X) as tracer:
        assert model[1].output is not None
        tracer.stop()
    assert torch.equal(net(X), plain)


def test_around_a_scripted_submodule_which_takes_no_hooks() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.Tanh()))
    net = nn.Sequential(nn.Linear(3, 3), scripted, nn.Linear(3, 3))
    model = NNsight(net)
    for ask in (lambda: model[1].output, lambda: model[1].input, lambda: model[1][0].output):
        with pytest.raises((RuntimeError, NNsightError), match="ScriptModule"), model.trace(X):
            ask()
    with model.trace(X):
        before = model[0].output.save()
        after = model[2].input.save()
        model[2].input = model[2].input * 2
        output = model.output.save()
    assert torch.equal(after + 0, scripted(before.value))
    assert torch.equal(output.value, net[2](scripted(before.value) * 2))


def test_a_compiled_submodule() -> None:
    compiled = torch.compile(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), backend="eager")
    check_read_and_set(nn.Sequential(nn.Linear(3, 3), compiled, nn.Linear(3, 3)))
    torch._dynamo.reset()


def test_a_compiled_module_of_the_users_called_with_a_proxy() -> None:
    compiled = torch.compile(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), backend="eager")
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model = NNsight(net)
    with model.trace(X):
        by_position = compiled(model[0].output).save()
        by_keyword = compiled(input=model[0].output).save()
    assert torch.equal(by_position.value, compiled(net[0](X)))
    assert torch.equal(by_keyword.value, by_position.value)
    torch._dynamo.reset()


def test_a_scripted_module_of_the_users_called_with_a_proxy() -> None:
    scripted = torch.jit.script(nn.Linear(3, 3))
    net = nn.Sequential(nn.Linear(3, 3))
    model = NNsight(net)
    with model.trace(X):
        result = scripted(model[0].output).save()
    assert torch.equal(result.value, scripted(net[0](X)))


def check_inside(net: nn.Module, inside: nn.Sequential, path: str) -> None:
    """What is inside a compiled module is read and set, and afterwards the compiled code is used again."""
    model, compiled_before = NNsight(net), net(X)
    with model.trace(X):
        given, hidden = model.get(path)[0].input.clone().save(), model.get(path)[0].output.save()
    assert torch.equal(hidden.value, inside[0](given.value))
    with model.trace(X):
        model.get(path)[0].output *= 2
        changed = model.get(path)[1].output.save()
    assert torch.equal(changed.value, inside[1](inside[0](given.value) * 2))
    with model.trace() as tracer:
        with tracer.invoke(X):
            model.get(path)[0].output *= 2
        with tracer.invoke(X):
            other = model.output.save()
    torch.testing.assert_close(other.value, compiled_before)
    with pytest.raises(KeyError), model.trace(X):
        assert model.get(path)[0].output is not None
        raise KeyError
    counter = torch._dynamo.utils.counters["frames"]["total"]
    assert torch.equal(net(X), compiled_before)
    assert torch._dynamo.utils.counters["frames"]["total"] == counter


@pytest.mark.parametrize("kind", ["wrapper inside", "wrapper around", "in place inside", "in place around"])
def test_inside_a_compiled_module(kind: str) -> None:
    inside = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    net: nn.Module = nn.Sequential(nn.Linear(3, 3), inside, nn.Linear(3, 3))
    path = "1"
    if kind == "wrapper inside":
        net, path = nn.Sequential(nn.Linear(3, 3), torch.compile(inside, backend="eager")), "1._orig_mod"
    elif kind == "wrapper around":
        net, path = torch.compile(net, backend="eager"), "_orig_mod.1"
    else:
        (inside if kind == "in place inside" else net).compile(backend="eager")
    check_inside(net, inside, path)
    torch._dynamo.reset()


def doubling(graph: Callable[..., Any], inputs: Any) -> Callable[..., Any]:
    """A compiler whose code gives twice what it should, so that one sees whether it has run."""
    return lambda *args: tuple(2 * each for each in graph(*args))


class Inside(nn.Module):
    """Is compiled."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """What a compiler would make one operation of."""
        return hidden.sin() + 1


class Partly(nn.Module):
    """Calls something that is compiled between operations of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        inside: Any = Inside()
        if kind == "in place":
            inside.compile(backend=doubling)
        else:
            inside = torch.compile(inside.forward if kind == "function" else inside, backend=doubling)
        self.__dict__["inside"] = inside
        if isinstance(inside, nn.Module):
            self.child = inside

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Operations around the compiled part."""
        return (self.inside(hidden.relu()) - 1).softmax(-1)


@pytest.mark.parametrize("kind", ["function", "wrapper", "in place"])
def test_a_compiled_part_runs_compiled_where_operations_around_it_are_read(kind: str) -> None:
    torch._dynamo.reset()
    net = nn.Sequential(nn.Linear(3, 3), Partly(kind), nn.Linear(3, 3))
    model = NNsight(net)
    with torch.no_grad():
        plain = net(X)
        part = net[1]
        assert isinstance(part, Partly)
        with model.trace(X):
            names = [each.name for each in model[1].source]
            before, after = model[1].source.relu_0.output.save(), model[1].source.sub_0.output.save()
            output = model.output.save()
        # The compiled code may call torch in its turn, and what it does so is the module's that calls it.
        assert names == ["relu_0", *["mul_0"] * (kind == "function"), "sub_0", "softmax_0"]
        assert torch.equal(after.value, part.inside(before.value) - 1)
        assert torch.equal(output.value, plain)
        assert torch.equal(net(X), plain)
    torch._dynamo.reset()
