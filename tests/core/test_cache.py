"""A cache keeps what plain hooks see, whatever the order, under every name that the model answers to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nnsight_core import LanguageModel, ModuleNotRunError, NNsight, NoSuchModuleError, OptionError
from nnterp import StandardizedTransformer
from tests.families import tiny_model

IDS, SHORT = [5, 6, 7, 8], [3, 4]


@pytest.fixture(scope="module")
def module() -> Any:
    return tiny_model("gpt2")


@pytest.fixture(scope="module")
def model(module: Any) -> StandardizedTransformer:
    return StandardizedTransformer(module)


def seen_by_hooks(module: Any, ids: list[int]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    handles = [
        each.register_forward_hook(lambda m, args, output, name=name: seen.setdefault(name, output))
        for name, each in module.named_modules()
    ]
    module(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return seen


def test_all_modules_at_once(module: Any, model: StandardizedTransformer) -> None:
    with model.trace(IDS) as tracer:
        cache = tracer.cache().save()
    seen = seen_by_hooks(module, IDS)
    assert set(cache.keys()) == set(seen)
    for name, value in seen.items():
        kept = cache[name].output if name else cache.values()[-1].output.logits
        value = value if name else value.logits
        first, expected = (each[0] if isinstance(each, tuple) else each for each in (kept, value))
        if isinstance(expected, torch.Tensor):
            assert torch.equal(first, expected), name
            assert not first.requires_grad


def test_a_file_gets_the_entries_and_not_the_model(model: StandardizedTransformer, tmp_path: Path) -> None:
    with torch.no_grad(), model.trace(IDS) as tracer:
        cache = tracer.cache(modules=[layer.mlp for layer in model.layers])
    with pytest.raises(OptionError, match=r"Save what it holds: torch\.save"):
        torch.save(cache, tmp_path / "cache.pt")
    torch.save({name: entry.output for name, entry in cache.items()}, tmp_path / "cache.pt")
    loaded = torch.load(tmp_path / "cache.pt", weights_only=True)
    assert list(loaded) == cache.keys() and len(loaded) == model.num_layers
    assert all(torch.equal(loaded[name], cache[name].output) for name in loaded)


def test_every_name_finds_the_same_entry(model: StandardizedTransformer) -> None:
    with model.trace(IDS) as tracer:
        cache = tracer.cache(modules=[model.layers[0], "layers.1", "transformer.h.2"], include_inputs=True)
    entry = cache["transformer.h.0"]
    for name in ("layers.0", "model.layers.0", "model.transformer.h.0", "transformer.h.0"):
        assert cache[name] is entry
        assert name in cache
    assert cache.keys() == ["transformer.h.0", "transformer.h.1", "transformer.h.2"]
    assert torch.equal(cache.transformer.h[0].output, cache.layers[1].input)
    assert len(cache) == 3 and list(cache) == cache.keys()
    with pytest.raises(NoSuchModuleError, match=r"Did you mean"):
        assert cache["transformer.h.7"]
    with pytest.raises(AttributeError, match="include_inputs=True"), model.trace(IDS) as tracer:
        cache = tracer.cache(modules=["lm_head"])
        tracer.result.save()
        assert cache["lm_head"].inputs


def test_it_keeps_what_the_model_goes_on_with_and_what_it_was(model: StandardizedTransformer) -> None:
    with model.trace(IDS) as tracer:
        cache = tracer.cache(modules=["transformer.h.0"])
        model.layers_output[0] = 0
        hidden = model.layers_output[1].save()
    assert cache["layers.0"].output.abs().sum() == 0
    assert hidden.abs().sum() > 0

    class AddsInPlace(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.linear(x)
            y += 100
            return y

    net = AddsInPlace()
    with NNsight(net).trace(torch.ones(1, 2)) as tracer:
        cache = tracer.cache(modules=["linear"])
    assert torch.equal(cache["linear"].output, net.linear(torch.ones(1, 2)))


def test_a_generation_gives_a_list_with_one_entry_for_each_step(model: StandardizedTransformer) -> None:
    for steps in (1, 3):
        with model.generate(IDS, max_new_tokens=steps, do_sample=False) as tracer:
            cache = tracer.cache(modules=[model.layers[0]])
        assert [each.shape[1] for each in cache["layers.0"].output] == [len(IDS), 1, 1][:steps]


def test_in_an_invoke_it_keeps_that_invokes_rows(module: Any) -> None:
    model = LanguageModel(module)
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            first = tracer.cache(modules=["lm_head"])
        with tracer.invoke(SHORT):
            second = tracer.cache(modules=["lm_head"])
    assert tracer.forward_passes == 1
    torch.testing.assert_close(first["lm_head"].output, module(torch.tensor([IDS])).logits)
    torch.testing.assert_close(second["lm_head"].output[:, -2:], module(torch.tensor([SHORT])).logits)


def test_a_further_pass_does_not_count_twice(module: Any) -> None:
    model = LanguageModel(module)
    with model.trace() as tracer:
        with tracer.invoke(IDS):
            late = model.transformer.h[-1].output
            cache = tracer.cache(modules=["lm_head"])
        with tracer.invoke(IDS):
            model.transformer.h[0].output = late
            model.lm_head.output.save()
    assert tracer.forward_passes == 2
    torch.testing.assert_close(cache["lm_head"].output, module(torch.tensor([IDS])).logits)


def test_options(model: StandardizedTransformer) -> None:
    with model.trace(IDS) as tracer:
        cache = tracer.cache(modules=["lm_head"], dtype=torch.float64, detach=False, device="cpu")
    assert cache["lm_head"].output.dtype == torch.float64
    assert cache["lm_head"].output.requires_grad


def test_a_module_that_cannot_be_kept_is_an_error(model: StandardizedTransformer) -> None:
    with pytest.raises(NoSuchModuleError, match="hh"), model.trace(IDS) as tracer:
        tracer.cache(modules=["transformer.hh"])
    with pytest.raises(ModuleNotRunError, match="had run before the cache was opened"), model.trace(IDS) as tracer:
        assert model.layers_output[1] is not None
        tracer.cache(modules=["transformer.h.0"])
    with model.trace(IDS) as tracer:
        cache = tracer.cache(modules=["transformer.h.0", "lm_head"])
        assert model.layers_output[0] is not None
        tracer.stop()
    assert cache.keys() == ["transformer.h.0"]
