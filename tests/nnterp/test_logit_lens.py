"""The logit lens against plain hooks on the plain model."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from nnsight_core.errors import RemoteError
from nnsight_core.input_errors import EmptyPromptError, InputError, PromptTooLongError
from nnterp import StandardizedTransformer
from nnterp.errors import PositionError, TopCountError, UsageError
from nnterp.interventions import lens_tokens, logit_lens, logit_lens_topk
from nnterp.interventions.logit_lens import BATCH_SIZE
from tests.families import tiny_model
from tests.small_tokenizers import byte_tokenizer

#: The module, whose name in its package is that of the function.
MODULE = sys.modules["nnterp.interventions.logit_lens"]
PROMPTS = ["The Eiffel Tower", "ab", "in the city of Paris"]


class Names(NamedTuple):
    """A family's layers, and the norm between the last of them and the unembedding."""

    layers: str
    norm: str


FAMILIES = {
    "gpt2": Names("transformer.h", "transformer.ln_f"),
    "gpt_neox": Names("gpt_neox.layers", "gpt_neox.final_layer_norm"),
    "llama": Names("model.layers", "model.norm"),
    "gemma2": Names("model.layers", "model.norm"),
    "opt": Names("model.decoder.layers", "model.decoder.final_layer_norm"),
    "phi": Names("model.layers", "model.final_layernorm"),
}


