"""Text, ids, tensors and dicts go in; a padded batch gives what its prompts give alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nnsight_core import EmptyPromptError, LanguageModel, ModelNotFoundError, PromptTooLongError
from nnsight_core.input_errors import InputError
from nnterp.demo_models import demo_model_path
from tests.families import tiny_model
from tests.small_tokenizers import word_tokenizer

FAMILIES = ["gpt2", "llama", "opt", "gemma2"]
IDS = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15, 16]]
TEXTS = [" ".join(f"w{token}" for token in row) for row in IDS]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return LanguageModel(tiny_model(request.param), tokenizer=word_tokenizer())


@pytest.fixture(scope="module")
def gpt2() -> LanguageModel:
    return LanguageModel(tiny_model("gpt2"), tokenizer=word_tokenizer())


def layer(model: LanguageModel, number: int) -> Any:
    module = model._module
    if hasattr(module, "transformer"):
        return model.transformer.h[number]
    return model.model.decoder.layers[number] if hasattr(module.model, "decoder") else model.model.layers[number]


def hidden_of(model: LanguageModel, prompt: Any, number: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad(), model.trace(prompt):
        output = layer(model, number).output
        hidden = (output if isinstance(output, torch.Tensor) else output[0]).save()
        logits = model.output.logits.save()
    return hidden.value, logits.value


def test_a_padded_batch_gives_what_its_prompts_give_alone(model: LanguageModel) -> None:
    together = hidden_of(model, TEXTS)
    for row, text in enumerate(TEXTS):
        alone = hidden_of(model, text)
        for whole, single in zip(together, alone, strict=True):
            length = single.shape[1]
            torch.testing.assert_close(whole[row : row + 1, -length:], single, atol=1e-5, rtol=1e-4)


def test_a_single_prompt_gives_what_the_plain_model_gives(model: LanguageModel) -> None:
    with torch.no_grad():
        expected = model._module(torch.tensor([IDS[0]])).logits
    assert torch.equal(hidden_of(model, TEXTS[0])[1], expected)


def test_every_kind_of_input_gives_the_same(gpt2: LanguageModel) -> None:
    ids = torch.tensor([IDS[0]])
    expected = hidden_of(gpt2, TEXTS[0])[1]
    encoded = gpt2.tokenizer(TEXTS[:1], return_tensors="pt", return_token_type_ids=False)
    for prompt in (IDS[0], [IDS[0]], tuple(IDS[0]), ids, ids[0], {"input_ids": ids}, encoded):
        assert torch.equal(hidden_of(gpt2, prompt)[1], expected)
    with torch.no_grad(), gpt2.trace(input_ids=ids):
        by_name = gpt2.lm_head.output.save()
    assert torch.equal(by_name.value, expected)
    batch = hidden_of(gpt2, TEXTS)[1]
    for prompts in (IDS, [torch.tensor(row) for row in IDS], [TEXTS[0], *IDS[1:]]):
        assert torch.equal(hidden_of(gpt2, prompts)[1], batch)


def test_a_batch_that_is_padded_already(gpt2: LanguageModel) -> None:
    gpt2.tokenizer.padding_side = "left"
    batch = gpt2.tokenizer(TEXTS, return_tensors="pt", padding=True, return_token_type_ids=False)
    given, made = hidden_of(gpt2, batch)[1], hidden_of(gpt2, TEXTS)[1]
    for row, ids in enumerate(IDS):
        assert torch.equal(given[row, -len(ids) :], made[row, -len(ids) :])


def test_the_tokenizer_of_a_model_pads_where_a_trace_takes_it() -> None:
    model = LanguageModel(demo_model_path("demo-llama"))
    assert model.tokenizer is not None
    batch = model.tokenizer(TEXTS, return_tensors="pt", padding=True)
    given, made = hidden_of(model, batch)[1], hidden_of(model, TEXTS)[1]
    assert torch.equal(given[:, -1], made[:, -1])


def test_a_tokenizer_that_is_asked_to_pad_on_the_right_does() -> None:
    model = LanguageModel(demo_model_path("demo-llama"), tokenizer_kwargs={"padding_side": "right"})
    batch = model.tokenizer(TEXTS, return_tensors="pt", padding=True)
    with pytest.raises(InputError, match="padded on the right"), model.trace(batch):
        model.lm_head.output.save()


def test_prompts_are_padded_with_the_tokenizers_padding_token(gpt2: LanguageModel) -> None:
    with torch.no_grad(), gpt2.trace(TEXTS):
        ids = gpt2.input[1]["input_ids"].save()
    assert ids.tolist() == [IDS[0], [0] * 4 + IDS[1], [0] * 2 + IDS[2]]


def test_trace_false_gives_the_models_output(gpt2: LanguageModel) -> None:
    with torch.no_grad():
        output = gpt2.trace(TEXTS[0], trace=False)
    assert torch.equal(output.logits, hidden_of(gpt2, TEXTS[0])[1])


@pytest.mark.parametrize("token", [0, 1, -1, -2, slice(0, 2), slice(-2, None), [0, -1]], ids=str)
def test_a_token_is_counted_in_its_own_prompt(gpt2: LanguageModel, token: Any) -> None:
    with torch.no_grad(), gpt2.trace(TEXTS):
        tokens = gpt2.input[1]["input_ids"].t[token].save()
        hidden = gpt2.transformer.h[0].mlp.output.t[token].save()
    for row, ids in enumerate(IDS):
        assert torch.equal(tokens.value[row], torch.tensor(ids)[token])
        with torch.no_grad(), gpt2.trace([ids]):
            alone = gpt2.transformer.h[0].mlp.output.t[token].save()
        torch.testing.assert_close(hidden.value[row], alone.value[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("way", ["set", "slice", "+=", "method", "view"])
def test_a_token_is_changed_in_its_own_prompt(gpt2: LanguageModel, way: str) -> None:
    def change(value: Any) -> None:
        if way == "set":
            value.t[1] = 0
        elif way == "slice":
            value.t[0:2] = 1
        elif way == "+=":
            value.t[1] += 5
        elif way == "method":
            value.t[1].mul_(3)
        else:
            value.t[[0, 1]].transpose(0, -1)[0].zero_()

    def run(prompts: Any) -> torch.Tensor:
        with torch.no_grad(), gpt2.trace(prompts):
            change(gpt2.transformer.h[0].mlp.output)
            return gpt2.lm_head.output[:, -1].save()

    together = run(IDS)
    for row, ids in enumerate(IDS):
        torch.testing.assert_close(together.value[row], run([ids]).value[0], atol=1e-5, rtol=1e-4)


def test_a_token_that_a_prompt_does_not_have(gpt2: LanguageModel) -> None:
    for tokens in (3, [0, 3]):
        with pytest.raises(IndexError, match=r"is not in every prompt.*\[6, 2, 4\] tokens"), gpt2.trace(TEXTS):
            assert gpt2.transformer.wte.output.t[tokens] is not None
    with pytest.raises(ValueError, match="different number of tokens"), gpt2.trace(TEXTS):
        assert gpt2.transformer.wte.output.t[1:] is not None


def check_refused(model: LanguageModel, prompt: Any, kind: type[InputError], message: str) -> None:
    """The trace is refused with this error, and the next one works."""
    with pytest.raises(kind, match=message), model.trace(prompt):
        pytest.fail("the block was entered")
    assert hidden_of(model, TEXTS[1])[1].shape == (1, 2, 320)


def test_what_cannot_be_run_is_refused(gpt2: LanguageModel) -> None:
    check_refused(gpt2, "", EmptyPromptError, "The prompt is empty")
    check_refused(gpt2, [], EmptyPromptError, "The list of prompts is empty")
    check_refused(gpt2, ["w5", ""], EmptyPromptError, r"Prompt 1 of 2 \(counted from 0\) is empty")
    check_refused(gpt2, torch.zeros(1, 0, dtype=torch.long), EmptyPromptError, "empty")
    check_refused(gpt2, [5] * 129, PromptTooLongError, "has 129 tokens, .* context of 128 positions")
    check_refused(gpt2, 3.5, InputError, "not a float")
    right = {"input_ids": torch.tensor([[5, 6], [7, 0]]), "attention_mask": torch.tensor([[1, 1], [1, 0]])}
    check_refused(gpt2, right, InputError, "padded on the right")
    with pytest.raises(InputError, match="2 inputs by position"), gpt2.trace("w5", "w6"):
        pass


def test_an_empty_prompt_of_ids_is_named(gpt2: LanguageModel) -> None:
    check_refused(gpt2, [[5, 6], []], EmptyPromptError, r"Prompt 1 of 2 \(counted from 0\) is empty")


def test_text_needs_a_tokenizer() -> None:
    bare = LanguageModel(tiny_model("gpt2"))
    check_refused_without = pytest.raises(InputError, match="without a tokenizer")
    with check_refused_without, bare.trace("w5"):
        pass
    assert hidden_of(bare, IDS)[1].shape == (3, 6, 320)


def test_truncation_is_an_option_of_the_tokenizer(gpt2: LanguageModel) -> None:
    options = {"truncation": True, "max_length": 4}
    with torch.no_grad(), gpt2.trace(TEXTS[0], invoker_args=options):
        logits = gpt2.lm_head.output.save()
    assert torch.equal(logits.value, hidden_of(gpt2, IDS[0][:4])[1])


def test_a_folder_without_a_model(tmp_path: Any) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        LanguageModel(tmp_path)
    with pytest.raises(ModelNotFoundError, match="no such folder"):
        LanguageModel(tmp_path / "nothing")
