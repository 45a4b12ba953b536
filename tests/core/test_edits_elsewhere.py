"""Edits in sessions and in scans, with modules called by hand in them; and what is given to an edit is its own."""

from __future__ import annotations

import array
import collections
import copy
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch

from nnsight_core import NNsight, OutOfOrderError, ScanError, apply
from tests.core.conftest import WithAutoencoder

X = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.5, 2.0]], dtype=torch.float64)


@pytest.fixture
def module() -> Any:
    return WithAutoencoder().double()


@pytest.fixture
def model(module: Any) -> NNsight:
    return NNsight(module)


def through_it(model: NNsight) -> NNsight:
    """``model`` with the first layer's output taken through the autoencoder."""
    with model.edit() as edited:
        edited.one.output = edited.sae(edited.one.output, hook=True)
    assert isinstance(edited, NNsight)
    return edited


def expected(module: Any, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = module.two(module.sae(module.one(x)))
    return result


# Scans.


def test_an_edit_that_calls_a_module_is_done_in_a_scan(model: NNsight, module: Any) -> None:
    edited = through_it(model)
    with edited.scan(X) as tracer:
        cache = tracer.cache(modules=["sae.encoder"])
        features = edited.sae.encoder.output.save()
        output = edited.output.save()
    assert features.shape == cache["sae.encoder"].output.shape == (2, 5) and output.shape == (2, 3)
    with edited.scan() as tracer:
        with tracer.invoke(X):
            first = edited.sae.encoder.output.save()
        with tracer.invoke(X[:1]):
            second = edited.sae.decoder.output.save()
            called = edited(X[:1]).shape
    assert (first.shape, second.shape, called) == ((2, 5), (1, 3), (1, 3))
    # The twin had its turn; the modules are those that they were.
    with edited.trace(X):
        after = edited.output.save()
    torch.testing.assert_close(after.value, expected(module, X))
    torch.testing.assert_close(model(X), module(X))


def test_what_an_edit_saves_is_fake_after_a_scan_and_a_number_after_a_trace(model: NNsight, module: Any) -> None:
    with model.edit() as edited:
        edited.one.output = edited.sae(edited.one.output, hook=True)
        features = edited.sae.encoder.output.save()
    with edited.scan(X[:1]):
        assert edited.output.shape == (1, 3)
        inside = features.shape
    assert inside == features.shape == (1, 5)
    with pytest.raises(ScanError):
        features.tolist()
    with edited.trace(X):
        pass
    torch.testing.assert_close(features.value, module.sae.encoder(module.one(X)))


def test_a_scan_finds_the_mistakes_of_an_edit(model: NNsight) -> None:
    with model.edit() as edited:
        rebuilt = edited.sae(edited.one.output, hook=True)
        edited.sae.encoder.output[:, 0] = 0
        edited.one.output = rebuilt
    for open_it in (edited.scan, edited.trace):
        with pytest.raises(OutOfOrderError, match=r"call with hook=True is over"), open_it(X):
            edited.output.save()
    with model.edit() as edited:
        edited.two.output = edited.sae.encoder(edited.one.output) @ torch.ones(4, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="reduction dim"), edited.scan(X):
        edited.output.save()


def test_a_scan_while_an_edit_is_written(model: NNsight, module: Any) -> None:
    with model.edit() as edited:
        with model.scan(X):
            wide = model.sae.encoder(model.one.output).shape[-1]
        edited.one.output = edited.one.output * wide
    torch.testing.assert_close(edited(X), module.two(module.one(X) * 5))


# Sessions.


def test_an_edit_of_a_session_uses_what_a_trace_gave(model: NNsight, module: Any) -> None:
    with model.session():
        with model.trace(X):
            hidden = model.one.output
        with model.edit() as edited:
            edited.one.output = edited.sae(hidden * 2, hook=True)
        with edited.trace(X * 3):
            inside = edited.output.save()
    with edited.trace(X * 3):
        after = edited.output.save()
    wanted = module.two(module.sae(module.one(X) * 2))
    torch.testing.assert_close(inside.value, wanted)
    # The edit has its own, whatever the session lets go of.
    torch.testing.assert_close(after.value, wanted)


def test_values_of_a_module_called_by_an_edit_cross_traces(model: NNsight, module: Any) -> None:
    with model.session():
        edited = through_it(model)
        with edited.trace(X):
            features = edited.sae.encoder.output
        with edited.trace(X * 3):
            edited.sae.encoder.output = features
            output = edited.output.save()
    torch.testing.assert_close(output.value, expected(module, X))


def test_an_edit_in_place_that_is_cleared_in_a_session(model: NNsight, module: Any) -> None:
    with model.session():
        with model.edit(inplace=True):
            model.one.output = model.sae(model.one.output, hook=True)
        with model.trace() as tracer:
            with tracer.invoke(X):
                features = model.sae.encoder.output
            with tracer.invoke(X * 3):
                model.sae.encoder.output = features
                edited = model.output.save()
        assert tracer.forward_passes == 1
        model.clear_edits()
        with model.trace(X):
            plain = model.output.save()
    torch.testing.assert_close(edited.value, expected(module, X))
    torch.testing.assert_close(plain.value, module(X))


def test_what_an_edit_saved_in_one_trace_of_a_session_is_used_in_the_next(model: NNsight, module: Any) -> None:
    with model.edit() as edited:
        hidden = edited.one.output.save()
    with model.session():
        with edited.trace(X):
            pass
        with model.trace(X * 3):
            model.one.output = hidden
            output = model.output.save()
    torch.testing.assert_close(output.value, module(X))


def test_a_session_while_an_edit_is_written(model: NNsight, module: Any) -> None:
    with model.edit() as edited:
        with model.session():
            with model.trace(X):
                hidden = model.one.output
            with model.trace(X * 3):
                total = (hidden + model.one.output).save()
        edited.one.output = total
    torch.testing.assert_close(edited(X), module.two(module.one(X) + module.one(X * 3)))


# What an edit is given.


def _fill(value: Any) -> None:
    value[:] = 7


GIVEN: dict[str, tuple[Any, Callable[[Any], None], Callable[[Any], float]]] = {
    "an array": (numpy.ones((2, 3)), _fill, lambda each: float(each.mean())),
    "a large array": (numpy.ones(2**21), _fill, lambda each: float(each.mean())),
    "an array in a dict": ({"by": [numpy.ones(3)]}, lambda each: _fill(each["by"][0]), lambda each: each["by"][0][0]),
    "a set": ({1.0}, lambda each: each.add(2.0), sum),
    "bytes": (bytearray(b"\1"), lambda each: each.append(2), sum),
    "a deque": (collections.deque([1.0]), lambda each: each.append(2.0), sum),
    "numbers": (array.array("d", [1.0]), lambda each: each.append(2.0), sum),
    "a list": ([1.0], lambda each: each.append(2.0), sum),
}


@pytest.mark.parametrize("name", GIVEN)
def test_what_is_given_to_an_edit_is_copied(name: str, model: NNsight, module: Any) -> None:
    given, change, number = GIVEN[name]
    with model.edit() as edited:
        edited.one.output = apply(lambda value, other: value * number(other), edited.one.output * 3, given)
    before = edited(X)
    change(given)
    assert number(given) != 1
    torch.testing.assert_close(edited(X), before)
    torch.testing.assert_close(before, module.two(module.one(X) * 3))


@torch.no_grad()
def test_a_copy_of_an_edited_model_has_the_edits_on_modules_of_its_own(model: NNsight, module: Any) -> None:
    with model.edit() as edited:
        hidden = edited.one.output
        edited.two.input = hidden * 2
        edited.two.output[:, :1] += hidden[:, :1]
    right = edited(X)
    copied = copy.deepcopy(edited)
    torch.testing.assert_close(copied(X), right)
    with copied.trace(X):
        output = copied.output.save()
    torch.testing.assert_close(output.value, right)
    copied._module.one.weight.data.zero_()
    torch.testing.assert_close(edited(X), right)
    assert not torch.equal(copied(X), right)
