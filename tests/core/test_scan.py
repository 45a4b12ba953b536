"""A scan: the shapes of a trace, without its numbers, its weights or its time."""

from __future__ import annotations

import copy
import io
import pickle
import resource
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from nnsight_core import CopyError, LanguageModel, NNsight, NoTraceError, OutOfOrderError, ScanError
from nnsight_core.values import map_tensors
from nnterp.demo_models import demo_model_path
from tests.families import tiny_inputs, tiny_model

X = torch.linspace(-1, 1, 6).reshape(2, 3)
HERE = Path(__file__).name


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5))


def described(value: Any) -> list[Any]:
    found: list[Any] = []
    map_tensors(lambda tensor: found.append((tuple(tensor.shape), tensor.dtype, tensor.device)), value)
    return found


def test_the_example_that_a_user_would_write() -> None:
    model = NNsight(layers())
    with model.scan(X):
        shape = model[0].output.shape
        kept = model[1].output.save()
    assert shape == (2, 4)
    assert kept.shape == (2, 4)
    assert "size=(2, 4)" in repr(kept)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt", "gpt_neox"])
def test_every_module_has_the_shapes_dtypes_and_devices_of_a_trace(family: str) -> None:
    model = LanguageModel(tiny_model(family).to(torch.bfloat16))
    ids = tiny_inputs()
    with torch.no_grad():
        with model.trace(ids) as tracer:
            traced = tracer.cache(include_inputs=True)
        with model.scan(ids) as tracer:
            scanned = tracer.cache(include_inputs=True)
    assert list(scanned.keys()) == list(traced.keys())
    for name in traced:
        assert described(scanned[name].calls["output"]) == described(traced[name].calls["output"]), name
        assert described(scanned[name].input) == described(traced[name].input), name


def test_experts_whose_tokens_are_not_known() -> None:
    kwargs = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    model = LanguageModel(
        AutoModelForCausalLM.from_config(MixtralConfig(vocab_size=320, **sizes, **kwargs), dtype=torch.float32)
    )
    with model.scan(tiny_inputs()):
        experts = model.model.layers[1].mlp.experts.output.shape
        logits = model.output.logits
        assert (tuple(experts), tuple(logits.shape)) == ((22, 64), (2, 11, 320))
        assert logits.dtype == torch.float32


def test_seventy_billion_parameters_on_meta() -> None:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    config = LlamaConfig(**sizes, num_key_value_heads=8, vocab_size=128256, dtype=torch.bfloat16)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with torch.device("meta"):
        model = LanguageModel(AutoModelForCausalLM.from_config(config))
    assert sum(each.numel() for each in model._module.parameters()) > 70e9
    with torch.no_grad(), model.scan(torch.ones(1, 12, dtype=torch.long)):
        hidden = model.model.layers[40].output.save()
        model.model.layers[60].mlp.output = 0
        lens = model.lm_head(model.model.norm(hidden)).save()
        logits = model.output.logits.save()
    assert (hidden.shape, hidden.dtype, hidden.device.type) == ((1, 12, 8192), torch.bfloat16, "cpu")
    assert lens.shape == logits.shape == (1, 12, 128256)
    # In kilobytes: the weights would be 140 millions of them.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000
    assert time.monotonic() - start < 60
    assert all(each.is_meta for each in model._module.parameters())


