"""Scores of heads, on patterns made by hand and against the attentions of the plain model in eager mode."""

from __future__ import annotations

import copy

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from nnsight_core.input_errors import InputError
from nnterp import StandardizedTransformer
from nnterp.demo_models import demo_model_path
from nnterp.errors import CannotError, MissingPartError, UsageError
from nnterp.interventions import find_heads, head_scores
from nnterp.interventions.head_scores import KINDS, looking_scores, repeated_tokens
from tests.matrix.models import Case


@pytest.mark.parametrize("start", [0, 1, 3])
def test_a_pattern_made_by_hand_scores_one_for_its_kind_and_nothing_else(start: int) -> None:
    length = 5
    end = start + 2 * length
    looks = torch.zeros(2, 4, end, end)
    looks[:, :, :, 0] = 1
    ids = torch.cat([torch.arange(90, 90 + start), torch.arange(length), torch.arange(length)]).tolist()
    for query in range(start, end):
        earlier = next((key for key in range(start, query) if ids[key] == ids[query]), None)
        targets = {0: query - 1 if query > start else None}
        if earlier is not None:
            targets |= {1: earlier + 1, 2: earlier}
        for head, key in targets.items():
            if key is not None:
                looks[:, head, query] = torch.eye(end)[key]
    scores = looking_scores(looks, start)
    # The fourth head rests on the first token, which the first copy's first token may be.
    expected = {"previous": (1, 0, 0, 0), "induction": (0, 1, 0, 0), "duplicate": (0, 0, 1, 0)}
    for kind in KINDS:
        assert scores[kind].shape == (2, 4)
        found = scores[kind][0].tolist()
        assert found.index(max(found)) == expected[kind].index(1) and max(found) == 1
        resting = [value for head, value in enumerate(found) if head != expected[kind].index(1)]
        assert max(resting) <= 1 / length + 1e-6


@pytest.mark.parametrize("name", ["demo-gpt2", "demo-llama"])
def test_scores_are_those_of_the_attentions_that_the_eager_model_gives(name: str) -> None:
    model = StandardizedTransformer(name)
    length, sequences = 7, 3
    scores = head_scores(model, length, sequences, seed=5, batch_size=2)
    ids, start = repeated_tokens(model, length, sequences, seed=5)
    assert start == 0 and torch.equal(ids[:, :length], ids[:, length:])
    assert all(len(set(row.tolist())) == length for row in ids) and not torch.equal(ids[0], ids[1])
    eager = AutoModelForCausalLM.from_pretrained(demo_model_path(name), attn_implementation="eager")
    with torch.no_grad():
        attentions = eager(ids, output_attentions=True).attentions
    for layer, looks in enumerate(attentions):
        for head in range(model.num_heads):
            one = looks[:, head].double()
            both, second = range(1, 2 * length), range(length, 2 * length)
            expected = {
                "previous": sum(one[:, query, query - 1].mean() for query in both) / (2 * length - 1),
                "induction": sum(one[:, query, query - length + 1].mean() for query in second) / length,
                "duplicate": sum(one[:, query, query - length].mean() for query in second) / length,
            }
            for kind in KINDS:
                assert abs(float(scores[kind][layer, head]) - float(expected[kind])) < 1e-5


def test_the_best_heads_are_found(demo_llama: StandardizedTransformer) -> None:
    scores = head_scores(demo_llama)["previous"]
    found = find_heads(demo_llama, "previous", top_k=3)
    assert [each.score for each in found] == scores.flatten().sort(descending=True).values[:3].tolist()
    assert all(float(scores[each.layer, each.head]) == each.score for each in found)
    above = find_heads(demo_llama, "previous", threshold=0.3)
    assert {(each.layer, each.head) for each in above} == {*map(tuple, (scores >= 0.3).nonzero().tolist())}
    assert find_heads(demo_llama, "previous", threshold=0.3, top_k=1) == above[:1]
    assert find_heads(demo_llama, "induction", threshold=0.99) == []
    # The same seed draws the same tokens, and another one others.
    assert torch.equal(head_scores(demo_llama)["previous"], scores)
    assert not torch.equal(head_scores(demo_llama, seed=1)["previous"], scores)


def test_what_the_tokenizer_puts_before_a_text_is_before_the_copies(demo_llama: StandardizedTransformer) -> None:
    tokenizer = copy.deepcopy(demo_llama.tokenizer)
    first = tokenizer.all_special_tokens[0]
    ending = (first, tokenizer.convert_tokens_to_ids(first))
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{first} $A {first}", special_tokens=[ending])
    model = StandardizedTransformer(demo_llama._module, tokenizer=tokenizer)
    ids, start = repeated_tokens(model, 4, 2)
    assert start == 1 and ids.shape == (2, 9) and (ids[:, 0] == ending[1]).all()
    assert torch.equal(ids[:, 1:5], ids[:, 5:]) and not (ids[:, 1:] == ending[1]).any()
    plain, nothing_before = repeated_tokens(demo_llama, 4, 2)
    assert nothing_before == 0 and torch.equal(plain, ids[:, 1:])


def test_layers_without_attention_have_no_score() -> None:
    jamba = Case("jamba")
    scores = head_scores(jamba.model, 5, 2)
    for layer in range(jamba.num_layers):
        missing = jamba.place("attentions", layer, "output") is None
        assert scores["induction"][layer].isnan().all() == missing
    assert all(each.score == each.score for each in find_heads(jamba.model, "duplicate", 0.0, length=5))


def test_what_cannot_be_says_so(demo_gpt2: StandardizedTransformer) -> None:
    with pytest.raises(UsageError, match="Did you mean 'induction'"):
        find_heads(demo_gpt2, "inductive")
    with pytest.raises(UsageError, match="top_k=0"):
        find_heads(demo_gpt2, "induction", top_k=0)
    with pytest.raises(UsageError, match="8 sequences of 1 different tokens"):
        head_scores(demo_gpt2, 1)
    with pytest.raises(UsageError, match="batch_size=0"):
        head_scores(demo_gpt2, batch_size=0)
    with pytest.raises(InputError, match="positions"):
        head_scores(demo_gpt2, 100)
    with pytest.raises(MissingPartError, match="attention_probabilities"):
        head_scores(Case("falcon_mamba").model, 5)
    with pytest.raises(CannotError, match="runs twice"):
        head_scores(Case("diffllama").model, 5)
