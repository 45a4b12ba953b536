"""Gradients inside a trace equal autograd's on the plain model, bit for bit: read, set, repeated, under invokes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nnsight_core import GradientError, LanguageModel, OutOfOrderError
from tests.families import tiny_model

IDS = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def module() -> Any:
    return tiny_model("gpt2")


@pytest.fixture
def model(module: Any) -> LanguageModel:
    return LanguageModel(module)


def expected(module: Any, layer: int, loss: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    handle = module.transformer.h[layer].register_forward_hook(lambda m, args, output: kept.append(output))
    logits = module(torch.tensor([IDS])).logits
    handle.remove()
    return torch.autograd.grad(loss(logits), kept[0])[0]


@pytest.fixture(autouse=True)
def no_gradients_kept(module: Any) -> Any:
    yield
    module.zero_grad()


def test_inside_a_backward_block(module: Any, model: LanguageModel) -> None:
    with model.trace(IDS):
        hidden = model.transformer.h[1].output
        with model.output.logits.sum().backward():
            gradient = hidden.grad.save()
            doubled = (hidden.grad * 2).sum().save()
    assert torch.equal(gradient, expected(module, 1, torch.sum))
    assert torch.equal(doubled, (gradient * 2).sum())


def test_asked_for_before_a_plain_backward(module: Any, model: LanguageModel) -> None:
    with model.trace(IDS):
        gradient = model.transformer.h[1].output.grad.save()
        model.output.logits.sum().backward()
    assert torch.equal(gradient, expected(module, 1, torch.sum))


def test_several_backward_passes(module: Any, model: LanguageModel) -> None:
    with model.trace(IDS):
        hidden = model.transformer.h[1].output
        logits = model.output.logits
        with logits.sum().backward(retain_graph=True):
            first = hidden.grad.save()
        with (logits.sum() ** 2).backward():
            second = hidden.grad.save()
    assert torch.equal(first, expected(module, 1, torch.sum))
    assert torch.equal(second, expected(module, 1, lambda logits: logits.sum() ** 2))


def test_setting_gradients_reaches_what_comes_before(module: Any, model: LanguageModel) -> None:
    def first_layers_gradient(change: Callable[[Any], None]) -> torch.Tensor:
        with model.trace(IDS):
            early, late = model.transformer.h[0].output, model.transformer.h[1].output
            with model.output.logits.sum().backward():
                change(late)
                gradient = early.grad.save()
        found: torch.Tensor = gradient.value
        return found

    def in_place(late: Any) -> None:
        late.grad[:] = 0

    def whole(late: Any) -> None:
        late.grad = late.grad * 2

    assert first_layers_gradient(in_place).abs().sum() == 0
    torch.testing.assert_close(first_layers_gradient(whole), 2 * expected(module, 0, torch.sum))


def test_gradients_of_inputs_and_of_results_of_the_body(module: Any, model: LanguageModel) -> None:
    with model.trace(IDS):
        given = model.transformer.h[1].input
        scaled = model.transformer.h[1].output * 3
        model.transformer.h[1].output = scaled
        with model.output.logits.sum().backward():
            at_input, at_result = given.grad.save(), scaled.grad.save()
    assert at_input.shape == at_result.shape
    assert at_input.abs().sum() > 0 and at_result.abs().sum() > 0


def test_under_several_invokes(module: Any, model: LanguageModel) -> None:
    with model.trace() as tracer:
        gradients = []
        for _ in range(2):
            with tracer.invoke(IDS):
                hidden = model.transformer.h[1].output
                with model.output.logits.sum().backward(retain_graph=True):
                    gradients.append(hidden.grad.save())
    assert tracer.forward_passes == 1
    for gradient in gradients:
        torch.testing.assert_close(gradient.value, expected(module, 1, torch.sum))


def test_a_frozen_model(model: LanguageModel) -> None:
    frozen = tiny_model("gpt2").requires_grad_(False)
    traced = LanguageModel(frozen)
    with traced.trace(IDS):
        hidden = traced.transformer.h[1].output.requires_grad_()
        with traced.output.logits.sum().backward():
            gradient = hidden.grad.save()
    assert torch.equal(gradient, expected(tiny_model("gpt2"), 1, torch.sum))
    with pytest.raises(GradientError, match="requires_grad_"), traced.trace(IDS):
        hidden = traced.transformer.h[1].output
        with traced.output.logits.sum().backward():
            assert hidden.grad is not None


def test_gradients_that_cannot_be(model: LanguageModel) -> None:
    with pytest.raises(GradientError, match="looked at before"), model.trace(IDS):
        hidden = model.transformer.h[1].output
        with model.output.logits.sum().backward():
            assert hidden.grad.sum() > 0
    with pytest.raises(GradientError, match="did not reach"), model.trace(IDS):
        hidden = model.transformer.h[0].output
        aside = (hidden * 2).grad.save()
        model.output.logits.sum().backward()
    assert aside is not None
    with pytest.raises(GradientError, match="has run already"), model.trace(IDS):
        hidden = model.transformer.h[1].output
        block = model.output.logits.sum().backward()
        with block:
            assert hidden.grad is not None
    with pytest.raises(OutOfOrderError, match=r"h\.1\.output"), model.trace(IDS):
        with model.output.logits.sum().backward():
            assert model.transformer.h[1].output.grad is not None


class Straight(torch.autograd.Function):
    """Rounds, and lets gradients pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


def test_a_custom_autograd_function_called_in_the_body_keeps_its_gradient(module: Any, model: LanguageModel) -> None:
    with model.trace(IDS):
        hidden = model.transformer.h[1].output.save()
        rounded = Straight.apply(hidden)
        assert type(rounded) is torch.Tensor
    (gradient,) = torch.autograd.grad(rounded.sum(), hidden.value)
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert torch.equal(rounded, hidden.value.round())


def test_nothing_is_left_on_the_graph(module: Any, model: LanguageModel) -> None:
    with model.trace(IDS):
        hidden = model.transformer.h[1].output.save()
        with model.output.logits.sum().backward():
            gradient = hidden.grad.save()
    assert not hidden.value._backward_hooks
    assert gradient.value.grad_fn is None
