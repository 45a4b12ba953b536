"""Several prompts in one forward pass: padding, standard names, tools, and rows where a model flattens its batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from nnsight_core import LanguageModel
from nnsight_core.input_errors import InputError
from nnterp import StandardizedTransformer
from tests.families import tiny_model
from tests.small_tokenizers import word_tokenizer

FAMILIES = ["gpt2", "llama", "opt", "gemma2", "gpt_neox", "phi"]
LONG, SHORT = [5, 6, 7, 8, 9, 10], [11, 12, 13]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> StandardizedTransformer:
    module = tiny_model(request.param)
    # Gemma 2 gives no numbers in double precision where a batch is padded.
    return StandardizedTransformer(module if request.param == "gemma2" else module.double(), tokenizer=word_tokenizer())


@pytest.fixture(scope="module")
def llama() -> StandardizedTransformer:
    return StandardizedTransformer(tiny_model("llama").double(), tokenizer=word_tokenizer())


def close(one: Any, other: Any, name: str = "") -> None:
    one, other = getattr(one, "value", one), getattr(other, "value", other)
    rounding = {"rtol": 1e-3, "atol": 2e-5} if one.dtype == torch.float32 else {"rtol": 1e-6, "atol": 1e-8}
    torch.testing.assert_close(one, other, **rounding, msg=lambda found: f"{name}: {found}")


def own(logits: Any, prompt: list[int]) -> Any:
    """The part of the logits that belongs to the tokens of the prompt."""
    return logits[:, -len(prompt) :]


# Each edit takes the model, and a vector as wide as its residual stream.
EDITS = {
    "layers_output": lambda m, v: m.layers_output[1].__iadd__(v),
    "layers_input": lambda m, v: m.layers_input.__setitem__(1, m.layers_input[1] * 0.5),
    "attentions_output": lambda m, v: m.attentions_output.__setitem__(1, 0),
    "mlps_output": lambda m, v: m.mlps_output[1][:, -1].mul_(-1),
    "mlps_input": lambda m, v: m.mlps_input[0][:, -2:].__setitem__(slice(None), 0.25),
    "attention to mlp": lambda m, v: m.mlps_output.__setitem__(1, m.attentions_output[1] * 2),
    "steer": lambda m, v: m.steer([0, 2], v, factor=0.5),
    "steer a token": lambda m, v: m.steer(1, v, token_positions=[0, 2]),
    "skip_layer": lambda m, v: m.skip_layer(1),
    "skip_layers": lambda m, v: m.skip_layers(0, 1),
    ".t": lambda m, v: m.layers_output[0].t[1].__setitem__(slice(None), v),
    "token_embeddings": lambda m, v: m.token_embeddings.t[0].mul_(3),
    "logits": lambda m, v: setattr(m, "logits", m.logits * 2),
}


@torch.no_grad()
def test_each_edit_in_an_invoke_does_what_it_does_alone_and_nothing_to_the_others(
    model: StandardizedTransformer,
) -> None:
    vector = torch.linspace(-1, 1, model.hidden_size, dtype=torch.float64)

    def beside(edit: Any) -> tuple[Any, Any, Any]:
        with model.trace() as tracer:
            with tracer.invoke(LONG):
                first = model.logits.save()
            with tracer.invoke(SHORT):
                if edit is not None:
                    edit(model, vector)
                edited = model.logits.save()
            with tracer.invoke(LONG[:4]):
                last = model.logits.save()
        assert tracer.forward_passes == 1
        return first.value, edited.value, last.value

    plain = beside(None)
    for name, edit in EDITS.items():
        first, edited, last = beside(edit)
        with model.trace(SHORT):
            edit(model, vector)
            alone = model.logits.save()
        close(own(edited, SHORT), alone, name)
        assert not torch.equal(edited, plain[1]), f"{name}: the edit does nothing"
        assert torch.equal(first, plain[0]) and torch.equal(last, plain[2]), name


@torch.no_grad()
def test_each_accessor_reads_what_it_reads_alone(model: StandardizedTransformer) -> None:
    def read() -> list[Any]:
        names = ["layers_input", "attentions_input", "attentions_output", "mlps_input", "mlps_output", "layers_output"]
        if model.config.model_type in ("gpt_neox", "phi"):
            names = ["layers_input", "attentions_output", "mlps_output", "layers_output"]
        values = [model.token_embeddings.t[:3].save()]
        values += [getattr(model, name)[1].t[:3].save() for name in names]
        hidden = model.layers_output[-1]
        values += [model.project_on_vocab(hidden)[:, -1].save(), hidden.t[0].save(), hidden.t[-1].save()]
        return [*values, model.next_token_probs.save()]

    with model.trace() as tracer:
        with tracer.invoke(LONG):
            model.logits.save()
        with tracer.invoke(SHORT):
            together = read()
    assert tracer.forward_passes == 1
    with model.trace(SHORT):
        alone = read()
    for one, other in zip(together, alone, strict=True):
        close(one, other)


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 2])
def test_a_patch_from_one_prompt_into_another(layer: int, model: StandardizedTransformer) -> None:
    with model.trace() as tracer:
        with tracer.invoke(LONG):
            taken = model.layers_output[1][:, -1]
        with tracer.invoke(SHORT):
            model.layers_output[layer][:, -1] = taken
            patched = model.logits.save()
    assert tracer.forward_passes == (2 if layer == 0 else 1)
    with model.trace(LONG):
        taken = model.layers_output[1][:, -1].save()
    with model.trace(SHORT):
        model.layers_output[layer][:, -1] = taken.value
        expected = model.logits.save()
    close(own(patched, SHORT), expected)


@torch.no_grad()
def test_text_ids_lists_dicts_and_tensors_go_together(llama: StandardizedTransformer) -> None:
    ids = torch.tensor([SHORT])
    short = " ".join(f"w{token}" for token in SHORT)
    encoded = llama.tokenizer(short, return_tensors="pt", return_token_type_ids=False)
    padded = {"input_ids": torch.tensor([[0, *SHORT]]), "attention_mask": torch.tensor([[0, 1, 1, 1]])}
    forms = [short, [short], SHORT, [SHORT], ids, ids[0], {"input_ids": ids}, encoded, padded]
    kept = []
    with llama.trace() as tracer:
        with tracer.invoke([LONG, SHORT]):
            both = llama.logits.save()
        for form in forms:
            with tracer.invoke(form):
                kept.append(llama.logits.save())
        with tracer.invoke(input_ids=ids):
            kept.append(llama.logits.save())
        with tracer.invoke():
            whole = llama.logits.save()
    assert tracer.forward_passes == 1
    assert both.shape[:2] == (2, len(LONG)) and len(whole.value) == 2 + len(kept)
    expected = llama._module(ids).logits
    for logits in kept:
        close(own(logits, SHORT), expected)
    close(own(both[1:], SHORT), expected)


@torch.no_grad()
def test_the_tokens_of_an_invoke_stand_where_its_values_do(llama: StandardizedTransformer) -> None:
    with llama.trace() as tracer:
        with tracer.invoke(LONG):
            llama.logits.save()
        with tracer.invoke(SHORT):
            last = llama.layers_output[0][:, llama.input_size[1] - 1].save()
    with llama.trace(SHORT):
        expected = llama.layers_output[0][:, -1].save()
    close(last, expected)


@torch.no_grad()
def test_the_mask_of_an_invoke_fits_its_values(llama: StandardizedTransformer) -> None:
    with llama.trace() as tracer:
        with tracer.invoke(LONG):
            llama.logits.save()
        with tracer.invoke(SHORT):
            tokens = (llama.layers_output[0] * llama.attention_mask[..., None]).sum(1).save()
    with llama.trace(SHORT):
        expected = llama.layers_output[0].sum(1).save()
    close(tokens, expected)


@torch.no_grad()
def test_position_ids_of_ones_own_are_kept(llama: StandardizedTransformer) -> None:
    kept = []
    positions = [torch.tensor([[4, 9, 20]]), torch.tensor([[0, 7, 8]])]
    with llama.trace() as tracer:
        for each in positions:
            with tracer.invoke({"input_ids": torch.tensor([SHORT]), "position_ids": each}):
                kept.append(llama.logits.save())
    for logits, each in zip(kept, positions, strict=True):
        close(logits, llama._module(input_ids=torch.tensor([SHORT]), position_ids=each).logits)


@torch.no_grad()
def test_a_token_that_is_masked_out_keeps_its_place(llama: StandardizedTransformer) -> None:
    holed = {"input_ids": torch.tensor([LONG]), "attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1]])}
    with llama.trace() as tracer:
        with tracer.invoke(holed):
            logits = llama.logits.save()
        with tracer.invoke(SHORT):
            llama.logits.save()
    with llama.trace(holed):
        alone = llama.logits.save()
    close(logits, alone)


@torch.no_grad()
def test_tokens_are_looked_at_inside_an_invoke(llama: StandardizedTransformer) -> None:
    with llama.trace() as tracer:
        with tracer.invoke(LONG):
            before = llama.logits.save()
        with tracer.invoke(SHORT):
            closest = llama.get_topk_closest_tokens(llama.layers_output[0][:, -1], k=2)
            token = llama.project_on_vocab(llama.layers_output[1][:, -1]).argmax(-1).item()
            after = llama.logits.save()
        with tracer.invoke(LONG):
            top = llama.logits[:, -1].topk(3)
            best = top.indices.save()
    assert len(closest[0]) == 2 and int(token) < 320
    assert tracer.forward_passes == 3
    close(before, llama._module(torch.tensor([LONG])).logits)
    close(own(after, SHORT), llama._module(torch.tensor([SHORT])).logits)
    assert torch.equal(best.value, llama._module(torch.tensor([LONG])).logits[:, -1].topk(3).indices)


def test_inputs_of_different_forms_are_refused_by_name(llama: StandardizedTransformer) -> None:
    with pytest.raises(InputError, match=r"\['use_cache'\]"), llama.trace() as tracer:
        with tracer.invoke(LONG, use_cache=False):
            llama.logits.save()
        with tracer.invoke(SHORT):
            llama.logits.save()
    with pytest.raises(InputError, match="inputs_embeds"), llama.trace() as tracer:
        with tracer.invoke(inputs_embeds=torch.zeros(1, 3, 64).double()):
            llama.logits.save()
        with tracer.invoke(SHORT):
            llama.logits.save()
    assert torch.equal(llama.trace(SHORT, trace=False).logits, llama._module(torch.tensor([SHORT])).logits)


@torch.no_grad()
@pytest.mark.parametrize("edited_first", [True, False])
def test_an_edit_in_a_mixture_of_experts_leaves_every_bit_of_the_other_prompt(edited_first: bool) -> None:
    config = MixtralConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
    )
    model = LanguageModel(AutoModelForCausalLM.from_config(config).eval())
    mixture = model.model.layers[0].mlp

    def run(edit: bool) -> tuple[torch.Tensor, torch.Tensor]:
        kept = {}
        with model.trace() as tracer:
            for mine in (True, False) if edited_first else (False, True):
                with tracer.invoke(LONG if mine else SHORT):
                    if mine and edit:
                        mixture.gate.input *= 2
                        mixture.experts.input[0][0][1] += 3
                        mixture.experts.output[-2:] = 1
                        mixture.output[:, 0] += 1
                    rows = mixture.output.save()
                    kept[mine] = model.output.logits.save()
                    assert rows is not None
        assert tracer.forward_passes == 1
        assert rows.shape[:2] == (1, len(LONG))
        return kept[True].value, kept[False].value

    (plain, other), (edited, beside) = run(False), run(True)
    assert not torch.equal(plain, edited)
    assert torch.equal(other, beside)
