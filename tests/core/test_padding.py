"""Prompts of different lengths in one batch: each gives the numbers that it gives alone, or the batch is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from nnsight_core import LanguageModel, PaddingError
from nnsight_core.padding import way_to_pad

LONG, MIDDLE, SHORT = [5, 6, 7, 8, 9, 11, 12, 13], [14, 15, 16, 17, 18], [3, 4, 10]

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ENCODERS = {"is_decoder": True, "max_position_embeddings": 64, "pad_token_id": 1}
SEQ2SEQ = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}

#: Models that learn positions, turn by them, bias by distance, count by the mask, have none, or recur.
CAN: dict[str, dict[str, Any]] = {
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "llama": SMALL,
    "mixtral": {**SMALL, "num_local_experts": 4, "num_key_value_heads": 2},
    "opt": {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
    },
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "mamba": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "bert": {**SMALL, "is_decoder": True},
    # These begin to count at 2, and count by the token of padding.
    "roberta": {**SMALL, **ENCODERS},
    "xlm-roberta": {**SMALL, **ENCODERS},
}
CANNOT: dict[str, dict[str, Any]] = {
    "bart": SEQ2SEQ,
    "marian": {**SEQ2SEQ, "decoder_vocab_size": 64, "pad_token_id": 0},
    "rwkv": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32},
}


def made(model_type: str, config: dict[str, Any], kind: Any = AutoModelForCausalLM) -> Any:
    model = kind.from_config(AutoConfig.for_model(model_type, **config), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


class Tokens:
    """As much of a tokenizer as padding needs."""

    pad_token_id = 1


@torch.no_grad()
@pytest.mark.parametrize("model_type", CAN)
def test_every_prompt_of_a_padded_batch_gives_what_it_gives_alone(model_type: str) -> None:
    module = made(model_type, CAN[model_type])
    tokenizer: Any = Tokens() if CAN[model_type].get("pad_token_id") else None
    model = LanguageModel(module, tokenizer)
    prompts = (LONG, SHORT, MIDDLE)
    with model.trace() as tracer:
        found = []
        for prompt in prompts:
            with tracer.invoke(prompt):
                found.append(model.output.logits.save())
    with model.trace(list(prompts)):
        together = model.output.logits.save()
    assert tracer.forward_passes == 1
    for prompt, batched, row in zip(prompts, found, together.value, strict=True):
        alone = module(torch.tensor([prompt])).logits
        torch.testing.assert_close(batched.value[:, -len(prompt) :], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(row[None, -len(prompt) :], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("model_type", CANNOT)
def test_a_model_whose_numbers_padding_would_change_is_refused(model_type: str) -> None:
    module = made(model_type, CANNOT[model_type])
    model = LanguageModel(module)
    with pytest.raises(PaddingError, match=type(module).__name__), model.trace([LONG, SHORT]):
        pass
    with pytest.raises(PaddingError), model.trace() as tracer:
        for prompt in (LONG, SHORT):
            with tracer.invoke(prompt):
                model.output.logits.save()
    with model.trace() as tracer:
        for prompt in (SHORT, SHORT[::-1]):
            with tracer.invoke(prompt):
                last = model.output.logits.save()
    torch.testing.assert_close(last.value, module(torch.tensor([SHORT[::-1]])).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_encoders_with_decoders() -> None:
    start = torch.tensor([[0, 2]])
    module = made("t5", {**T5, "decoder_start_token_id": 0}, AutoModelForSeq2SeqLM)
    model = LanguageModel(module)
    found = []
    with model.trace() as tracer:
        for prompt in (LONG, SHORT):
            with tracer.invoke(prompt, decoder_input_ids=start):
                found.append(model.output.logits.save())
    for prompt, logits in zip((LONG, SHORT), found, strict=True):
        alone = module(input_ids=torch.tensor([prompt]), decoder_input_ids=start).logits
        torch.testing.assert_close(logits.value, alone, rtol=1e-4, atol=1e-5)
    refused = LanguageModel(made("bart", {**SEQ2SEQ, "decoder_start_token_id": 2}, AutoModelForSeq2SeqLM))
    with pytest.raises(PaddingError), refused.trace() as tracer:
        for prompt in (LONG, SHORT):
            with tracer.invoke(prompt, decoder_input_ids=start):
                refused.output.logits.save()


# Trying it out is nobody's business.


def ids_and_mask() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([[0, 0, 3, 4], [5, 6, 7, 8]])
    return ids, (ids != 0).long()


def test_it_is_tried_once_and_neither_hooks_nor_chance_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    module = made("gpt2", CAN["gpt2"])
    ran: list[Any] = []
    handle = module.transformer.register_forward_hook(lambda *each: ran.append(each[0]))
    forward = type(module).forward
    calls: list[Any] = []
    monkeypatch.setattr(type(module), "forward", counting(forward, calls))
    torch.manual_seed(3)
    ways = [way_to_pad(module, *ids_and_mask(), 0) for _ in range(3)]
    drawn = torch.rand(1)
    handle.remove()
    torch.manual_seed(3)
    assert ways == ["counted"] * 3
    assert torch.equal(drawn, torch.rand(1))
    assert not ran and len(calls) == 2


def counting(forward: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    def counted(
        self: nn.Module, input_ids: Any = None, attention_mask: Any = None, position_ids: Any = None, **rest: Any
    ) -> Any:
        calls.append(self)
        return forward(self, input_ids, attention_mask=attention_mask, position_ids=position_ids, **rest)

    return counted


def test_while_somebody_else_traces_the_model() -> None:
    module = made("gpt2", CAN["gpt2"])
    model = LanguageModel(module)
    with model.trace(LONG):
        assert model.transformer.h[0].input is not None
        assert way_to_pad(module, *ids_and_mask(), 0) == "counted"
        hidden = model.transformer.h[1].output.save()
    assert hidden.shape[1] == len(LONG)
    assert "forward" not in vars(module.transformer.h[0])


def test_where_there_are_no_numbers_or_chance_has_a_say_nothing_is_tried() -> None:
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **CAN["gpt2"])).eval()
    assert way_to_pad(empty, *ids_and_mask(), 0) == "counted"
    bart = made("bart", CANNOT["bart"])
    assert way_to_pad(copy.deepcopy(bart).train(), *ids_and_mask(), 0) == "plain"
    assert way_to_pad(bart, *ids_and_mask(), 0) == "impossible"


class Counts(nn.Module):
    """Writes down in a buffer how often it has run."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 4)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
        self.runs += 1
        return self.embedding(input_ids)


def test_the_models_own_buffers_stay_as_they_are() -> None:
    module = Counts().eval()
    assert way_to_pad(module, *ids_and_mask(), 0) == "plain"
    assert not module.runs
