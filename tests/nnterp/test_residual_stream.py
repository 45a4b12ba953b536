"""Steering and skipping equal hand-placed hooks, and say what is wrong with what does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from nnsight_core import NoTraceError
from nnterp import StandardizedTransformer
from nnterp.errors import LayerIndexError, PositionError, ShapeError, SteeringVectorError
from tests.families import FAMILY_VARIANTS, IDS, tiny_inputs, tiny_model

ROWS = pytest.mark.parametrize(("model_type", "overrides"), [row[1:] for row in FAMILY_VARIANTS], ids=IDS)


@contextmanager
def changed(layers: list[Any], change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Plain hooks that change the outputs of ``layers``."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@ROWS
@torch.no_grad()
def test_steering_adds_what_a_hook_adds(model_type: str, overrides: dict[str, Any]) -> None:
    module = tiny_model(model_type, **overrides)
    model = StandardizedTransformer(module)
    ids, vector = tiny_inputs(), torch.randn(model.hidden_size)
    layers = [module.get_submodule(model._plan.layers[i].path) for i in (0, 1)]
    with changed(layers, lambda hidden: hidden + 1.5 * vector):
        expected = module(input_ids=ids).logits
    with model.trace(ids):
        # The order in which the layers are named makes no difference.
        model.steer([1, 0], vector, factor=1.5)
        logits = model.logits.save()
    assert torch.equal(logits, expected)
    assert not torch.equal(logits, module(input_ids=ids).logits)


@ROWS
@torch.no_grad()
def test_skipping_hands_the_input_on(model_type: str, overrides: dict[str, Any]) -> None:
    module = tiny_model(model_type, **overrides)
    model = StandardizedTransformer(module)
    ids = tiny_inputs()
    came_in: list[torch.Tensor] = []
    first = module.get_submodule(model._plan.layers[0].path)
    handle = first.register_forward_pre_hook(
        lambda m, args, kwargs: came_in.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    module(input_ids=ids)
    handle.remove()
    layers = [module.get_submodule(model._plan.layers[i].path) for i in (0, 1)]
    with changed(layers, lambda hidden: came_in[0]):
        expected = module(input_ids=ids).logits
    with model.trace(ids):
        model.skip_layers(0, 1)
        logits = model.logits.save()
    assert torch.equal(logits, expected)


@pytest.fixture(scope="module")
def model() -> StandardizedTransformer:
    return StandardizedTransformer(tiny_model("llama"))


PROMPTS = [[3, 4, 5, 6, 7], [8, 9]]


def difference(model: StandardizedTransformer, **where: Any) -> torch.Tensor:
    """Which (prompt, position) of layer 1's output is changed by steering there."""
    with model.trace(PROMPTS):
        before = model.layers_output[1].clone().save()
        model.steer(1, torch.ones(model.hidden_size), **where)
        after = model.layers_output[1].save()
    return (after - before).abs().sum(-1) > 0


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({}, [[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]]),
        ({"positions": -1}, [[0, 0, 0, 0, 1], [0, 0, 0, 0, 1]]),
        ({"positions": [0, 3]}, [[1, 0, 0, 1, 0], [1, 0, 0, 1, 0]]),
        ({"positions": torch.tensor([2])}, [[0, 0, 1, 0, 0], [0, 0, 1, 0, 0]]),
        ({"token_positions": 0}, [[1, 0, 0, 0, 0], [0, 0, 0, 1, 0]]),
        ({"token_positions": [0, -1]}, [[1, 0, 0, 0, 1], [0, 0, 0, 1, 1]]),
        ({"batch_index": 1}, [[0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]),
        ({"batch_index": -1, "token_positions": 1}, [[0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]),
        ({"batch_index": torch.tensor([True, False]), "positions": 0}, [[1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]),
        # Two lists go in pairs, as tensors are indexed by them.
        ({"batch_index": [0, 1], "positions": [1, 3]}, [[0, 1, 0, 0, 0], [0, 0, 0, 1, 0]]),
        ({"batch_index": [1, 0], "token_positions": [0, -2]}, [[0, 0, 0, 1, 0], [0, 0, 0, 1, 0]]),
        ({"batch_index": [0, 0], "token_positions": torch.tensor([1, 4])}, [[0, 1, 0, 0, 1], [0, 0, 0, 0, 0]]),
        ({"batch_index": [0, 1], "token_positions": -1}, [[0, 0, 0, 0, 1], [0, 0, 0, 0, 1]]),
        ({"batch_index": 0, "positions": [1, 2]}, [[0, 1, 1, 0, 0], [0, 0, 0, 0, 0]]),
        ({"batch_index": []}, [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]),
        ({"batch_index": [0, 1], "positions": []}, [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]]),
    ],
)
def test_steering_changes_the_chosen_positions_alone(
    model: StandardizedTransformer, where: dict[str, Any], expected: list[list[int]]
) -> None:
    assert difference(model, **where).int().tolist() == expected


