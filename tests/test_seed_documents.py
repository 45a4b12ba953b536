"""The examples of the documents that this project takes for its specification, run as they stand.

Each test names its document and block. ``gpt2`` is the GPT-2 that comes along; prompts and numbers of layers fit it.
"""

from __future__ import annotations

from typing import Any

import pytest

from nnsight_core import OutOfOrderError
from nnterp import StandardizedTransformer

BEST_PRACTICES: dict[str, str] = {
    "execution order": """
# CORRECT: Access layers in forward order
with model.trace("My tailor is rich"):
    l1 = model.layers_output[1]  # Access layer 1 first
    l2 = model.layers_output[2]  # Then layer 2
    logits = model.logits        # Finally the output

# INCORRECT: This will fail!
try:
    with model.trace("My tailor is rich"):
        l2 = model.layers_output[2]  # Access layer 2 first
        l1 = model.layers_output[1]  # Then layer 1 - ERROR!
except Exception as e:
    error = e
""",
    "all model components": """
with model.trace("Hello"):
    # CORRECT: Forward pass order
    attn_0 = model.attentions_output[0]    # Layer 0 attention
    mlp_0 = model.mlps_output[0]           # Layer 0 MLP
    layer_0 = model.layers_output[0]       # Layer 0 output
    attn_1 = model.attentions_output[1]    # Layer 1 attention
    # ... and so on
    shapes = {tuple(value.shape) for value in (attn_0, mlp_0, layer_0, attn_1)}
""",
    "basic gradient computation": """
import torch

with model.trace("My tailor is rich"):
    # Save the activation you want gradients for
    l1_out = model.layers_output[1]

    # Access model output (must be after l1_out)
    logits = model.output.logits

    # Compute gradients inside backward context
    with logits.sum().backward():
        l1_grad = l1_out.grad.save()
""",
    "multiple backward passes": """
import torch

with model.trace("My tailor is rich"):
    l1_out = model.layers_output[1]
    logits = model.output.logits

    # First backward pass
    with logits.sum().backward(retain_graph=True):
        l1_grad_1 = l1_out.grad.save()

    # Second backward pass with different objective
    with (logits.sum() ** 2).backward():
        l1_grad_2 = l1_out.grad.save()

# Gradients will be different
assert not torch.allclose(l1_grad_1, l1_grad_2)
""",
    "the execution order of gradients": """
# INCORRECT: Accessing layers_output[1] after logits
error = None
try:
    with model.trace("My tailor is rich"):
        logits = model.logits
        with logits.sum().backward():
            # This would fail - can't access layers_output[1] after output
            l1_grad = model.layers_output[1].grad.save()
except Exception as e:
    error = e

# CORRECT: Save activation first
with model.trace("My tailor is rich"):
    l1_out = model.layers_output[1]  # Save first
    logits = model.logits
    with logits.sum().backward():
        l1_grad = l1_out.grad.save()  # Use saved activation
""",
    "caching": """
# Cache activations from multiple layers
with model.trace("Hello world") as tracer:
    # Cache every other layer
    cache = tracer.cache(
        modules=[model.layers[i] for i in range(0, model.num_layers, 2)]
    ).save()

    # Don't call tracer.stop() before cache is accessed!

# Access cached activations
print(cache.keys())  # Shows module names
print(cache["model.layers.0"].output.shape)  # Layer 0 output
print(cache["model.layers.2"].output.shape)  # Layer 2 output
""",
    "stop": """
import time

# Without tracer.stop() - computes all layers
start = time.time()
for _ in range(10):
    with model.trace("Hello world"):
        layer_5_out = model.layers_output[5].save()
time_without_stop = time.time() - start
whole = layer_5_out

# With tracer.stop() - only computes up to layer 5
start = time.time()
for _ in range(10):
    with model.trace("Hello world") as tracer:
        layer_5_out = model.layers_output[5].save()
        tracer.stop()  # Stop here - don't compute remaining layers
time_with_stop = time.time() - start
""",
}


def run(block: str, model: StandardizedTransformer) -> dict[str, Any]:
    names: dict[str, Any] = {"model": model}
    exec(compile(block, "seed document", "exec"), names)
    return names


@pytest.mark.parametrize("name", ["demo-gpt2", "demo-llama"])
def test_best_practices_execution_order(name: str, request: pytest.FixtureRequest) -> None:
    names = run(BEST_PRACTICES["execution order"], request.getfixturevalue(name.replace("-", "_")))
    assert isinstance(names["error"], OutOfOrderError)
    assert "layers_output[1]" in str(names["error"]) and "layers_output[2]" in str(names["error"])


@pytest.mark.parametrize("name", ["demo-gpt2", "demo-llama"])
def test_best_practices_all_model_components(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name.replace("-", "_"))
    (shape,) = run(BEST_PRACTICES["all model components"], model)["shapes"]
    assert shape[-1] == model.hidden_size


@pytest.mark.parametrize("name", ["demo-gpt2", "demo-llama"])
def test_best_practices_stop(name: str, request: pytest.FixtureRequest) -> None:
    names = run(BEST_PRACTICES["stop"], request.getfixturevalue(name.replace("-", "_")))
    assert (names["layer_5_out"] == names["whole"]).all()


@pytest.mark.parametrize("name", ["demo-gpt2", "demo-llama"])
def test_best_practices_gradients(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name.replace("-", "_"))
    basic = run(BEST_PRACTICES["basic gradient computation"], model)
    assert basic["l1_grad"].shape[-1] == model.hidden_size and basic["l1_grad"].abs().sum() > 0
    run(BEST_PRACTICES["multiple backward passes"], model)
    order = run(BEST_PRACTICES["the execution order of gradients"], model)
    assert isinstance(order["error"], OutOfOrderError)
    assert (order["l1_grad"] == basic["l1_grad"]).all()
    model._module.zero_grad()


@pytest.mark.parametrize("name", ["demo-gpt2", "demo-llama"])
def test_best_practices_caching(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name.replace("-", "_"))
    cache = run(BEST_PRACTICES["caching"], model)["cache"]
    assert len(cache) == (model.num_layers + 1) // 2


def test_stop_leaves_the_later_layers_uncomputed(demo_gpt2: StandardizedTransformer) -> None:
    ran = []
    handles = [layer._module.register_forward_hook(lambda m, a, o: ran.append(m)) for layer in demo_gpt2.layers]
    try:
        with demo_gpt2.trace("Hello world") as tracer:
            hidden = demo_gpt2.layers_output[2].save()
            tracer.stop()
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [layer._module for layer in demo_gpt2.layers][:3]
    assert hidden.shape[-1] == demo_gpt2.hidden_size
