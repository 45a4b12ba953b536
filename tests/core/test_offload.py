"""Models that accelerate has split or offloaded: the same numbers, bit for bit, and its hooks as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from nnsight_core import LanguageModel, NNsight, OutOfOrderError
from nnsight_core.devices import has_numbers, input_device
from nnterp import StandardizedTransformer
from tests.families import tiny_inputs, tiny_model

IDS = tiny_inputs()
CPU = torch.device("cpu")


def split(model: PreTrainedModel) -> dict[str, str]:
    """Every other layer, and a head of its own, on disk."""
    inner = "transformer" if hasattr(model, "transformer") else "model"
    places = {"lm_head": "cpu" if model.config.tie_word_embeddings else "disk"}
    for name, child in getattr(model, inner).named_children():
        if isinstance(child, nn.ModuleList):
            places |= {f"{inner}.{name}.{i}": "disk" if i % 2 else "cpu" for i in range(len(child))}
        else:
            places[f"{inner}.{name}"] = "cpu"
    return places


def from_disk(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder / "model")
    return AutoModelForCausalLM.from_pretrained(
        folder / "model", device_map=split(model), offload_folder=folder / "offloaded"
    )


WAYS: dict[str, Callable[[PreTrainedModel, Path], PreTrainedModel]] = {
    "cpu_offload": lambda model, _: accelerate.cpu_offload(model, execution_device=CPU),
    "cpu_offload with buffers": lambda model, _: accelerate.cpu_offload(model, CPU, offload_buffers=True),
    "disk_offload": lambda model, folder: accelerate.disk_offload(model, folder, execution_device=CPU),
    "dispatch_model": lambda model, folder: accelerate.dispatch_model(
        model, split(model), main_device="cpu", offload_dir=folder
    ),
    "from_pretrained": from_disk,
}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def plain(request: pytest.FixtureRequest) -> PreTrainedModel:
    # Tied weights as well as weights of its own.
    return tiny_model(request.param, tie_word_embeddings=request.param == "gpt2")


@pytest.fixture(params=WAYS)
def offloaded(request: pytest.FixtureRequest, plain: PreTrainedModel, tmp_path: Path) -> PreTrainedModel:
    return WAYS[request.param](copy.deepcopy(plain), tmp_path)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that accelerate has put on the modules, and where the weights are."""
    found: dict[str, Any] = {name: each.device for name, each in model.named_parameters()}
    for name, module in model.named_modules():
        for key in ("forward", "_old_forward", "_hf_hook"):
            found[f"{name}.{key}"] = id(vars(module).get(key))
    return found


def reads_and_sets(model: StandardizedTransformer) -> list[torch.Tensor]:
    with model.trace(IDS):
        embedded = model.token_embeddings.save()
        model.mlps_output[0][:, -1] = 0
        hidden = model.layers_output[1].save()
        lens = model.project_on_vocab(hidden).save()
        model.layers_output[2] += 0.1 * hidden
        logits = model.logits.save()
    return [embedded, hidden, lens, logits, model.project_on_vocab(hidden)]


def skips(model: StandardizedTransformer) -> list[torch.Tensor]:
    with model.trace(IDS):
        model.layers[1].skip(model.layers[0].output)
        return [model.logits.save()]


def invokes(model: StandardizedTransformer) -> list[torch.Tensor]:
    with model.trace() as tracer:
        with tracer.invoke(IDS[:1]):
            clean = model.layers_output[1]
        with tracer.invoke(IDS[1:]):
            model.layers_output[1] = clean
            patched = model.lm_head(model.ln_final(model.layers_output[2])).save()
        with tracer.invoke():
            both = model.logits.save()
    return [patched, both]


def generation(model: StandardizedTransformer) -> list[torch.Tensor]:
    norms = []
    with model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0) as tracer:
        for _ in tracer.iter[:]:
            norms.append(model.layers_output[1][:, -1].norm().save())
            model.layers_output[1] *= 1.01
        tokens = model.generator.output.save()
    return [*norms, tokens]


def gradients(model: StandardizedTransformer) -> list[torch.Tensor]:
    with model.trace(IDS):
        hidden = model.layers_output[1]
        with model.logits.sum().backward():
            gradient = hidden.grad.save()
    return [gradient]


PROGRAMS = [reads_and_sets, skips, invokes, generation, gradients]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_the_numbers_are_those_of_the_plain_model(
    plain: PreTrainedModel, offloaded: PreTrainedModel, program: Callable[[StandardizedTransformer], list[torch.Tensor]]
) -> None:
    before = state(offloaded)
    expected = program(StandardizedTransformer(copy.deepcopy(plain)))
    model = StandardizedTransformer(offloaded)
    for one, other in zip(program(model), expected, strict=True):
        assert one.device.type == "cpu"
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))
    assert state(offloaded) == before


def test_inputs_scans_order_errors_and_stops(plain: PreTrainedModel, offloaded: PreTrainedModel) -> None:
    before = state(offloaded)
    model = StandardizedTransformer(offloaded)
    assert input_device(offloaded) == CPU
    assert has_numbers(offloaded)
    with torch.no_grad(), model.scan(IDS):
        hidden = model.layers_output[1].save()
        lens = model.project_on_vocab(hidden).save()
    assert (hidden.device, hidden.shape, lens.shape) == (CPU, (2, 11, 64), (2, 11, 320))
    with pytest.raises(OutOfOrderError, match=r"layers_output\[0\] was asked for after"), model.trace(IDS):
        assert model.layers_output[1] is not None
        assert model.layers_output[0] is not None
    with model.trace(IDS) as tracer:
        assert model.mlps_output[1] is not None
        tracer.stop()
    with pytest.raises(ZeroDivisionError), model.trace(IDS):
        assert model.attentions_output[1] is not None
        raise ZeroDivisionError
    assert state(offloaded) == before
    with torch.no_grad():
        assert torch.equal(offloaded(IDS).logits, plain(IDS).logits)


def test_it_is_split_when_it_is_loaded(plain: PreTrainedModel, tmp_path: Path) -> None:
    plain.save_pretrained(tmp_path / "model")
    options = {"device_map": split(plain), "offload_folder": tmp_path / "offloaded"}
    model = LanguageModel(tmp_path / "model", **options)
    assert not model.dispatched
    with torch.no_grad(), model.scan(IDS):
        assert model.output.logits.shape == (2, 11, 320)
    assert not model.dispatched
    with torch.no_grad(), model.trace(IDS):
        logits = model.lm_head.output.save()
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    with torch.no_grad():
        assert torch.equal(logits.value, plain(IDS).logits)


class Doubling(accelerate.hooks.ModelHook):
    def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
        return output * 2


def test_hooks_of_accelerate_and_of_a_trace_come_and_go_in_any_order() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).requires_grad_(False)
    model, x = NNsight(net), torch.ones(1, 3)
    plain = net(x)
    own = net[1].forward
    with model.trace(x):
        # Asking for an input puts up the gate at which the module may be skipped.
        assert model[1].input is not None
        add_hook_to_module(net[1], Doubling())
    assert torch.equal(net(x), plain * 2)
    assert net[1]._old_forward == own
    with model.trace(x):
        model[1].skip(model[1].input)
        skipped = model.output.save()
        remove_hook_from_module(net[1])
    assert torch.equal(skipped.value, net[0](x))
    assert torch.equal(net(x), plain)
    assert net[1].forward == own
    with model.trace(x):
        assert model[1].input is not None
    assert torch.equal(net(x), plain)
    assert net[1].forward == own
