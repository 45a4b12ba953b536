"""Modules called by a script, apart from the forward pass: nobody else takes their values for the model's."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from nnsight_core import NNsight, apply
from tests.core.conftest import Chain


@pytest.fixture
def chain() -> NNsight:
    return NNsight(Chain())


X, Y = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[-1.0, 0.5, 2.0]])


def test_an_invoke_that_waits_for_a_module_does_not_get_what_another_calls_it_for(chain: NNsight) -> None:
    module: Any = chain._module
    with chain.trace() as tracer:
        with tracer.invoke(X):
            lens = chain.head(chain.one.output).save()
        with tracer.invoke(Y):
            logits = chain.head.output.save()
    assert torch.equal(lens, module.head(module.one(torch.cat([X, Y])))[:1])
    torch.testing.assert_close(logits.value, module(Y))


def test_a_cache_does_not_keep_a_call_out_of_place(chain: NNsight) -> None:
    module: Any = chain._module
    with chain.trace() as tracer:
        with tracer.invoke(X):
            chain.head(chain.one.output).save()
        with tracer.invoke():
            cache = tracer.cache(modules=["head"], include_inputs=True)
    torch.testing.assert_close(cache.head.output, module(X))
    torch.testing.assert_close(cache.head.input, module.two(module.one(X)))


def test_a_skip_does_not_skip_a_call_out_of_place(chain: NNsight) -> None:
    module: Any = chain._module
    with chain.trace() as tracer:
        with tracer.invoke(X):
            lens = chain.head(chain.one.output).save()
        with tracer.invoke():
            hidden = chain.one.output
            chain.head.skip(hidden.sum() * torch.ones(1, 4))
            logits = chain.head.output.save()
    torch.testing.assert_close(lens.value, module.head(module.one(X)))
    torch.testing.assert_close(logits.value, module.one(X).sum() * torch.ones(1, 4))


def test_the_model_itself_called_out_of_place_is_no_step_of_a_generation(chain: NNsight) -> None:
    module: Any = chain._module
    with chain.trace() as tracer:
        with tracer.invoke(X):
            again = chain(chain.one.output).save()
        with tracer.invoke(Y):
            logits = chain.output.save()
    torch.testing.assert_close(again.value, module(module.one(X)))
    torch.testing.assert_close(logits.value, module(Y))


def test_functions_get_plain_values_in_an_invoke_too(chain: NNsight) -> None:
    seen: list[type] = []

    def look(value: torch.Tensor) -> torch.Tensor:
        seen.append(type(value))
        return value + 1

    with chain.trace() as tracer, tracer.invoke(X):
        more = apply(look, chain.one.output).save()
    assert seen == [torch.Tensor]
    torch.testing.assert_close(more.value, chain._module.one(X) + 1)


def test_a_value_saved_from_an_invoke_goes_with_its_variable(chain: NNsight) -> None:
    gc.collect()
    gc.disable()
    try:
        with chain.trace() as tracer:
            with tracer.invoke(X):
                first = chain.one.output.save()
            with tracer.invoke(Y):
                chain.two.output[:] += first
        tensor = weakref.ref(first.value)
        del first
        assert tensor() is None
    finally:
        gc.enable()


def test_a_value_saved_from_an_invoke_is_used_in_a_later_one(chain: NNsight) -> None:
    with chain.trace() as tracer, tracer.invoke(X):
        before = chain.one.output.save()
    with chain.trace() as tracer, tracer.invoke(Y):
        both = (chain.one.output + before).save()
    torch.testing.assert_close(both.value, chain._module.one(Y) + chain._module.one(X))
