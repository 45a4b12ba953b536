"""Skipping a module: it does not run, and the model goes on with the value given."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from nnsight_core import LanguageModel, NNsight, OutOfOrderError
from tests.families import tiny_model

IDS, SHORT = [5, 6, 7, 8], [3, 4]


@pytest.fixture
def module() -> Any:
    return tiny_model("gpt2")


def without_layer(module: Any, index: int, ids: list[int]) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    layer = module.transformer.h[index]
    handles = [
        layer.register_forward_pre_hook(lambda m, args: kept.append(args[0])),
        layer.register_forward_hook(lambda m, args, output: kept[0]),
    ]
    logits: torch.Tensor = module(torch.tensor([ids])).logits
    for handle in handles:
        handle.remove()
    return logits


@contextmanager
def runs_of(part: Any) -> Iterator[list[int]]:
    ran: list[int] = []
    handle = part.register_forward_hook(lambda *each: ran.append(1))
    try:
        yield ran
    finally:
        handle.remove()


def test_a_layer_is_skipped_with_the_value_before_it_or_its_own_input(module: Any) -> None:
    model = LanguageModel(module)
    expected = without_layer(module, 1, IDS)
    with runs_of(module.transformer.h[1].attn) as ran:
        with model.trace(IDS):
            model.transformer.h[1].skip(model.transformer.h[0].output)
            output = model.transformer.h[1].output.save()
            before = model.output.logits.save()
        with model.trace(IDS):
            hidden = model.transformer.h[1].input
            model.transformer.h[1].skip(hidden)
            own = model.output.logits.save()
    assert torch.equal(before, expected) and torch.equal(own, expected)
    assert output.shape == (1, 4, 64)
    assert ran == []
    assert "forward" not in module.transformer.h[1].__dict__


def test_a_tuple_is_given_as_it_is(module: Any) -> None:
    model = LanguageModel(module)
    handle = module.transformer.h[0].attn.register_forward_hook(lambda m, args, output: (output[0] * 0, *output[1:]))
    expected = module(torch.tensor([IDS])).logits
    handle.remove()
    with model.trace(IDS):
        model.transformer.h[0].attn.skip((torch.zeros(1, 4, 64), None))
        logits = model.output.logits.save()
    assert torch.equal(logits, expected)


def test_in_an_invoke_the_others_go_through_it(module: Any) -> None:
    model = LanguageModel(module)
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            model.transformer.h[1].skip(model.transformer.h[0].output)
            skipped = model.output.logits.save()
        with tracer.invoke(SHORT):
            other = model.output.logits.save()
    assert tracer.forward_passes == 1
    torch.testing.assert_close(skipped.value, without_layer(module, 1, IDS))
    torch.testing.assert_close(other[:, -2:], module(torch.tensor([SHORT])).logits)


def test_a_module_whose_input_is_read_shows_its_own_signature(module: Any) -> None:
    with LanguageModel(module).trace(IDS) as tracer:
        assert tracer.input is not None
        assert "logits_to_keep" in inspect.signature(module.forward).parameters


def test_skipping_too_late(module: Any) -> None:
    model = LanguageModel(module)
    with pytest.raises(OutOfOrderError, match=r"h\.1\.skip\(\.\.\.\) was set after"), model.trace(IDS):
        hidden = model.transformer.h[2].output
        model.transformer.h[1].skip(hidden)


def test_a_forward_of_ones_own_is_put_back_and_threads_share_a_module() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    mine = net[0].forward
    net[0].forward = lambda x: mine(x) + 1  # type: ignore[method-assign]
    own = net[0].__dict__["forward"]
    model = NNsight(net)
    wrong: list[str] = []

    def work(number: int) -> None:
        for _ in range(20):
            x = torch.full((1, 3), float(number))
            with model.trace(x):
                if number % 2:
                    model[0].skip(model[0].input * number)
                result = model[0].output.save()
            if not torch.equal(result, x * number if number % 2 else own(x)):
                wrong.append(f"thread {number}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert net[0].__dict__["forward"] is own


class Pair(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return x, {"twice": x * 2}


class Sum(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, other = self.pair(x)
        return one + other["twice"]


@torch.no_grad()
@pytest.mark.parametrize("number", [1, 2])
def test_of_several_who_skip_a_module_the_last_says_what_it_gives(number: int) -> None:
    x, model = torch.ones(2, 3), NNsight(Sum())
    edited = model
    for _ in range(number):
        with edited.edit() as again:
            value = again.pair.input
            again.pair.skip((value * 3, {"twice": value}))
        edited = again
    with edited.trace(x):
        edited.pair.skip((x * 5, {"twice": x}))
        output = edited.output.save()
    assert torch.equal(output.value, x * 6)
    with edited.trace(x):
        output = edited.output.save()
    assert torch.equal(output.value, x * 4) and torch.equal(edited(x), x * 4) and torch.equal(model(x), x * 3)
