"""Patchscopes against plain hooks on the plain model, one prompt and one layer at a time and without padding."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch

from nnsight_core.errors import RemoteError
from nnterp import StandardizedTransformer
from nnterp.errors import LayerIndexError, MissingPartError, PositionError, UsageError
from nnterp.interventions import (
    TargetPrompt,
    TargetPromptBatch,
    TargetPromptError,
    logit_lens,
    patch_object_attn_lens,
    patchscope_generate,
    patchscope_lens,
    repeat_prompt,
)
from nnterp.nnsight_utils import get_token_activations
from tests.matrix import hooks
from tests.matrix.models import Case
from tests.small_tokenizers import byte_tokenizer

#: A place in the plain model, a token's index in its own prompt, and what is put there.
Change = tuple[hooks.Place, int, torch.Tensor]

SOURCES = ["The Eiffel Tower", "ab"]
TARGETS = [TargetPrompt("in the city", 3), TargetPrompt("of x y", -2)]
#: Sequential and parallel blocks, norms before and after, biases, soft-capping, experts, latent attention, hybrids.
FAMILIES = ("llama", "gpt_neox", "gemma2", "falcon", "opt", "mixtral", "deepseek_v3", "qwen3_next")


class Opened:
    """A family of the matrix that reads text, byte by byte."""

    def __init__(self, model_type: str) -> None:
        self.case = Case(model_type)
        self.plain = self.case.module
        self.model = StandardizedTransformer(self.plain, tokenizer=byte_tokenizer())

    def ids(self, text: str) -> torch.Tensor:
        return torch.tensor([self.model.tokenizer(text)["input_ids"]])

    def last(self, place: hooks.Place, text: str) -> torch.Tensor:
        return hooks.read(self.plain, [place], self.ids(text))[place][0, -1]

    def attention(self, layer: int) -> hooks.Place | None:
        return self.case.place("attentions", layer, "input")

    def next_probs(self, text: str, changes: list[Change]) -> torch.Tensor:
        with put(self.plain, changes):
            return hooks.logits(self.plain, self.ids(text))[0, -1].softmax(-1)


def put(plain: torch.nn.Module, changes: list[Change]) -> ExitStack:
    """While it lasts, the plain model has other values at some tokens, in each module's first call."""
    stack = ExitStack()
    for place, index, vector in changes:

        def see(value: Any, index: int = index, vector: torch.Tensor = vector) -> Any:
            tensor = hooks.first(value).clone()
            tensor[0, index] = vector
            return hooks.with_first(value, tensor)

        stack.enter_context(hooks.hooked(plain, place, see))
    return stack


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Opened:
    return Opened(request.param)


@pytest.fixture(scope="module")
def llama() -> Opened:
    return Opened("llama")


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def lens_by_hand(opened: Opened, into: dict[int, int]) -> torch.Tensor:
    """(source, layer, vocab): the output of each key's layer in the source, put after the value's in the target."""
    return torch.stack(
        [
            torch.stack(
                [
                    opened.next_probs(
                        target.prompt,
                        [
                            (
                                opened.case.layer(there),
                                target.index_to_patch,
                                opened.last(opened.case.layer(here), source),
                            )
                        ],
                    )
                    for here, there in into.items()
                ]
            )
            for source, target in zip(SOURCES, TARGETS, strict=True)
        ]
    )


def test_the_lens_is_that_of_plain_hooks(family: Opened) -> None:
    expected = lens_by_hand(family, {layer: layer for layer in range(family.case.num_layers)})
    found = patchscope_lens(family.model, SOURCES, TARGETS)
    assert found.dtype == torch.float32 and not found.requires_grad
    close(found, expected)
    # A batch more or less makes no difference, and what was read before is as good as what is read now.
    close(patchscope_lens(family.model, SOURCES, TARGETS, batch_size=3), expected)
    latents = get_token_activations(family.model, SOURCES)
    close(patchscope_lens(family.model, target_patch_prompts=TARGETS, latents=latents), expected)
    assert torch.equal(hooks.logits(family.plain, family.case.ids), family.case.logits)


