"""A model from a folder: its modules at once, its weights when they are needed, and never twice."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GPT2LMHeadModel, GPT2Model

from nnsight_core import InputError, LanguageModel, MissingWeightsError, ModelNotFoundError, NoSuchModuleError, loading
from tests.families import tiny_inputs, tiny_model

IDS = tiny_inputs()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("gpt2").save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(IDS).logits


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each time that weights are loaded."""
    found: list[str] = []
    load = loading.Checkpoint.load

    def counting(self: loading.Checkpoint) -> Any:
        found.append(str(self.name))
        return load(self)

    monkeypatch.setattr(loading.Checkpoint, "load", counting)
    return found


def traced(model: LanguageModel) -> torch.Tensor:
    with torch.no_grad(), model.trace(IDS):
        return model.lm_head.output.save().value


def generated(model: LanguageModel) -> torch.Tensor:
    with model.generate(IDS, max_new_tokens=1, pad_token_id=0):
        return model.generator.output.save().value


def test_what_is_there_without_weights(folder: Path, loads: list[str]) -> None:
    model = LanguageModel(folder, aliases={"": {"blocks": "transformer.h"}})
    assert "(lm_head): Linear(in_features=64, out_features=320, bias=False)" in repr(model)
    assert model.transformer.h[-1].attn.path == "transformer.h.2.attn"
    assert model.blocks[0].attn.num_heads == model.config.n_head == 4
    assert (len(model.transformer.h), model._module.training) == (3, False)
    with pytest.raises(NoSuchModuleError, match="Did you mean 'transformer'"):
        assert model.transfromer
    with torch.no_grad(), model.scan(IDS):
        hidden = model.transformer.h[1].output.save()
        lens = model.lm_head(model.transformer.ln_f(hidden)).save()
        by_hand = (hidden @ model.lm_head.weight.T).save()
        assert isinstance(model.get_input_embeddings(), nn.Embedding)
    assert (hidden.shape, hidden.dtype, hidden.device) == ((2, 11, 64), torch.float32, torch.device("cpu"))
    assert lens.shape == by_hand.shape == (2, 11, 320)
    assert all(each.is_meta for each in model._module.parameters())
    assert (model.dispatched, loads) == (False, [])


NEEDS: dict[str, Callable[[LanguageModel], Any]] = {
    "trace": traced,
    "trace=False": lambda model: model.trace(IDS, trace=False),
    "generate": generated,
    "call": lambda model: model(IDS),
    "a module's call": lambda model: model.lm_head(torch.ones(1, 64)),
    "weight": lambda model: model.lm_head.weight,
    "parameters": lambda model: next(model.parameters()),
    "state_dict": lambda model: model.transformer.state_dict(),
    "device": lambda model: model.device,
    "generation_config": lambda model: model.generation_config,
    "set": lambda model: setattr(model.lm_head, "weight", nn.Parameter(torch.ones(320, 64))),
    "dispatch": lambda model: model.dispatch(),
}


@pytest.mark.parametrize("need", NEEDS.values(), ids=NEEDS)
def test_what_needs_weights_loads_them(folder: Path, loads: list[str], need: Callable[[LanguageModel], Any]) -> None:
    model = LanguageModel(folder)
    assert not model.dispatched
    need(model)
    assert (model.dispatched, len(loads)) == (True, 1)
    assert not any(each.is_meta for each in model._module.parameters())
    need(model)
    model.dispatch()
    assert len(loads) == 1


def test_the_loaded_model_is_that_of_transformers(folder: Path, logits: torch.Tensor) -> None:
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for model in (LanguageModel(folder), LanguageModel(str(folder), dispatch=True)):
        assert torch.equal(traced(model), logits)
        assert model._module.training is False
        assert [(n, p.dtype, p.requires_grad) for n, p in model._module.named_parameters()] == [
            (n, p.dtype, p.requires_grad) for n, p in plain.named_parameters()
        ]
        assert model._module.config.to_dict() == plain.config.to_dict()
        assert model._module.lm_head.weight is model._module.transformer.wte.weight


def test_envoys_that_were_taken_before_speak_of_the_loaded_modules(folder: Path, logits: torch.Tensor) -> None:
    model = LanguageModel(folder, aliases={"": {"blocks": "transformer.h"}})
    first, head, blocks = model.transformer.h[0], model.lm_head, model.blocks
    layers = list(model.transformer.h)
    with torch.no_grad(), model.trace(IDS):
        hidden = first.output.save()
        last = blocks[2].output.save()
        found = head.output.save()
    assert torch.equal(found.value, logits)
    assert first._module is model._module.transformer.h[0]
    assert [each._module for each in layers] == list(model._module.transformer.h)
    assert (hidden.shape, last.shape) == ((2, 11, 64), (2, 11, 64))
    assert first is model.transformer.h[0]


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs) * 2