def piece_tokenizer() -> PreTrainedTokenizerFast:
    """Pieces as SentencePiece has them: a space is part of a token, and what is unknown is written in bytes."""
    pieces = ["<unk>", "\u2581Paris", "\u2581in", "\u2581\u2581", "x", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(
        models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[Names, StandardizedTransformer, PreTrainedModel]:
    plain = tiny_model(request.param)
    return FAMILIES[request.param], StandardizedTransformer(plain, tokenizer=byte_tokenizer()), plain


@pytest.fixture(scope="module")
def gpt2() -> StandardizedTransformer:
    return StandardizedTransformer(tiny_model("gpt2"), tokenizer=byte_tokenizer())


def by_hand(names: Names, plain: PreTrainedModel, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The lens' logits (layer, position, vocab) and the model's own (position, vocab), with plain hooks."""
    outputs: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: Any, output: Any) -> None:
        outputs.append(output if isinstance(output, torch.Tensor) else output[0])

    layers = plain.get_submodule(names.layers)
    handles = [layer.register_forward_hook(keep) for layer in layers.children()]
    try:
        with torch.no_grad():
            own = plain(input_ids=torch.tensor([ids])).logits[0]
            unembed = torch.nn.Sequential(plain.get_submodule(names.norm), plain.get_output_embeddings())
            logits = torch.cat([unembed(hidden) for hidden in outputs])
    finally:
        for handle in handles:
            handle.remove()
    cap = getattr(plain.config, "final_logit_softcapping", None)
    return (logits if cap is None else cap * torch.tanh(logits / cap)), own


def test_probabilities_are_those_of_plain_hooks(family: Any) -> None:
    names, model, plain = family
    found = [logit_lens(model, prompt) for prompt in PROMPTS]
    for prompt, probs in zip(PROMPTS, found, strict=True):
        logits, own = by_hand(names, plain, model.tokenizer(prompt)["input_ids"])
        assert probs.shape == (1, model.num_layers, model.vocab_size)
        torch.testing.assert_close(probs[0], logits[:, -1].softmax(-1), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(probs[0, -1], own[-1].softmax(-1), rtol=1e-5, atol=1e-7)
    # A short prompt gives the same beside a long one.
    torch.testing.assert_close(logit_lens(model, PROMPTS), torch.cat(found), rtol=1e-4, atol=1e-6)


def test_negated_logits(family: Any) -> None:
    names, model, plain = family
    probs, inverse = logit_lens(model, PROMPTS[0], return_inv_logits=True)
    logits, _ = by_hand(names, plain, model.tokenizer(PROMPTS[0])["input_ids"])
    assert torch.equal(probs, logit_lens(model, PROMPTS[0]))
    torch.testing.assert_close(inverse[0], (-logits[:, -1]).softmax(-1), rtol=1e-5, atol=1e-7)


def test_top_tokens_are_those_of_plain_hooks_to_the_bit(family: Any) -> None:
    names, model, plain = family
    lens = lens_tokens(model, PROMPTS[0], k=3)
    logits, own = by_hand(names, plain, lens.ids.tolist())
    top = logits.softmax(-1).topk(3)
    assert torch.equal(lens.top_ids, top.indices) and torch.equal(lens.top_probs, top.values)
    # The last layer is the model's own prediction.
    assert torch.equal(lens.top_probs[-1], own.softmax(-1).topk(3).values)
    assert lens.top_probs.shape == (model.num_layers, len(lens.tokens), 3)
    assert lens.layer_names == tuple(f"layer {layer}" for layer in range(model.num_layers))
    assert "".join(lens.tokens) == lens.prompt == PROMPTS[0]
    for ids, texts in zip(lens.top_ids.flatten(0, 1), [row for layer in lens.top_tokens for row in layer], strict=True):
        assert len(texts) == 3
        # The tokenizer has 256 tokens; the model has more.
        assert all((text == f"#{token}") == (token >= 256) for token, text in zip(ids.tolist(), texts, strict=True))


def test_results_are_float32_on_the_cpu_and_hold_no_gradients() -> None:
    model = StandardizedTransformer(tiny_model("llama").bfloat16(), tokenizer=byte_tokenizer())
    probs, lens = logit_lens(model, PROMPTS), lens_tokens(model, PROMPTS[0])
    for tensor in (probs, lens.top_probs):
        assert tensor.dtype == torch.float32 and tensor.device.type == "cpu" and not tensor.requires_grad
    torch.testing.assert_close(probs.sum(-1), torch.ones(3, model.num_layers))


def test_many_prompts_are_read_in_batches(gpt2: StandardizedTransformer, bars: list[tuple[str, str, int]]) -> None:
    prompts = [f"number {index}" for index in range(BATCH_SIZE + 3)]
    probs, inverse = logit_lens(gpt2, prompts, return_inv_logits=True)
    assert probs.shape == inverse.shape == (len(prompts), gpt2.num_layers, gpt2.vocab_size)
    assert bars == [("logit lens", "batch", 2)]
    torch.testing.assert_close(probs[-1], logit_lens(gpt2, prompts[-1])[0], rtol=1e-4, atol=1e-6)
    logit_lens(gpt2, prompts[:BATCH_SIZE])
    assert bars[1:] == [("logit lens", "batch", 0)] * 2


def test_texts_of_tokens(gpt2: StandardizedTransformer) -> None:
    assert lens_tokens(gpt2, " é\n").tokens == (" ", "<0xC3>", "<0xA9>", "\n")
    llama = StandardizedTransformer(tiny_model("llama"), tokenizer=piece_tokenizer())
    ids = [1, 2, 3, 4, 5 + 0xE2, 5 + 0x41, 300]
    assert _texts_of(llama, ids) == (" Paris", " in", "  ", "x", "<0xE2>", "A", "#300")
    without = StandardizedTransformer(tiny_model("llama"))
    assert _texts_of(without, [7]) == ("#7",)


def _texts_of(model: StandardizedTransformer, ids: list[int]) -> tuple[str, ...]:
    return lens_tokens(model, ids).tokens  # type: ignore[arg-type]  # ids go where text goes, as in model.trace


def test_mistakes(gpt2: StandardizedTransformer) -> None:
    with pytest.raises(RemoteError, match="Leave remote out"):
        logit_lens(gpt2, "text", remote=True)
    with pytest.raises(UsageError, match="0 prompts were given"):
        logit_lens(gpt2, [])
    for nothing in ("", ["a", ""]):
        with pytest.raises(EmptyPromptError):
            logit_lens(gpt2, nothing)
    with pytest.raises(PromptTooLongError, match="129 tokens"):
        lens_tokens(gpt2, "a" * 129)
    for k in (0, -1, gpt2.vocab_size + 1):
        with pytest.raises(TopCountError, match=f"1 to {gpt2.vocab_size}"):
            lens_tokens(gpt2, "text", k=k)
    with pytest.raises(InputError, match=r"from number 32 on.*Prompt 1 of 2") as caught:
        logit_lens(gpt2, ["a"] * (BATCH_SIZE + 1) + [""])
    assert isinstance(caught.value.__cause__, EmptyPromptError)


def test_all_positions_are_those_of_plain_hooks(family: Any) -> None:
    names, model, plain = family
    probs, inverse = logit_lens(model, PROMPTS, return_inv_logits=True, all_positions=True)
    ids = [model.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    longest = max(map(len, ids))
    assert probs.shape == inverse.shape == (len(PROMPTS), model.num_layers, longest, model.vocab_size)
    for row, tokens in enumerate(ids):
        logits, _ = by_hand(names, plain, tokens)
        torch.testing.assert_close(probs[row, :, longest - len(tokens) :], logits.softmax(-1), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            inverse[row, :, longest - len(tokens) :], (-logits).softmax(-1), rtol=1e-4, atol=1e-6
        )
        assert probs[row, :, : longest - len(tokens)].isnan().all()
    torch.testing.assert_close(probs[:, :, -1], logit_lens(model, PROMPTS))


@pytest.mark.parametrize("all_positions", [False, True])
def test_top_tokens_of_many_prompts(
    gpt2: StandardizedTransformer, all_positions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Batches whose longest prompts differ, and pieces of a few positions.
    monkeypatch.setattr(MODULE, "BATCH_SIZE", 2)
    prompts = [*PROMPTS, "a", "The"]
    whole = logit_lens(gpt2, prompts, all_positions=all_positions)
    assert isinstance(whole, torch.Tensor)
    monkeypatch.setattr(MODULE, "LOGITS_AT_ONCE", 2 * 3 * gpt2.vocab_size)
    top = logit_lens_topk(gpt2, prompts, k=4, all_positions=all_positions)
    assert top.probs.shape == top.ids.shape == (*whole.shape[:-1], 4)
    nothing = whole[..., 0].isnan()
    assert nothing.any() == all_positions
    assert (top.ids[nothing] == -1).all() and top.probs[nothing].isnan().all()
    torch.testing.assert_close(top.probs[~nothing], whole[~nothing].topk(4).values, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(top.probs[~nothing], whole[~nothing].gather(-1, top.ids[~nothing]), rtol=1e-5, atol=1e-7)


def test_no_more_logits_are_held_than_allowed(gpt2: StandardizedTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "LOGITS_AT_ONCE", 5 * gpt2.vocab_size)
    project, seen = gpt2.project_on_vocab, []

    def counted(hidden: torch.Tensor) -> Any:
        seen.append(hidden.shape[:-1].numel())
        return project(hidden)

    whole = lens_tokens(gpt2, "a" * 23)
    monkeypatch.setattr(gpt2, "project_on_vocab", counted)
    seen.clear()
    piecewise = lens_tokens(gpt2, "a" * 23)
    assert seen == [5, 5, 5, 5, 3] * gpt2.num_layers
    torch.testing.assert_close(piecewise.top_probs, whole.top_probs)


def test_some_positions(gpt2: StandardizedTransformer) -> None:
    whole, some = lens_tokens(gpt2, PROMPTS[0]), lens_tokens(gpt2, PROMPTS[0], positions=[-1, 2])
    last = len(whole.tokens) - 1
    assert whole.positions == tuple(range(last + 1)) and some.positions == (last, 2)
    assert some.tokens == (whole.tokens[last], whole.tokens[2]) and some.ids.tolist() == whole.ids[[last, 2]].tolist()
    torch.testing.assert_close(some.top_probs, whole.top_probs[:, [last, 2]])
    for wrong, fact in (([last + 1], f"Position {last + 1} is not there: the prompt has"), ([], "leaves no position")):
        with pytest.raises(PositionError, match=fact):
            lens_tokens(gpt2, PROMPTS[0], positions=wrong)
