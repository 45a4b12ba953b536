"""Prompts with targets: tokens of words under every kind of tokenizer, and probabilities against the plain model's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nnsight_core.errors import RemoteError
from nnterp import StandardizedTransformer
from nnterp.errors import LayerIndexError, UsageError
from nnterp.interventions import logit_lens
from nnterp.prefix_space import adds_space, without_space
from nnterp.prompt_utils import (
    Prompt,
    TargetError,
    TokenizationError,
    get_first_tokens,
    next_token_probs_unsqueeze,
    run_prompts,
)

TEXTS = ["The Eiffel Tower is in the city of", "The capital of Japan is", "One and one"]
CORPUS = ["The capital of France is Paris.", "London and Paris", "a London bus to Paris", "Paris", "London"] * 9
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def bpe(normalizer: Any = None, pre_tokenizer: Any = None) -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if normalizer is not None:
        made.normalizer = normalizer
    if pre_tokenizer is not None:
        made.pre_tokenizer = pre_tokenizer
    special = ["<unk>", *BYTES]
    made.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def adding_a_space() -> dict[str, PreTrainedTokenizerFast]:
    """Tokenizers that put a space before every text, each in its own way."""
    sentencepiece = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return {
        "always": bpe(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="always", split=False)),
        "first": bpe(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
        "prepended": bpe(normalizer=sentencepiece),
        "bytes": bpe(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    }


def words_in_pieces() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=["[UNK]"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


def pieces(tokenizer: Any, words: str | list[str], **options: Any) -> list[str]:
    found: list[str] = tokenizer.convert_ids_to_tokens(get_first_tokens(words, tokenizer, **options))
    return found


@pytest.mark.parametrize("name", ["always", "first", "prepended", "bytes"])
def test_a_word_is_its_own_where_the_tokenizer_adds_a_space(name: str) -> None:
    tokenizer = adding_a_space()[name]
    found = get_first_tokens("Paris", tokenizer)
    # What follows "London" with a space between, and without, by the tokenizer itself.
    after_space = tokenizer("London Paris")["input_ids"][len(tokenizer("London")["input_ids"])]
    inside = tokenizer("🍐Paris")["input_ids"][len(tokenizer("🍐")["input_ids"])]
    assert get_first_tokens("Paris", without_space(tokenizer)) == found
    assert found == [inside, after_space] and inside != after_space
    assert tokenizer("Paris")["input_ids"][0] == after_space


@pytest.mark.parametrize("name", ["always", "first", "prepended", "bytes"])
def test_a_tokenizer_that_adds_no_space(name: str) -> None:
    tokenizer = adding_a_space()[name]
    made = without_space(tokenizer)
    assert adds_space(tokenizer) and not adds_space(made)
    text = "London Paris"
    assert made(f" {text}")["input_ids"] == tokenizer(text)["input_ids"] and without_space(made) is made


def test_a_tokenizer_that_cannot_be_kept_from_it(demo_gpt2: StandardizedTransformer) -> None:
    class Slow:
        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [0]}

        def decode(self, ids: list[int], **_: Any) -> str:
            return " a"

        def convert_ids_to_tokens(self, token: int) -> str:
            return " a"

    with pytest.raises(UsageError, match="Slow puts a space before every text"):
        without_space(Slow())  # type: ignore[arg-type]
    assert demo_gpt2.add_prefix_false_tokenizer is demo_gpt2.tokenizer


def test_a_word_reads_the_same_within_a_text() -> None:
    tokenizer = bpe(pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False))
    assert pieces(tokenizer, ["Paris", " London", "Paris"]) == ["Paris", "ĠParis", "ĠLondon"]
    assert pieces(tokenizer, "Paris", use_hacky_implementation=True) == ["Paris", "ĠParis"]
    assert pieces(tokenizer, " ") == ["Ġ"]


def test_words_without_spaces() -> None:
    tokenizer = words_in_pieces()
    assert pieces(tokenizer, "Paris") == ["Paris"]
    with pytest.raises(TokenizationError, match=r"'東' cannot be told.*does not know it"):
        get_first_tokens("東", tokenizer)
    with pytest.raises(TokenizationError, match="joins it to the character before"):
        get_first_tokens(",", joined(), use_hacky_implementation=True)


def joined() -> PreTrainedTokenizerFast:
    """A tokenizer that knows the character and what follows it as one token only."""
    made = Tokenizer(models.WordLevel({"<unk>": 0, "🍐,": 1, "🍐": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def test_a_word_without_a_token(demo_gpt2: StandardizedTransformer) -> None:
    with pytest.raises(TokenizationError, match="no token of it"):
        get_first_tokens("", demo_gpt2)
    with pytest.raises(UsageError, match="without a tokenizer"):
        get_first_tokens("a", StandardizedTransformer(demo_gpt2._module))


def prompts(model: StandardizedTransformer) -> list[Prompt]:
    return [Prompt.from_strings(text, {"right": ["Paris", " Tokyo"], "other": "the"}, model) for text in TEXTS]


def plain(model: StandardizedTransformer, text: str) -> torch.Tensor:
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        return model._module(input_ids=ids).logits[0, -1].softmax(-1)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_probabilities_are_the_plain_models(demo_gpt2: StandardizedTransformer, batch_size: int) -> None:
    asked = prompts(demo_gpt2)
    found = run_prompts(demo_gpt2, asked, batch_size)
    assert list(found) == ["right", "other"] and found["right"].shape == (3, 1)
    encode = demo_gpt2.tokenizer.encode
    wanted = {"right": ["Paris", " Paris", " Tokyo"], "other": ["the", " the"]}
    for name, words in wanted.items():
        ids = [encode(word)[0] for word in words]
        sums = torch.stack([plain(demo_gpt2, text)[ids].sum() for text in TEXTS])
        torch.testing.assert_close(found[name][:, 0], sums, atol=1e-6, rtol=1e-4)
    assert found["right"][0] > 0.9 and not found["right"].requires_grad


def test_any_function_that_gives_probabilities(demo_gpt2: StandardizedTransformer) -> None:
    asked = prompts(demo_gpt2)
    lens = run_prompts(demo_gpt2, asked, get_probs_func=logit_lens, tqdm=None)
    assert lens["right"].shape == (3, demo_gpt2.num_layers)
    last = run_prompts(demo_gpt2, asked)["right"][:, 0]
    torch.testing.assert_close(lens["right"][:, -1], last)
    alone = asked[1].run(demo_gpt2, logit_lens)["right"]
    torch.testing.assert_close(alone[0], lens["right"][1], atol=1e-6, rtol=1e-4)

    calls: list[Any] = []

    def own(model: Any, texts: list[str], remote: bool, scale: float) -> torch.Tensor:
        calls.append((texts, remote, scale))
        return next_token_probs_unsqueeze(model, texts, layers=[3]) * scale

    bars: list[Any] = []

    def bar(steps: Any, **options: Any) -> Any:
        bars.append(options)
        return steps

    halved = run_prompts(demo_gpt2, asked, 2, own, {"scale": 0.5}, tqdm=bar)
    torch.testing.assert_close(halved["right"][:, 0], last * 0.5)
    assert calls == [(TEXTS[:2], False, 0.5), (TEXTS[2:], False, 0.5)] and bars == [{"desc": "Running prompts"}]
    assert run_prompts(demo_gpt2, []) == {}


def test_target_probs() -> None:
    probs = torch.tensor([[[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]]])
    prompt = Prompt("a", {"twice": [1, 1], "some": [0, 3]})
    found = prompt.get_target_probs(probs)
    torch.testing.assert_close(found["twice"], torch.tensor([[0.2, 0.3]]))
    torch.testing.assert_close(prompt.get_target_probs(probs, layer=-1)["some"], torch.tensor([0.5]))
    assert prompt.get_target_probs(probs.bfloat16())["some"].dtype == torch.float32
    with pytest.raises(LayerIndexError):
        prompt.get_target_probs(probs, layer=2)
    with pytest.raises(UsageError, match=r"of shape \(1, 4\).*unsqueeze"):
        prompt.get_target_probs(probs[:, 0])
    for wrong in ([], [4], [-1]):
        with pytest.raises(TargetError, match="from 0 to 3"):
            Prompt("a", {"x": wrong}).get_target_probs(probs)


def test_collisions() -> None:
    prompt = Prompt("a", {"cat": [1, 1, 2], "catfish": [2], "dog": [3]})
    assert not prompt.has_no_collisions()
    assert prompt.has_no_collisions("cat") and prompt.has_no_collisions(["catfish", "dog"])
    assert Prompt("a", {"cat": [1, 1]}).has_no_collisions()
    with pytest.raises(TargetError, match=r"no target 'cats'.*Did you mean 'cat'"):
        prompt.has_no_collisions("cats")


def test_targets_by_name(demo_gpt2: StandardizedTransformer) -> None:
    one = Prompt.from_strings("a", "Paris", demo_gpt2.tokenizer)
    assert one.target_tokens == Prompt.from_strings("a", ["Paris"], demo_gpt2).target_tokens
    assert one.target_strings == {"target": "Paris"}
    for empty in ([], "", {"x": []}):
        with pytest.raises(TargetError, match="no word"):
            Prompt.from_strings("a", empty, demo_gpt2)


def test_what_cannot_be_run(demo_gpt2: StandardizedTransformer) -> None:
    asked = prompts(demo_gpt2)
    with pytest.raises(ValueError, match=r"Prompt 0 has the targets \['right', 'other'\], but prompt 1 has \['x'\]"):
        run_prompts(demo_gpt2, [asked[0], Prompt("a", {"x": [1]})])
    with pytest.raises(UsageError, match="batch_size=0"):
        run_prompts(demo_gpt2, asked, 0)
    with pytest.raises(RemoteError):
        run_prompts(demo_gpt2, asked, remote=True)
    with pytest.raises(UsageError, match="with 3 prompts"):
        run_prompts(demo_gpt2, asked, get_probs_func=lambda model, texts, remote: torch.ones(1, 1, 5))