def test_modules_that_were_put_in_before_are_kept(folder: Path) -> None:
    model = LanguageModel(folder)
    lora = nn.Linear(64, 64)
    model.transformer.h[1].lora = lora
    model.transformer.h[0].mlp = Around(model.transformer.h[0].mlp._module)
    model.config.use_cache = False
    config = model.config
    with torch.no_grad(), model.trace(IDS):
        inner = model.transformer.h[0].mlp.inner.output.save()
        outer = model.transformer.h[0].mlp.output.save()
    assert model._module.transformer.h[1].lora is lora
    assert torch.equal(outer.value, inner.value * 2)
    assert not any(each.is_meta for each in model._module.parameters())
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model._module.transformer.h[0].mlp.inner.c_fc.weight, plain.transformer.h[0].mlp.c_fc.weight)
    assert model._module.config.use_cache is False
    config.use_cache = True
    assert model._module.transformer.config.use_cache is True


@pytest.fixture(params=range(6))
def restless_threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Threads take turns after a millionth of a second, so that they meet each other anywhere."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("restless_threads")
def test_threads_that_need_it_at_once_load_it_once(folder: Path, loads: list[str], logits: torch.Tensor) -> None:
    model = LanguageModel(folder)
    first = model.transformer.h[0]
    start = threading.Barrier(6)

    def work(number: int) -> Any:
        start.wait()
        if number % 3 == 2:
            with torch.no_grad(), model.scan(IDS):
                return first.output.shape, model.lm_head.output.shape
        return traced(model)

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(work, range(6)))
    assert len(loads) == 1
    assert all(torch.equal(results[number], logits) for number in (0, 1, 3, 4))
    assert results[2] == results[5] == ((2, 11, 64), (2, 11, 320))


def test_loading_inside_an_open_scan(folder: Path, logits: torch.Tensor) -> None:
    model = LanguageModel(folder)
    first = model.transformer.h[0]
    with torch.no_grad(), model.scan(IDS):
        assert first.output.shape == (2, 11, 64)
        assert torch.equal(traced(model), logits)
        model.transformer.h[1].output[:] = 0
        assert model.lm_head(model.transformer.ln_f.output).shape == (2, 11, 320)


def test_it_is_loaded_as_it_would_have_been_at_once(folder: Path) -> None:
    model = LanguageModel(folder)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with torch.inference_mode(), torch.device("meta"), model.trace(IDS.clone()):
        model.lm_head.output.save()
    assert torch.equal(torch.rand(3), expected)
    assert {each.device.type for each in model._module.parameters()} == {"cpu"}
    assert not any(each.is_inference() for each in model._module.parameters())
    with model.trace(IDS):
        model.lm_head.output.sum().backward()
    assert model._module.lm_head.weight.grad is not None


def broken(folder: Path, place: Path, spoil: Callable[[Path], Any]) -> Path:
    shutil.copytree(folder, place)
    spoil(place)
    return place


def without(name: str) -> Callable[[Path], None]:
    def spoil(place: Path) -> None:
        weights = load_file(place / "model.safetensors")
        del weights[name]
        save_file(weights, place / "model.safetensors", {"format": "pt"})

    return spoil


SPOILED: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no weights": (lambda p: (p / "model.safetensors").unlink(), ModelNotFoundError, "no file named model.safetensors"),
    "half a file": (lambda p: (p / "model.safetensors").write_bytes(b"\0" * 9), ModelNotFoundError, "spoiled"),
    "of another size": (
        lambda p: save_file({"transformer.ln_f.bias": torch.ones(3)}, p / "model.safetensors", {"format": "pt"}),
        ModelNotFoundError,
        "mismatched_sizes",
    ),
    "a weight less": (without("transformer.h.1.mlp.c_fc.weight"), MissingWeightsError, r"lacks 1 .*\.h\.1\.mlp\.c_fc"),
}


@pytest.mark.parametrize(("spoil", "kind", "message"), SPOILED.values(), ids=SPOILED)
def test_weights_that_are_not_there_are_an_error_when_they_are_loaded(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], Any], kind: type[Exception], message: str
) -> None:
    place = broken(folder, tmp_path / "spoiled", spoil)
    model = LanguageModel(place)
    for _ in range(2):
        with pytest.raises(kind, match=message) as caught, model.trace(IDS):
            pytest.fail("the block was entered")
        assert str(place) in str(caught.value)
    with pytest.raises(kind):
        LanguageModel(place, dispatch=True)
    shutil.copy(folder / "model.safetensors", place)
    assert traced(model).shape == (2, 11, 320)


