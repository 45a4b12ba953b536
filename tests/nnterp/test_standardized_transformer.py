"""Opening models: by name, by folder, as an object; and what is said of what cannot be opened."""

from __future__ import annotations

import gc
import json
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from nnsight_core import InputError, LanguageModel, ModelClassError, ModelNotFoundError, NoSuchModuleError
from nnterp import StandardizedTransformer
from tests.families import tiny_model


@pytest.mark.parametrize("name", ["demo-gpt2", "demo-llama"])
def test_a_model_that_comes_along_opens_by_name_and_knows_its_prompts(name: str) -> None:
    model = StandardizedTransformer(name)
    prompts = ["John and Mary went to the store. John handed the milk to", "The Eiffel Tower is in the city of"]
    with model.trace(prompts):
        probabilities = model.next_token_probs.save()
    assert [model.token_text(int(row.argmax())) for row in probabilities] == [" Mary", " Paris"]
    assert model.num_layers >= 4


def test_dimensions_are_the_configs(demo_llama: StandardizedTransformer) -> None:
    config = demo_llama.config
    assert demo_llama.num_layers == config.num_hidden_layers == len(demo_llama.layers)
    assert demo_llama.num_heads == config.num_attention_heads
    assert demo_llama.num_kv_heads == config.num_key_value_heads < demo_llama.num_heads
    assert demo_llama.hidden_size == config.hidden_size
    assert demo_llama.vocab_size == config.vocab_size
    assert demo_llama.head_dim * demo_llama.num_heads == demo_llama.layers[0].self_attn.q_proj.out_features


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("layer_output", "Did you mean 'layers_output'"),
        ("logit", "Did you mean 'logits'"),
        ("traec", "Did you mean 'trace'"),
        ("norm", "A module of that name is at 'model.norm'"),
    ],
)
def test_a_name_that_is_not_there_is_answered_with_the_nearest(
    demo_llama: StandardizedTransformer, name: str, says: str
) -> None:
    with pytest.raises(NoSuchModuleError, match=says):
        getattr(demo_llama, name)


def test_a_path_is_answered_with_modules_alone(demo_llama: StandardizedTransformer) -> None:
    with pytest.raises(NoSuchModuleError, match=r"'layers_output'\.\nDid you mean 'layers'\?"):
        demo_llama.get("layers_output")


def test_a_new_name_that_stands_further_down_is_shown_where_it_is() -> None:
    model = StandardizedTransformer("demo-llama", rename={"layers": "blocks"})
    with pytest.raises(NoSuchModuleError, match=r"is at 'model\.blocks'"):
        _ = model.blocks


def test_what_is_known_of_the_input_is_there_at_any_moment(demo_gpt2: StandardizedTransformer) -> None:
    with demo_gpt2.trace(["The Eiffel Tower", "Paris"]):
        hidden = demo_gpt2.layers_output[-1]
        ids, size, mask = demo_gpt2.input_ids, demo_gpt2.input_size, demo_gpt2.attention_mask
        assert hidden.shape[:2] == size == ids.shape
        saved = demo_gpt2.input_ids.save(), demo_gpt2.attention_mask.save()
        last = demo_gpt2.attention_mask[:, -1].save()
    assert mask[0].all() and not mask[1, 0]
    assert torch.equal(saved[0], ids) and torch.equal(saved[1], mask) and last.all()
    with demo_gpt2.trace() as tracer:
        for text in ("The Eiffel Tower", "Paris"):
            with tracer.invoke(text):
                rows = demo_gpt2.input_ids.save(), demo_gpt2.attention_mask.save()
    assert torch.equal(rows[0], ids[1:]) and torch.equal(rows[1], mask[1:])


def test_a_folder_of_ones_own_opens(tmp_path: Path) -> None:
    module = tiny_model("qwen2")
    module.save_pretrained(tmp_path / "mine")
    model = StandardizedTransformer(tmp_path / "mine")
    assert model.tokenizer is None
    ids = torch.tensor([[3, 4, 5]])
    with model.trace(ids):
        logits = model.logits.save()
    assert torch.equal(logits, module(ids).logits)
    with pytest.raises(InputError, match="without a tokenizer"), model.trace("text"):
        pass
    assert next(iter(model.get_topk_closest_tokens(torch.randn(model.hidden_size), k=2))).startswith("#")


def test_a_name_that_does_not_exist_suggests_those_that_come_along() -> None:
    with pytest.raises(ModelNotFoundError, match="Did you mean 'demo-llama'") as caught:
        StandardizedTransformer("demo-lama")
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("wrap", [LanguageModel, StandardizedTransformer])
def test_options_for_loading_are_not_dropped_where_nothing_is_loaded(wrap: Any) -> None:
    with pytest.raises(TypeError, match="attn_implementation: these say how to load"):
        wrap(tiny_model("llama"), attn_implementation="eager")


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        StandardizedTransformer(str(tmp_path))


