"""A tensor that is worked out of a module's call and its result together: read, set, and gone without a trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nnsight_core import NNsight
from nnsight_core.errors import ModuleNotRunError, OutOfOrderError
from nnsight_core.kinds import Derived, Whole
from tests import leaks
from tests.core.conftest import Chain

X = torch.linspace(-1, 1, 6).reshape(2, 3)


class Named(torch.nn.Module):
    """Calls its layer by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(input=x)
        return result


def _gain(whole: Whole) -> torch.Tensor:
    """What the module makes beyond what it takes."""
    _, (args, kwargs), result = whole
    given = args[0] if args else kwargs["input"]
    gain: torch.Tensor = result - given
    return gain


def _with_gain(whole: Whole, before: torch.Tensor, after: torch.Tensor) -> Any:
    return whole[2] + (after - before)


GAIN = Derived("gain", _gain, _with_gain)


def test_it_is_what_the_call_and_the_result_say() -> None:
    model = NNsight(Chain())
    with model.trace(X):
        gain = model.two.read(GAIN).save()
    one = model._module.one(X)
    assert torch.equal(gain, model._module.two(one) - one)
    assert not leaks.hooks_on([model._module])


def test_keyword_arguments_are_there() -> None:
    model = NNsight(Named())
    with model.trace(X):
        gain = model.inner.read(GAIN).save()
    assert torch.equal(gain, model._module.inner(X) - X)


def test_it_is_set_and_read_back_and_the_result_shows_it() -> None:
    model = NNsight(Chain())
    with model.trace(X):
        model.two.write(GAIN, torch.ones(2, 3))
        gain = model.two.read(GAIN).save()
        result = model.two.output.save()
        head = model.head.output.save()
    assert torch.equal(gain, torch.ones(2, 3))
    assert torch.allclose(result, model._module.one(X) + 1, atol=1e-6)
    assert torch.equal(head, model._module.head(result.value))


def test_what_is_set_to_itself_changes_no_bit() -> None:
    model = NNsight(Chain())
    with torch.no_grad(), model.trace(X):
        model.two.write(GAIN, model.two.read(GAIN).clone())
        head = model.head.output.save()
    assert torch.equal(head, model._module(X))


def test_gradients_go_by_it_once() -> None:
    model = NNsight(Chain())
    x = X.clone().requires_grad_()
    with model.trace(x):
        gain = model.two.read(GAIN)
        gradient = gain.grad.save()
        model.head.output.square().sum().backward()
    plain = X.clone().requires_grad_()
    model._module.zero_grad()
    two = model._module.two(model._module.one(plain))
    two.retain_grad()
    model._module.head(two).square().sum().backward()
    assert torch.allclose(gradient, two.grad, atol=1e-6)
    assert torch.allclose(x.grad, plain.grad, atol=1e-6)


def test_each_invoke_has_its_rows() -> None:
    model = NNsight(Chain())
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(X[:1]):
            model.two.write(GAIN, torch.zeros(1, 3))
            changed = model.two.output.save()
        with tracer.invoke(X[1:]):
            gain = model.two.read(GAIN).save()
            untouched = model.two.output.save()
    one = model._module.one(X)
    assert torch.allclose(changed, one[:1], atol=1e-6)
    assert torch.allclose(untouched, model._module.two(one[1:]), atol=1e-6)
    assert torch.allclose(gain, model._module.two(one[1:]) - one[1:], atol=1e-6)


def test_edits_change_it_for_those_who_come_later() -> None:
    model = NNsight(Chain())
    with model.edit() as edited:
        model.two.write(GAIN, model.two.read(GAIN) * 0)
    with torch.no_grad(), edited.trace(X):
        gain = edited.two.read(GAIN).save()
        result = edited.two.output.save()
    assert not gain.any()
    assert torch.allclose(result, model._module.one(X), atol=1e-6)


def test_a_scan_knows_its_shape() -> None:
    model = NNsight(Chain())
    with model.scan(X):
        shape = model.two.read(GAIN).shape
    assert shape == (2, 3)


def test_it_comes_before_the_output_and_never_without_a_call() -> None:
    model = NNsight(Chain())
    with pytest.raises(OutOfOrderError, match=r"two\.gain output was asked for after"), model.trace(X):
        model.two.output.save()
        model.two.read(GAIN)
    with pytest.raises(OutOfOrderError), model.trace(X):
        model.head.output.save()
        model.two.read(GAIN)
    with pytest.raises(ModuleNotRunError), model.trace(X):
        model.unused.read(GAIN)


def test_what_goes_wrong_in_it_is_raised_where_it_is_asked_for() -> None:
    def fails(whole: Whole) -> torch.Tensor:
        raise LookupError("no such thing")

    model = NNsight(Chain())
    with pytest.raises(LookupError, match="no such thing"), model.trace(X):
        model.two.read(Derived("nothing", fails, _with_gain))
    assert not leaks.hooks_on([model._module])
    assert torch.equal(model._module(X), model._module(X))
