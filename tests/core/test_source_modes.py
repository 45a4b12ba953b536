"""Looking inside a module puts a mode on while it runs: in whose thread and pass, and that it never stays."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_core import NNsight
from tests import leaks
from tests.core.small_attention import X, attention_model, model_of, plain_probabilities


@pytest.fixture
def model() -> NNsight:
    return attention_model()


def modes() -> int:
    return torch._C._len_torch_function_stack()


class Asking(nn.Module):
    """Says how many modes are on while it runs, and may raise."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.seen: list[int] = []
        self.fails = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(modes())
        y = self.inner(x).tanh()
        if self.fails:
            raise ArithmeticError
        return y.exp()


def test_only_the_module_that_was_asked_has_a_mode_and_only_in_that_pass() -> None:
    first, second = Asking(), Asking()
    model = model_of(first, second)
    with model.trace(X):
        assert model[1].source.tanh_0.output is not None
        assert modes() == 0
        assert "forward" in vars(second)
        assert "forward" not in vars(first)
    model._module(X)
    assert (first.seen, second.seen) == ([0, 0], [1, 0])
    assert "forward" not in vars(second)


@pytest.mark.parametrize("ask_first", ["source.tanh_0", "inner", "half-way"])
@pytest.mark.parametrize("ending", ["stop", "body raises", "model raises", "dropped", "end"])
def test_every_exit_leaves_no_mode(ask_first: str, ending: str) -> None:
    net = Asking()
    model = model_of(net, nn.Linear(3, 3))

    def ask() -> None:
        if ask_first == "source.tanh_0":
            assert model[0].source.tanh_0.output is not None
        else:
            if ask_first == "inner":
                assert model[0].source is not None
            assert model[0].inner.output is not None
            if ask_first == "half-way":
                assert model[0].source.tanh_0.output is not None

    with leaks.watching([model._module]) as watch:
        if ending == "dropped":

            def drop() -> None:
                tracer = model.trace(X)
                tracer.__enter__()
                ask()

            drop()
        else:
            net.fails = ending == "model raises"
            failing = ending in ("body raises", "model raises")
            with pytest.raises(ArithmeticError) if failing else _nothing(), model.trace(X) as tracer:
                if ending == "model raises":
                    # The dry run of a call that is half-way would raise too.
                    net.fails = ask_first != "half-way"
                ask()
                net.fails = ending == "model raises"
                if ending == "stop":
                    tracer.stop()
                if ending == "body raises":
                    raise ArithmeticError
        assert modes() == 0
        net.fails = False
        assert model._module(X).shape == X.shape
    assert not watch.complaints()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def test_modes_of_the_body_and_of_the_model_stay_on_their_sides(model: NNsight) -> None:
    class Watching(torch.overrides.TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    with model.trace(X):
        source = model[1].source
        with Watching() as watching:
            probabilities = source.softmax_0.output
            assert modes() == 1
            assert (probabilities * 2).shape == (2, 4, 4)
        assert modes() == 0
        matmul = source.matmul_1.output.save()
    assert "softmax" not in watching.names
    assert torch.equal(matmul, plain_probabilities(model) @ model._module[0](X))
    with torch.device("cpu"), model.trace(X):
        assert model[1].key.output is not None
        half_way = model[1].source.softmax_0.output.save()
        assert modes() == 1
    assert torch.equal(half_way, plain_probabilities(model))


def test_a_model_that_opens_modes_of_its_own() -> None:
    class Opening(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.device("cpu"):
                y = self.inner(x) + torch.ones(3)
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                return y.exp()

    model = model_of(Opening())
    with model.trace(X):
        names = [operation.name for operation in model[0].source]
    assert names == ["ones_0", "add_0", "exp_0"]
    for half_way in (True, False):
        with model.trace(X):
            source = None if half_way else model[0].source
            assert model[0].inner.output is not None
            ones = (source or model[0].source).ones_0.output.save()
            exponential = model[0].source.exp_0.output.save()
        assert torch.equal(ones, torch.ones(3))
        assert torch.equal(exponential, model._module(X))
        assert modes() == 0


def test_another_thread_never_sees_the_mode() -> None:
    net = Asking()
    model = model_of(net)
    with model.trace(X):
        assert model[0].source is not None
        assert model[0].inner.output is not None
        results: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: results.append(model._module(X)))
        thread.start()
        thread.join()
        tanh = model[0].source.tanh_0.output.save()
    assert net.seen == [1, 0]
    assert torch.equal(results[0], tanh.exp())


def test_two_threads_ask_for_operations_of_one_model(model: NNsight) -> None:
    wanted = plain_probabilities(model)
    failures: list[Any] = []

    def work(number: int) -> None:
        for _ in range(5):
            with model.trace(X + number):
                model[1].source.softmax_0.output = number
            with model.trace(X):
                found = model[1].source.softmax_0.output.save()
            if not torch.equal(found, wanted):
                failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not failures