def test_a_model_that_is_no_causal_one_is_opened_as_the_error_says(tmp_path: Path) -> None:
    from transformers import DistilBertConfig, DistilBertModel, T5Config, T5ForConditionalGeneration

    ids, read = torch.tensor([[3, 4, 5]]), torch.tensor([[0, 7]])
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))
    t5.eval().save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelClassError, match=r"'t5'[^@]*='AutoModelForSeq2SeqLM'\)\n.*decoder_input_ids"):
        StandardizedTransformer(tmp_path / "t5")
    model = LanguageModel(tmp_path / "t5", automodel="AutoModelForSeq2SeqLM")
    with torch.no_grad(), model.trace(ids, decoder_input_ids=read):
        logits = model.lm_head.output.save()
    with torch.no_grad():
        assert torch.equal(logits, t5(input_ids=ids, decoder_input_ids=read).logits)

    bert = DistilBertModel(DistilBertConfig(vocab_size=64, dim=16, hidden_dim=32, n_layers=1, n_heads=2))
    bert.save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelClassError, match=r"'distilbert'.*\n.*\n.*automodel='AutoModel'\)"):
        StandardizedTransformer(tmp_path / "bert")


def test_an_architecture_that_no_file_serves_is_opened_by_its_structure() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=64)
    config.model_type = "bloomier"
    model = StandardizedTransformer(BloomForCausalLM(config))
    assert model.attentions[1].path == "transformer.h.1.self_attention" and model.num_heads == 2


def test_a_config_that_says_something_else_than_the_weights(tmp_path: Path) -> None:
    module = tiny_model("llama")
    module.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(ModelNotFoundError):
        StandardizedTransformer(tmp_path)
    assert config["model_type"] == "llama"


@pytest.mark.parametrize("prompt", ["", [], [""], ["fine", ""]], ids=str)
def test_an_empty_prompt(demo_gpt2: StandardizedTransformer, prompt: Any) -> None:
    with pytest.raises(InputError, match="empty"), demo_gpt2.trace(prompt):
        pass


def test_a_prompt_beyond_the_context_length(demo_llama: StandardizedTransformer) -> None:
    limit = demo_llama.config.max_position_embeddings
    with pytest.raises(InputError, match=f"context of {limit} positions"), demo_llama.trace("Paris " * (limit + 1)):
        pass


def test_the_closest_tokens_of_a_hidden_state(demo_gpt2: StandardizedTransformer) -> None:
    with demo_gpt2.trace(["The Eiffel Tower is in the city of", "The capital of France is"]):
        hidden = demo_gpt2.layers_output[-1][:, -1].save()
        expected = demo_gpt2.next_token_probs.save()
        inside = demo_gpt2.get_topk_closest_tokens(hidden, k=3)
    found = demo_gpt2.get_topk_closest_tokens(hidden, k=3)
    assert [list(row) for row in found] == [list(row) for row in inside]
    for row, probabilities in zip(found, expected.value, strict=True):
        assert list(row.values()) == pytest.approx(probabilities.topk(3).values.tolist(), rel=1e-4)
        assert list(row) == [demo_gpt2.tokenizer.decode([i]) for i in probabilities.topk(3).indices.tolist()]
    alone = demo_gpt2.get_topk_closest_tokens(hidden[0], k=3)
    assert list(alone) == list(found[0])
    assert list(alone.values()) == pytest.approx(list(found[0].values()), rel=1e-4)
    with pytest.raises(ValueError, match="Give a number from 1 to"):
        demo_gpt2.get_topk_closest_tokens(hidden, k=0)


def test_printing_the_model_shows_the_module_tree_with_both_names(demo_gpt2: StandardizedTransformer) -> None:
    shown = str(demo_gpt2)
    for line in (
        "(transformer -> model): GPT2Model(",
        "(attn -> self_attn): GPT2Attention(",
        "(transformer.h -> layers)",
    ):
        assert line in shown
    beside = re.sub(r"\n +\([\w.]+ -> \w+\)(?=\n)", "", shown)
    assert re.sub(r" -> \w+(?=\))", "", beside) == str(demo_gpt2._module)


def test_a_model_is_gone_when_it_is_deleted_without_the_garbage_collector() -> None:
    model = StandardizedTransformer(tiny_model("gpt2"), check_renaming=False)
    module, root = weakref.ref(model._module), weakref.ref(model)
    gc.disable()
    try:
        with model.trace(torch.tensor([[1, 2, 3]])):
            model.layers_output[0] += 1
            hidden = model.mlps_output[1].save()
        with model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2) as tracer:
            kept = [model.logits.save() for _ in tracer.iter[:]]
        del model, tracer
        assert root() is None and module() is None
        assert hidden.shape[:2] == (1, 3) and len(kept) == 2
    finally:
        gc.enable()
