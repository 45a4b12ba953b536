"""The helper functions, each against the accessor that it stands for, and the accessor of plain modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nnsight_core.errors import RemoteError
from nnterp import RenameConfig, StandardizedTransformer, nnsight_utils, rename_utils
from nnterp.errors import LayerIndexError, MissingPartError, PositionError, RenamingError, UsageError
from nnterp.nnsight_utils import ModuleAccessor, collect_token_activations_batched, get_token_activations
from nnterp.rename_utils import get_rename_dict
from tests.families import tiny_model
from tests.nnterp.handmade import handmade

PROMPTS = ["Paris", "The capital of Japan is", "One and one"]


@pytest.mark.parametrize("name", ["layer_input", "layer_output", "attention_output", "mlp_output"])
def test_values(demo_gpt2: StandardizedTransformer, name: str) -> None:
    place = name.replace("layer_", "layers_").replace("attention_", "attentions_").replace("mlp_", "mlps_")
    with demo_gpt2.trace("Paris"):
        one = getattr(nnsight_utils, f"get_{name}")(demo_gpt2, 1).save()
    with demo_gpt2.trace("Paris"):
        other = getattr(demo_gpt2, place)[1].save()
    assert torch.equal(one, other)


def test_modules_and_the_rest(demo_gpt2: StandardizedTransformer) -> None:
    assert [layer.path for layer in nnsight_utils.get_layers(demo_gpt2)][1] == "transformer.h.1"
    assert nnsight_utils.get_num_layers(demo_gpt2) == demo_gpt2.num_layers
    found = [nnsight_utils.get_embed_tokens(demo_gpt2), nnsight_utils.get_unembed_norm(demo_gpt2)]
    found += [nnsight_utils.get_unembed(demo_gpt2), nnsight_utils.get_attention(demo_gpt2, 0)]
    found.append(nnsight_utils.get_mlp(demo_gpt2, 0))
    paths = ["transformer.wte", "transformer.ln_f", "lm_head", "transformer.h.0.attn", "transformer.h.0.mlp"]
    assert [each.path for each in found] == paths
    with demo_gpt2.trace("Paris"):
        nnsight_utils.set_layer_output(demo_gpt2, 2, nnsight_utils.get_layer_output(demo_gpt2, 2) * 0)
        hidden = nnsight_utils.get_layer_output(demo_gpt2, -1).save()
        logits = nnsight_utils.get_logits(demo_gpt2).save()
    torch.testing.assert_close(nnsight_utils.project_on_vocab(demo_gpt2, hidden), logits)
    probs = nnsight_utils.compute_next_token_probs(demo_gpt2, PROMPTS)
    torch.testing.assert_close(probs.sum(-1), torch.ones(3))


def test_token_activations(demo_gpt2: StandardizedTransformer) -> None:
    together = get_token_activations(demo_gpt2, PROMPTS)
    assert together.shape == (demo_gpt2.num_layers, 3, demo_gpt2.hidden_size)
    for index, prompt in enumerate(PROMPTS):
        with demo_gpt2.trace(prompt):
            last = demo_gpt2.layers_output[1][0, -1].save()
        torch.testing.assert_close(together[1, index], last)
    batched = collect_token_activations_batched(demo_gpt2, PROMPTS, 2, tqdm=iter)
    torch.testing.assert_close(batched, together.detach())
    older = nnsight_utils.collect_last_token_activations_session(demo_gpt2, PROMPTS, 2, layers=[1])
    torch.testing.assert_close(older[0], together[1].detach())
    first = get_token_activations(demo_gpt2, PROMPTS, [0], nnsight_utils.get_mlp_output, idx=0)
    with demo_gpt2.trace(PROMPTS) as tracer:
        inside = get_token_activations(demo_gpt2, None, [0], nnsight_utils.get_mlp_output, idx=0, tracer=tracer).save()
    torch.testing.assert_close(inside, first)


def test_layers_come_in_the_order_asked(demo_gpt2: StandardizedTransformer) -> None:
    every = get_token_activations(demo_gpt2, PROMPTS)
    assert every.shape[0] == demo_gpt2.num_layers and not every.requires_grad
    assert torch.equal(get_token_activations(demo_gpt2, PROMPTS, layers=[2, 0, -1, 2]), every[[2, 0, -1, 2]])
    assert torch.equal(get_token_activations(demo_gpt2, PROMPTS, layers=2), every[[2]])
    assert torch.equal(get_token_activations(demo_gpt2, PROMPTS, layers=torch.tensor([1, 0])), every[[1, 0]])
    with demo_gpt2.trace() as tracer:
        with tracer.invoke(PROMPTS[0]):
            one = get_token_activations(demo_gpt2, layers=[2, 0], tracer=tracer).save()
        with tracer.invoke(PROMPTS[1]):
            other = get_token_activations(demo_gpt2, layers=[2, 0], idx=0, tracer=tracer).save()
    torch.testing.assert_close(one.value.detach()[:, 0], every[[2, 0], 0])
    torch.testing.assert_close(other.value.detach(), get_token_activations(demo_gpt2, PROMPTS[1], [2, 0], idx=0))


def test_any_token_is_that_of_each_prompt_alone(demo_gpt2: StandardizedTransformer) -> None:
    for idx in (0, 1, -2):
        together = get_token_activations(demo_gpt2, PROMPTS[1:], layers=[3], idx=idx)
        for index, prompt in enumerate(PROMPTS[1:]):
            ids = torch.tensor([demo_gpt2.tokenizer(prompt)["input_ids"]])
            with torch.no_grad():
                alone = demo_gpt2._module(input_ids=ids, output_hidden_states=True).hidden_states[4][0, idx]
            torch.testing.assert_close(together[0, index], alone)


def test_what_cannot_be_asked(demo_gpt2: StandardizedTransformer) -> None:
    with pytest.raises(RemoteError):
        get_token_activations(demo_gpt2, PROMPTS, remote=True)
    with pytest.raises(UsageError, match="prompts, or the tracer"):
        get_token_activations(demo_gpt2)
    with pytest.raises(UsageError, match="0 prompts"):
        collect_token_activations_batched(demo_gpt2, [], 2)
    with pytest.raises(UsageError, match="No layer was asked for: give some of 0 to 5"):
        get_token_activations(demo_gpt2, PROMPTS, layers=[])
    with pytest.raises(LayerIndexError, match=r"layers_output\[9\]"):
        get_token_activations(demo_gpt2, PROMPTS, layers=[0, 9])
    with pytest.raises(PositionError, match="In prompt 0, token 2 is not there: there are 1"):
        get_token_activations(demo_gpt2, PROMPTS, idx=2)
    with pytest.raises(PositionError, match=r"from number 2 on.*In prompt 0, token -4 is not there: there are 1"):
        collect_token_activations_batched(demo_gpt2, [PROMPTS[1], PROMPTS[1], PROMPTS[0]], 2, idx=-4)
    with pytest.raises(UsageError, match=r"of shape \(3, 4, \d, 28\).*\(batch, position, hidden\)"):
        get_token_activations(demo_gpt2, PROMPTS, get_activations=lambda model, layer: model.heads_output[layer])


def test_the_accessor_of_plain_modules() -> None:
    plain: Any = tiny_model("opt")
    found = ModuleAccessor(plain)
    assert found.get_layers() is plain.model.decoder.layers and found.get_attention(1) is found.get_layer(1).self_attn
    assert found.get_embed_tokens() is plain.get_input_embeddings() and found.get_unembed() is plain.lm_head
    with pytest.raises(MissingPartError, match="mlp of layer 0"):
        found.get_mlp(0)
    own: Any = handmade()
    assert ModuleAccessor(own).get_unembed_norm() is own.last
    assert ModuleAccessor(own, RenameConfig(mlp_name="looking")).get_mlp(0) is own.stages[0].looking


def test_the_dict_of_names() -> None:
    known = get_rename_dict()
    assert known["transformer.h"] == "layers" and known["attn"] == "self_attn"
    assert get_rename_dict(RenameConfig(attn_name=["mixer", "attn"], layers_name="x"))["mixer"] == "self_attn"
    own = handmade()
    names = get_rename_dict(model=own)
    assert names == {"words": "embed_tokens", "stages": "layers", "last": "ln_final", "speak": "lm_head"} | {
        "looking": "self_attn",
        "thinking": "mlp",
    }


def test_sizes_by_config_key() -> None:
    plain = tiny_model("gpt2")
    assert rename_utils.get_num_attention_heads(plain) == 4 and rename_utils.get_vocab_size(plain) == 320
    assert rename_utils.get_hidden_size(plain, rename_config=RenameConfig(hidden_size_config_key=7)) == 7
    wrong = RenameConfig(attn_head_config_key="no_such_key")
    assert rename_utils.get_num_attention_heads(plain, raise_error=False, rename_config=wrong) is None
    with pytest.raises(RenamingError, match="no_such_key"):
        rename_utils.get_num_attention_heads(plain, rename_config=wrong)
    assert rename_utils.text_config(plain) is plain.config and rename_utils.get_ignores(plain) == []
    assert rename_utils.expand_path_with_model(["h"]) == ["h", "model.h"]


def test_an_attention_source_of_ones_own() -> None:
    class Mine(rename_utils.AttnProbFunction):
        def get_attention_prob_source(self, attention_module: Any, return_module_source: bool = False) -> Any:
            return attention_module, return_module_source

    assert Mine()("here") == ("here", False)