def test_the_attention_lens_is_that_of_plain_hooks(family: Opened) -> None:
    places = [family.attention(layer) for layer in range(family.case.num_layers)]
    assert any(places)
    targets = [target.prompt for target in TARGETS]

    def expected(sources: list[str], size: int, index: int) -> torch.Tensor:
        rows = []
        for source, target in zip(sources, targets, strict=True):
            for start in range(len(places)):
                window = [place for place in places[start : start + size] if place is not None]
                changes = [(place, index, family.last(place, source)) for place in window]
                rows.append(family.next_probs(target, changes))
        return torch.stack(rows).unflatten(0, (len(targets), len(places)))

    close(patch_object_attn_lens(family.model, SOURCES, targets, 2, num_patches=2), expected(SOURCES, 2, 2))
    # One source for all targets, windows that reach to the end, and a token counted from there.
    close(patch_object_attn_lens(family.model, SOURCES[1], targets, -3, batch_size=4), expected(SOURCES[1:] * 2, 5, -3))


def test_what_is_written_is_what_plain_hooks_make_generate_write(family: Opened) -> None:
    target = TARGETS[0]
    found = patchscope_generate(family.model, SOURCES, target, max_length=3, do_sample=False, max_batch_size=4)
    assert list(found) == list(range(family.case.num_layers))
    for layer, written in found.items():
        place = family.case.layer(layer)
        for row, source in zip(written, SOURCES, strict=True):
            with put(family.plain, [(place, target.index_to_patch, family.last(place, source))]), torch.no_grad():
                expected = family.plain.generate(family.ids(target.prompt), max_new_tokens=3, do_sample=False)
            assert row[: expected.shape[1]].tolist() == expected[0].tolist()
            assert row.shape[0] <= family.ids(target.prompt).shape[1] + 3


@pytest.mark.parametrize("name", ["demo-gpt2", "demo-llama"])
def test_the_last_layer_at_the_last_token_is_the_logit_lens(name: str) -> None:
    model = StandardizedTransformer(name)
    prompts = ["The Eiffel Tower is in the city of", "The capital of Japan is"]
    found, lens = patchscope_lens(model, prompts, layers=-1), logit_lens(model, prompts)
    assert isinstance(lens, torch.Tensor)
    close(found[:, 0], lens[:, -1])
    # The prompt of repetitions says what earlier layers hold.
    probs = patchscope_lens(model, prompts, layers=range(3, model.num_layers))
    assert [model.token_text(int(token)) for token in probs[:, 0].argmax(-1)] == [" Paris", " Tokyo"]


def test_layers_are_those_that_were_asked_for(llama: Opened) -> None:
    whole = patchscope_lens(llama.model, SOURCES, TARGETS)
    close(patchscope_lens(llama.model, SOURCES, TARGETS, layers=[2, 0]), whole[:, [2, 0]])
    close(patchscope_lens(llama.model, SOURCES, TARGETS, layers=-2), whole[:, [1]])
    crossed = lens_by_hand(llama, {0: 2, 2: 1})
    close(patchscope_lens(llama.model, SOURCES, TARGETS, layers=[0, 2], target_layers=[2, 1]), crossed)
    into_one = torch.stack([lens_by_hand(llama, {here: 1})[:, 0] for here in (0, 1, 2)], 1)
    close(patchscope_lens(llama.model, SOURCES, TARGETS, target_layers=1), into_one)
    # Of latents for all layers those of the layers asked for are taken, and not the first ones.
    latents = get_token_activations(llama.model, SOURCES)
    close(patchscope_lens(llama.model, None, TARGETS, layers=[2], latents=latents), whole[:, [2]])
    close(patchscope_lens(llama.model, None, TARGETS, layers=[2], latents=list(latents)), whole[:, [2]])
    close(patchscope_lens(llama.model, None, TARGETS, layers=[2], latents=latents[2:]), whole[:, [2]])
    written = patchscope_generate(llama.model, SOURCES, TARGETS[0], 2, layers=[2, -1, 0], do_sample=False)
    every = patchscope_generate(llama.model, SOURCES, TARGETS[0], 2, do_sample=False)
    assert list(written) == [2, 0] and all(torch.equal(written[layer], every[layer]) for layer in written)