def test_what_is_no_model_is_an_error_at_once(folder: Path, tmp_path: Path) -> None:
    def rename(place: Path) -> None:
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps({**config, "model_type": "gtp2"}))

    with pytest.raises(ModelNotFoundError, match="gtp2"):
        LanguageModel(broken(folder, tmp_path / "misnamed", rename))
    with pytest.raises(ModelNotFoundError):
        LanguageModel(broken(folder, tmp_path / "no-json", lambda place: (place / "config.json").write_text("{")))
    with pytest.raises(ModelNotFoundError, match="no-such-model"):
        LanguageModel("no-such-model")


@pytest.mark.parametrize(
    ("name", "why"),
    {
        "./nowhere": "there is no such folder.",
        "/no/such/place": "there is no such folder.",
        "../a/b/c": "there is no such folder.",
        "~/models/mine": "Path(...).expanduser()",
        "": "it is empty",
    }.items(),
)
def test_a_path_is_not_taken_for_a_name_on_the_hub(name: str, why: str) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        LanguageModel(name)
    assert why in str(caught.value) and "Repo id" not in str(caught.value)


def test_a_file_is_no_folder(folder: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="this is a file, and a model is a folder"):
        LanguageModel(folder / "config.json")


def test_a_model_in_a_folder_below_and_one_whose_config_is_given(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "above" / "model")
    expected = traced(LanguageModel(folder))
    assert torch.equal(traced(LanguageModel(tmp_path / "above", subfolder="model")), expected)
    bare = broken(folder, tmp_path / "bare", lambda place: (place / "config.json").unlink())
    assert torch.equal(traced(LanguageModel(bare, config=LanguageModel(folder).config)), expected)


def test_options_reach_transformers(folder: Path) -> None:
    for name in ("dtype", "torch_dtype"):
        model = LanguageModel(folder, **{name: torch.bfloat16}, attn_implementation="eager", resid_pdrop=0.25)
        with torch.no_grad(), model.scan(IDS):
            assert model.lm_head.output.dtype == torch.bfloat16
        assert traced(model).dtype == torch.bfloat16
        assert (model.config._attn_implementation, model.config.resid_pdrop) == ("eager", 0.25)
    model = LanguageModel(folder, device_map="cpu")
    assert not model.dispatched
    assert traced(model).device.type == "cpu"
    with pytest.raises(TypeError, match="dispach"):
        LanguageModel(folder, dispach=True, dispatch=True)


@pytest.mark.parametrize("automodel", [AutoModel, "AutoModel", GPT2Model], ids=["class", "name", "model class"])
def test_another_class_loads_it(folder: Path, automodel: Any) -> None:
    model = LanguageModel(folder, automodel=automodel)
    assert not model.dispatched
    with torch.no_grad(), model.trace(IDS):
        hidden = model.h[2].output.save()
    assert (type(model._module), hidden.shape) == (GPT2Model, (2, 11, 64))


def test_what_is_no_class_to_load_with(folder: Path) -> None:
    with pytest.raises(InputError, match="Did you mean 'AutoModelForCausalLM'"):
        LanguageModel(folder, automodel="AutoModelForCasualLM")
    with pytest.raises(InputError, match="loads no models"):
        LanguageModel(folder, automodel=nn.Linear)
    with pytest.raises(TypeError, match="automodel, dtype"):
        LanguageModel(tiny_model("gpt2"), automodel="AutoModel", dtype=torch.float32)


def test_a_model_object_is_loaded_already() -> None:
    module = tiny_model("gpt2").train()
    model = LanguageModel(module, dispatch=True)
    assert model.dispatched
    model.dispatch()
    assert model._module is module
    assert module.training
    assert isinstance(module, GPT2LMHeadModel)


def test_a_model_that_cannot_be_built_without_its_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch, logits: torch.Tensor
) -> None:
    def needs_numbers(config: Any, **options: Any) -> Any:
        return torch.empty(3, device="meta").tolist()

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", needs_numbers)
    model = LanguageModel(folder)
    assert model.dispatched
    assert torch.equal(traced(model), logits)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_without_weights_has_them(
    make: Callable[[LanguageModel], LanguageModel], folder: Path, logits: torch.Tensor
) -> None:
    model = LanguageModel(folder)
    other = make(model)
    assert model.dispatched and other.dispatched
    assert torch.equal(traced(other), logits)
    with model.edit() as edited:
        edited.lm_head.output[:] = 0
    assert torch.equal(traced(other), logits) and not traced(edited).any()
