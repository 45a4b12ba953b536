"""The standard names of a model whose weights come later."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nnsight_core.errors import RemoteError
from nnterp import StandardizedTransformer
from nnterp.errors import ValidationError
from tests.families import tiny_inputs, tiny_model

IDS = tiny_inputs()
SPECS = Path(__file__).parents[2] / "architectures"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("llama").save_pretrained(place)
    return place


def test_it_is_loaded_and_checked_at_once_unless_told_otherwise(folder: Path) -> None:
    assert StandardizedTransformer(folder).dispatched
    assert StandardizedTransformer("demo-gpt2").dispatched
    assert not StandardizedTransformer(folder, allow_dispatch=False).dispatched
    assert not StandardizedTransformer(folder, dispatch=False).dispatched
    assert StandardizedTransformer(folder, allow_dispatch=False, dispatch=True).dispatched


def test_every_accessor_in_a_scan_without_weights(folder: Path) -> None:
    model = StandardizedTransformer(folder, allow_dispatch=False)
    layer, stream = model.layers[1], (2, 11, model.hidden_size)
    with torch.no_grad(), model.scan(IDS):
        assert model.input_ids.shape == model.attention_mask.shape == (2, 11)
        assert model.token_embeddings.shape == stream
        for index in range(model.num_layers):
            assert model.layers_input[index].shape == stream
            assert model.attentions_input[index].shape == model.attentions_output[index].shape == stream
            assert model.mlps_input[index].shape == model.mlps_output[index].shape == stream
            model.steer(index, torch.ones(model.hidden_size), positions=-1)
            assert model.layers_output[index].shape == stream
        lens = model.project_on_vocab(model.layers_output[-1])
        assert lens.shape == model.logits.shape == (2, 11, model.vocab_size)
        assert model.next_token_probs.shape == (2, model.vocab_size)
    assert not model.dispatched
    with torch.no_grad(), model.trace(IDS):
        hidden = layer.output.save()
    assert model.dispatched
    assert hidden.shape == stream


def test_text_is_scanned_with_its_padding() -> None:
    model = StandardizedTransformer("demo-gpt2", allow_dispatch=False)
    with model.scan(["The Eiffel Tower is in the city of", "Paris"]) as tracer:
        shape = model.layers_output[2].shape
        tracer.stop()
    assert shape == (2, 8, model.hidden_size)
    with model.scan() as tracer:
        with tracer.invoke("The Eiffel Tower is in the city of"):
            clean = model.layers_output[1]
        with tracer.invoke("Paris"):
            model.layers_output[1].t[-1] = clean.t[-1]
            logits = model.logits.save()
    assert (logits.shape, model.dispatched) == ((1, 8, model.vocab_size), False)


def test_the_numbers_are_checked_when_they_come(folder: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    text = (SPECS / "llama.yaml").read_text(encoding="utf-8")
    assert "[model.norm," in text
    wrong.write_text(text.replace("[model.norm,", "[model.layers.0.input_layernorm,"), encoding="utf-8")
    with pytest.raises(ValidationError):
        StandardizedTransformer(folder, spec=wrong)
    model = StandardizedTransformer(folder, spec=wrong, allow_dispatch=False)
    with torch.no_grad(), model.scan(IDS):
        assert model.logits.shape == (2, 11, 320)
    for _ in range(2):
        with pytest.raises(ValidationError), model.trace(IDS):
            pytest.fail("the block was entered")
    with torch.no_grad(), StandardizedTransformer(folder, spec=wrong, check_renaming=False).trace(IDS):
        pass


def test_arguments_of_other_times(folder: Path) -> None:
    model = StandardizedTransformer(
        str(folder), False, True, False, True, enable_attention_probs=True, check_attn_probs_with_trace=False
    )
    with torch.no_grad(), model.trace(IDS):
        assert model.logits.shape == (2, 11, 320)
    assert StandardizedTransformer(folder, allow_multimodal=True, dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(RemoteError, match="nothing was sent"):
        StandardizedTransformer(folder, remote=True)
    with pytest.raises(TypeError, match="device_map"):
        StandardizedTransformer(tiny_model("llama"), device_map="cpu")


def test_names_that_no_specification_gives_come_with_the_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nnterp.naming.load_specs", dict)
    model = StandardizedTransformer(folder, allow_dispatch=False)
    held = model.model.layers[1]
    with torch.no_grad(), model.scan(IDS):
        assert model.lm_head.output.shape == (2, 11, 320)
    assert not model.dispatched
    with torch.no_grad(), model.trace(IDS):
        read = model.layers_output[1].save()
        plain = held.output.save()
    assert model.dispatched
    torch.testing.assert_close(read.value, plain.value, rtol=0, atol=0)
    for ask in (
        lambda each: each.num_layers,
        lambda each: len(each.layers),
        lambda each: len(each.edit().__enter__().layers),
    ):
        asked = StandardizedTransformer(folder, allow_dispatch=False)
        assert (ask(asked), asked.dispatched) == (model.num_layers, True)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = StandardizedTransformer(folder, allow_dispatch=False).nonsense