def test_one_target_for_all_and_many_batches(llama: Opened, bars: list[tuple[str, str, int]]) -> None:
    apart = [patchscope_lens(llama.model, source, TARGETS[0])[0] for source in SOURCES]
    assert bars == [("patchscope", "batch", 0)] * len(SOURCES)
    for target in (TARGETS[0], [TARGETS[0]] * 2, TargetPromptBatch.from_target_prompt(TARGETS[0], 2)):
        close(patchscope_lens(llama.model, SOURCES, target, batch_size=2), torch.stack(apart))
    assert bars[len(SOURCES) :] == [("patchscope", "batch", -(-len(SOURCES) * llama.model.num_layers // 2))] * 3
    close(patchscope_lens(llama.model, SOURCES), patchscope_lens(llama.model, SOURCES, repeat_prompt()))


def test_a_text_that_ends_sooner_is_filled_up(llama: Opened) -> None:
    written = patchscope_generate(llama.model, SOURCES, TARGETS[0], 4, layers=[0], do_sample=False)[0]
    # The first token that one of the texts goes on with ends texts from now on.
    length = llama.ids(TARGETS[0].prompt).shape[1]
    ends = int(written[0, length])
    assert ends not in written[1, length:].tolist()
    found = patchscope_generate(
        llama.model, SOURCES, TARGETS[0], 4, layers=[0], max_batch_size=1, eos_token_id=ends, pad_token_id=7
    )[0]
    assert found[1].tolist() == written[1].tolist()
    assert found[0].tolist() == [*written[0, : length + 1].tolist(), 7, 7, 7]


def test_mistakes(llama: Opened) -> None:
    model, latents = llama.model, get_token_activations(llama.model, SOURCES)
    with pytest.raises(RemoteError):
        patchscope_lens(model, "a", remote=True)
    with pytest.raises(RemoteError):
        patchscope_generate(model, "a", TARGETS[0], remote=True)
    for given in ({}, {"source_prompts": "a", "latents": latents}):
        with pytest.raises(TargetPromptError, match="source_prompts or latents, and not both"):
            patchscope_lens(model, **given)
    with pytest.raises(TargetPromptError, match="There are 1 sources and 2 target prompts"):
        patchscope_lens(model, "a", TARGETS)
    with pytest.raises(TargetPromptError, match="2 target_layers and 3 layers"):
        patchscope_lens(model, "a", target_layers=[0, 1])
    with pytest.raises(TargetPromptError, match=r"\(2, 2, 64\), and there are 1 layers"):
        patchscope_lens(model, latents=latents[:2], layers=0)
    with pytest.raises(TargetPromptError, match="have to be the same"):
        patchscope_lens(model, latents=[latents[0], latents[1][:1]])
    with pytest.raises(TargetPromptError, match=r"A latent is of shape \(5,\).*layers_output\[0\]\n?.*\(64,\)"):
        patchscope_lens(model, latents=latents[..., :5])
    for index in (4, -5):
        with pytest.raises(PositionError, match=f"Token {index} of 'four' is not there: it has 4 tokens"):
            patchscope_lens(model, ["a", "b"], [TargetPrompt("a longer one", 0), TargetPrompt("four", index)])
    with pytest.raises(LayerIndexError):
        patchscope_lens(model, "a", layers=3)
    with pytest.raises(UsageError, match="leaves no layer"):
        patchscope_lens(model, "a", layers=[])
    with pytest.raises(UsageError, match="A batch of 0 is none"):
        patchscope_lens(model, latents=latents, batch_size=0)
    with pytest.raises(TargetPromptError, match="2 source and 1 target prompts"):
        patch_object_attn_lens(model, SOURCES, "a", 0)
    with pytest.raises(UsageError, match="num_patches=0"):
        patch_object_attn_lens(model, "a", "a", 0, num_patches=0)
    with pytest.raises(UsageError, match="num_return_sequences"):
        patchscope_generate(model, "a", TARGETS[0], 1, do_sample=True, num_return_sequences=2)
    with pytest.raises(MissingPartError, match="state-space"):
        patch_object_attn_lens(Opened("mamba").model, "a", "a", 0)


def test_positions_that_are_not_those_of_tokens(llama: Opened) -> None:
    """ProphetNet's layers hand on the streams that predict behind the prompt's own, in one axis."""
    model = Opened("prophetnet").model
    given = get_token_activations(llama.model, ["a"])
    for call in (
        lambda: patchscope_lens(model, "abc", TARGETS[0]),
        lambda: patchscope_lens(model, target_patch_prompts=TARGETS[0], latents=given),
        lambda: patchscope_generate(model, "abc", TARGETS[0], 1),
        lambda: patch_object_attn_lens(model, "abc", "def", 0),
    ):
        with pytest.raises(UsageError, match=r"\[0\] has \d+ positions for \d+ tokens"):
            call()