def test_a_vector_for_each_prompt_and_position(model: StandardizedTransformer) -> None:
    vector = torch.randn(2, 5, model.hidden_size)
    with model.trace(PROMPTS):
        before = model.layers_output[1].clone().save()
        model.steer(1, vector, factor=-2)
        after = model.layers_output[1].save()
    assert torch.equal(after, before - 2 * vector)


@pytest.mark.parametrize(
    "vector", [torch.ones(65), torch.ones(2, 64), torch.tensor(1.0), torch.ones(3, 5, 64), 1.0], ids=str
)
def test_a_vector_that_does_not_fit_is_named_with_the_shape_that_does(
    model: StandardizedTransformer, vector: Any
) -> None:
    with model.trace(PROMPTS), pytest.raises(SteeringVectorError, match="64 entries at each position"):
        model.steer(1, vector)


def test_a_list_of_vectors_is_asked_whose_they_are(model: StandardizedTransformer) -> None:
    vectors = torch.randn(2, model.hidden_size)
    with model.trace(PROMPTS), pytest.raises(SteeringVectorError, match=r"for a prompt, give vector\[:, None\]"):
        model.steer(1, vectors)
    with model.trace(PROMPTS):
        before = model.layers_output[1].clone().save()
        model.steer(1, vectors[:, None])
        after = model.layers_output[1].save()
    assert torch.equal(after[1], before[1] + vectors[1])
    assert torch.equal(after[0], before[0] + vectors[0])


def test_steering_outside_a_trace_is_shown_inside_one(model: StandardizedTransformer) -> None:
    with pytest.raises(NoTraceError, match=r"with model.trace\(inputs\):\n        model.steer\(...\)$"):
        model.steer(1, torch.ones(model.hidden_size))


def test_places_that_are_not_there(model: StandardizedTransformer) -> None:
    vector = torch.ones(model.hidden_size)
    with model.trace(PROMPTS):
        with pytest.raises(LayerIndexError):
            model.steer([0, 3], vector)
        with pytest.raises(PositionError, match="Position 5 is not there: there are 5"):
            model.steer(0, vector, positions=5)
    with model.trace(PROMPTS), pytest.raises(PositionError, match="In prompt 1, token 2 is not there: there are 2"):
        model.steer(0, vector, token_positions=2)
    with model.trace(PROMPTS), pytest.raises(PositionError, match="Prompt 2 is not there"):
        model.steer(0, vector, batch_index=2)
    with model.trace(PROMPTS), pytest.raises(PositionError, match=r"2 prompts and 3 positions.*in pairs"):
        model.steer(0, vector, positions=[0, 1, 2], batch_index=[0, 1])
    with model.trace(PROMPTS), pytest.raises(PositionError, match="not both"):
        model.steer(0, vector, positions=0, token_positions=0)
    with model.trace(PROMPTS):
        with pytest.raises(ValueError, match="ends before it begins"):
            model.skip_layers(2, 1)
        with pytest.raises(ShapeError):
            model.skip_layer(0, skip_with=torch.zeros(64))


def test_skipping_with_a_value_of_ones_own(model: StandardizedTransformer) -> None:
    value = torch.randn(2, 5, model.hidden_size)
    with model.trace(PROMPTS):
        model.skip_layers(0, -2, skip_with=value)
        middle = model.layers_output[1].save()
    assert torch.equal(middle, value)