class Counting(nn.Module):
    """Changes everything that a forward can change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout()
        self.calls = 0
        self.seen: list[torch.Tensor] = []
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen.append(x)
        self.total += x.sum(0)
        return self.drop(self.norm(x)) + torch.rand(3)


def test_nothing_of_the_model_is_touched() -> None:
    net = nn.Sequential(Counting(), nn.Linear(3, 3)).train()
    model = NNsight(net)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    random = torch.get_rng_state()
    x = X.clone().requires_grad_()
    with model.scan(x):
        assert model[0].norm.output.requires_grad
        model[0].norm(model[0].output)
        model.output.sum().backward()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert (net[0].calls, net[0].seen, x.grad) == (0, [], None)
    assert all(each.grad is None for each in net.parameters())


def test_gradients_have_shapes_too() -> None:
    model = NNsight(layers())
    with model.scan(X):
        hidden = model[0].output
        with model.output.sum().backward():
            gradient = hidden.grad.save()
    assert gradient.shape == (2, 4)
    with torch.no_grad(), model.scan(X):
        assert not model[0].output.requires_grad


def test_invokes_share_a_batch() -> None:
    model = NNsight(layers())
    with model.scan() as tracer:
        with tracer.invoke(X):
            mine = model[0].output.save()
        with tracer.invoke(torch.ones(5, 3)):
            model[1].output[:2] = mine
            yours = model.output.save()
        with tracer.invoke():
            both = model.output.save()
    assert (mine.shape, yours.shape, both.shape, tracer.forward_passes) == ((2, 4), (5, 5), (7, 5), 1)


def test_modules_and_weights_in_the_body_are_those_of_the_scan() -> None:
    with torch.device("meta"):
        net = layers()
    model = NNsight(net)
    with model.scan(X):
        hidden = model[0].output
        called = model[2](hidden).save()
        by_hand = (hidden @ model[2].weight.T + model[2].bias).save()
        probed = nn.Linear(4, 7)(hidden).save()
        assert model[2].in_features == 4
    assert (called.shape, by_hand.shape, probed.shape) == ((2, 5), (2, 5), (2, 7))
    assert {each.device.type for each in (called, by_hand, probed)} == {"cpu"}


def test_order_and_stops_are_those_of_a_trace() -> None:
    model = NNsight(layers())
    with pytest.raises(OutOfOrderError, match=r"0\.output was asked for after"), model.scan(X):
        assert model[1].output is not None
        assert model[0].output is not None
    ran = []
    handle = model[2]._module.register_forward_hook(lambda *_: ran.append(1))
    with model.scan(X) as tracer:
        kept = model[0].output.save()
        tracer.stop()
    handle.remove()
    assert (kept.shape, ran) == ((2, 4), [])
    with pytest.raises(ZeroDivisionError), model.scan(X):
        assert model[0].output is not None
        raise ZeroDivisionError
    with pytest.raises(NoTraceError):
        assert model[0].output is not None


def test_states_of_torch_hold_in_the_model() -> None:
    model = NNsight(layers())
    with torch.autocast("cpu", torch.bfloat16), model.scan(X):
        assert model[0].output.dtype == torch.bfloat16
    with torch.device("meta"), model.scan(X):
        assert model[0].output.device.type == "cpu"
        assert torch.ones(1).is_meta
    with torch.inference_mode(), model.scan(X):
        assert not model[0].output.requires_grad


LOOKS: dict[str, Callable[[Any], Any]] = {
    "item": lambda x: x.sum().item(),
    "if": lambda x: bool((x > 0).any()),
    "float": lambda x: float(x.sum()),
    "int": lambda x: int(x.argmax()),
    "index": lambda x: [1, 2][x.argmax()],
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "asarray": lambda x: numpy.asarray(x),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "unique": lambda x: x.unique(),
    "pickle": lambda x: pickle.dumps(x),
    "torch.save": lambda x: torch.save(x, io.BytesIO()),
    "into a tensor": lambda x: torch.zeros(2, 5).copy_(x),
    "into a slice": lambda x: torch.zeros(3, 2, 5).__setitem__(0, x),
    "added to a tensor": lambda x: torch.zeros(2, 5).add_(x),
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_looking_at_numbers_is_an_error_inside_and_after(look: Callable[[Any], Any]) -> None:
    model = NNsight(layers())
    with torch.no_grad(), pytest.raises(ScanError, match="but a scan has shapes, not numbers") as caught, model.scan(X):
        look(model.output)
    assert f"{HERE}:" in str(caught.value)
    with torch.no_grad(), model.scan(X):
        kept = model.output.save()
    with torch.no_grad(), pytest.raises(ScanError, match="but a scan has shapes, not numbers"):
        look(kept)


def test_what_may_be_done_with_a_value_without_numbers() -> None:
    model = NNsight(layers())
    with torch.no_grad(), model.scan(X):
        kept = model.output.save()
    assert copy.deepcopy(kept).shape == kept.clone().shape == (kept * 2).shape == (2, 5)
    assert copy.deepcopy(kept).fake_mode is kept.fake_mode
    assert len(kept) == 2
    assert "size=(2, 5)" in str(kept)


class Chooses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.second(x) if x.sum() > 0 else x


def test_a_model_whose_way_depends_on_numbers_names_the_operation_and_its_line() -> None:
    model = NNsight(Chooses())
    with pytest.raises(ScanError) as caught, model.scan(X):
        assert model.first.output.shape == (2, 3)
        assert model.second.output is not None
    message = str(caught.value)
    assert "_local_scalar_dense" in message
    assert "return self.second(x) if x.sum() > 0 else x" in message
    assert "What this model does depends on its numbers. Open a trace instead" in message


class Locked(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)
        self.lock = threading.Lock()


def test_a_model_that_cannot_be_copied() -> None:
    model = NNsight(nn.Sequential(Locked()))
    with pytest.raises(CopyError, match=r"Sequential cannot be copied.*\n.*\nOpen a trace instead"), model.scan(X):
        pytest.fail("the block was entered")
    with model.trace(X):
        assert model[0].output.shape == (2, 3)


def test_scans_and_traces_inside_each_other() -> None:
    net = layers()
    model = NNsight(net)
    with torch.no_grad(), model.scan(X):
        outer = model[0].output
        with model.trace(X):
            real = model[0].output.save()
        with model.scan(torch.ones(7, 3)):
            inner = model[0].output
            model[2].input = inner[:2] + outer
            result = model.output.save()
        later = model[2].output.save()
    assert torch.equal(real.value, net[0](X))
    assert (result.shape, later.shape) == ((2, 5), (2, 5))


def test_threads_that_trace_the_model_while_it_is_scanned_never_notice() -> None:
    net = layers().requires_grad_(False)
    model = NNsight(net)
    plain = net(X)

    def trace(_: int) -> torch.Tensor:
        with model.trace(X):
            return model.output.save()

    def scan(_: int) -> torch.Size:
        with model.scan(X):
            model[0].output = 0
            return model.output.shape

    with ThreadPoolExecutor(4) as pool:
        traced, scanned = pool.map(trace, range(40)), pool.map(scan, range(40))
        assert all(torch.equal(each.value, plain) for each in traced)
        assert set(scanned) == {(2, 5)}


def test_hooks_of_the_models_own_library_belong_to_what_it_computes() -> None:
    model = LanguageModel(tiny_model("llama"))
    for _ in range(2):
        with torch.no_grad(), model.trace(tiny_inputs(), output_hidden_states=True):
            traced = model.output.save()
        with torch.no_grad(), model.scan(tiny_inputs(), output_hidden_states=True):
            scanned = model.output.save()
        assert described(tuple(scanned.hidden_states)) == described(tuple(traced.hidden_states))


def test_hooks_of_the_users_are_not_run() -> None:
    net, seen = layers(), []
    net[0].register_forward_hook(lambda *_: seen.append(1))
    with NNsight(net).scan(X):
        pass
    assert seen == []


@pytest.mark.parametrize("allow_dispatch", [True, False])
def test_operations_inside_a_module(allow_dispatch: bool) -> None:
    model = LanguageModel(demo_model_path("demo-gpt2"), dispatch=allow_dispatch)
    inner = "scaled_dot_product_attention_0"
    with torch.no_grad(), model.scan(torch.tensor([[1, 2, 3]])):
        attention = model.transformer.h[0].attn
        projected = attention.c_attn.output.shape
        # Asked for when the module is half-way through its call.
        first = attention.source[inner].output.shape
        listed = [operation.name for operation in model.transformer.h[1].attn.source]
        second = model.transformer.h[1].attn.source[inner].output.shape
    assert model.dispatched == allow_dispatch
    assert listed == [operation.name for operation in model.transformer.h[1].attn.source]
    with torch.no_grad(), model.trace(torch.tensor([[1, 2, 3]])):
        assert model.transformer.h[0].attn.c_attn.output.shape == projected
        assert model.transformer.h[0].attn.source[inner].output.shape == first == second
