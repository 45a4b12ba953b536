"""Patterns of attention against the eager model, and pictures that hold them the right way round."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from nnterp import StandardizedTransformer
from nnterp.demo_models import demo_model_path
from nnterp.errors import LayerIndexError, MissingPartError, PositionError, UsageError
from nnterp.interventions import LogitAttribution, attention_patterns, head_scores, logit_attribution
from nnterp.interventions.attention_patterns import AttentionPatterns
from nnterp.pictures import plot_attention, plot_attribution, plot_head_scores
from tests.matrix.models import Case

PROMPT = "The Eiffel Tower is in the city of"


@pytest.mark.parametrize("name", ["demo-gpt2", "demo-llama"])
def test_patterns_are_those_of_the_eager_model(name: str) -> None:
    model = StandardizedTransformer(name)
    found = attention_patterns(model, PROMPT)
    eager = AutoModelForCausalLM.from_pretrained(demo_model_path(name), attn_implementation="eager")
    with torch.no_grad():
        expected = eager(model.tokenizer(PROMPT, return_tensors="pt").input_ids, output_attentions=True).attentions
    assert found.layers == tuple(range(model.num_layers)) and found.tokens[-1] == " of"
    for layer, looks in enumerate(expected):
        assert torch.allclose(found.probabilities[layer], looks[0], atol=1e-5)
    part = attention_patterns(model, model.tokenizer(PROMPT).input_ids, [-1, 0])
    assert part.layers == (0, model.num_layers - 1)
    assert torch.equal(part.probabilities[0], found.probabilities[0])
    key, share = found.most(1, 2)[-1]
    assert share == float(found.probabilities[1][2, -1].max()) == float(found.probabilities[1][2, -1, key])


def test_what_cannot_be_says_so(demo_gpt2: StandardizedTransformer) -> None:
    with pytest.raises(LayerIndexError):
        attention_patterns(demo_gpt2, PROMPT, [6])
    jamba = Case("jamba")
    there = [layer for layer in range(jamba.num_layers) if jamba.place("attentions", layer, "output")]
    assert attention_patterns(jamba.model, [5, 6, 7]).layers == tuple(there)
    with pytest.raises(MissingPartError, match="attention_probabilities"):
        attention_patterns(jamba.model, [5, 6, 7], [next(each for each in range(9) if each not in there)])
    found = attention_patterns(demo_gpt2, PROMPT, [2])
    with pytest.raises(PositionError, match="Layer 1 is not among these"):
        found.most(1, 0)
    with pytest.raises(PositionError, match="none is 4"):
        found.most(2, 4)
    with pytest.raises(UsageError, match=r"heads=\[4\]: layer 2 has 4 heads"):
        plot_attention(found, heads=[4])


def patterns(heads: int, tokens: tuple[str, ...] = ("a", " <b>", "\n")) -> AttentionPatterns:
    count = len(tokens)
    looks = torch.rand(2, heads, count, count, generator=torch.Generator().manual_seed(0)).tril()
    looks = looks / looks.sum(-1, keepdim=True)
    return AttentionPatterns(tokens, {1: looks[0], 4: looks[1]})


def test_a_query_is_a_row_and_a_key_a_column() -> None:
    found = patterns(3)
    figure = plot_attention(found)
    assert [note.text for note in figure.layout.annotations] == [
        f"layer {layer}, head {head}" for layer in (1, 4) for head in range(3)
    ]
    for index, trace in enumerate(figure.data):
        drawn = np.array(trace.z, dtype=float)
        expected = found.probabilities[1 if index < 3 else 4][index % 3].numpy()
        np.testing.assert_allclose(drawn[np.tril_indices(3)], expected[np.tril_indices(3)])
        assert np.isnan(drawn[np.triu_indices(3, 1)]).all()
        assert list(trace.x) == list(trace.y) == ["a (0)", "␣&lt;b> (1)", "⏎ (2)"]
    assert figure.layout.yaxis.autorange == "reversed"
    assert list(figure.layout.xaxis.ticktext) == list(figure.layout.yaxis.ticktext) == ["a", "␣&lt;b>", "⏎"]
    assert figure.layout.coloraxis.cmin == 0 and figure.layout.coloraxis.cmax == 1


def test_the_maps_of_a_layer_fill_their_rows_evenly_within_the_width_of_a_screen() -> None:
    figure = plot_attention(AttentionPatterns(("a", "b"), {3: torch.ones(8, 2, 2)}))
    assert [note.text for note in figure.layout.annotations] == [f"layer 3, head {head}" for head in range(8)]
    assert figure.data[3].yaxis != figure.data[4].yaxis and figure.data[0].xaxis != figure.data[3].xaxis
    assert figure.layout.width < 1400
    wide = plot_attention(patterns(4, tuple(map(str, range(60)))), heads=[3, 0])
    assert wide.layout.width < 1400 and len(wide.data) == 4
    assert [note.text for note in wide.layout.annotations][:2] == ["layer 1, head 3", "layer 1, head 0"]
    assert wide.layout.xaxis.showticklabels is False


def test_scores_stand_by_layer_and_head(demo_gpt2: StandardizedTransformer) -> None:
    scores = head_scores(demo_gpt2, 6, 2)
    scores["previous"][3] = float("nan")
    figure = plot_head_scores(scores)
    assert [trace.name for trace in figure.data] == ["previous", "induction", "duplicate"]
    for trace, values in zip(figure.data, scores.values(), strict=True):
        np.testing.assert_allclose(np.array(trace.z, dtype=float), values.numpy())
    assert list(figure.data[0].text[3]) == [""] * 4 and figure.layout.yaxis.autorange == "reversed"
    with pytest.raises(UsageError, match="leaves nothing to draw"):
        plot_head_scores({})


def test_scores_of_any_size_stay_readable() -> None:
    large = plot_head_scores(dict.fromkeys(("previous", "induction", "duplicate"), torch.rand(40, 32)))
    # 32 heads have a label each, numbers would need a map three times as wide.
    assert large.layout.width < 2200 and large.layout.height < 1000 and large.data[0].texttemplate is None
    assert large.layout.xaxis.dtick == 1 and large.data[0].z[39][31] is not None
    small = plot_head_scores({"previous": torch.rand(1, 1)})
    assert small.layout.width >= 8 * len(small.layout.title.text) and small.data[0].texttemplate == "%{text}"
    assert small.layout.coloraxis.colorbar.len >= 100


def test_a_waterfall_ends_at_the_logit(demo_gpt2: StandardizedTransformer) -> None:
    found = logit_attribution(demo_gpt2, [PROMPT, "The capital of Japan is"], " Paris", by="layer")
    (bars,) = plot_attribution(found, prompt=1).data
    assert list(bars.y) == [*found.names, "sum"]
    np.testing.assert_allclose(bars.x, [*found.scores[:, 1].tolist(), float(found.logits[1])], atol=1e-5)
    assert list(bars.measure) == ["relative"] * len(found.names) + ["total"]
    np.testing.assert_allclose(bars.customdata[-2:], float(found.logits[1]), atol=1e-5)


def test_of_many_parts_the_largest_are_shown() -> None:
    found = LogitAttribution(("a", "b", "c", "d"), torch.tensor([[0.1], [-3.0], [0.2], [2.0]]))
    (bars,) = plot_attribution(found, top=2).data
    assert list(bars.y) == ["b", "d", "2 others together", "sum"]
    np.testing.assert_allclose(bars.x, [-3, 2, 0.3, -0.7], atol=1e-6)
    assert bars.text[0] == "-3.00" and bars.text[-1] == "-0.70"
    # The number beside a bar stands inside the map, clear of the names.
    low, high = plot_attribution(found, top=2).layout.xaxis.range
    assert low < -3 - 0.25 and high > 0.25
    with pytest.raises(UsageError, match="there are 1 prompts"):
        plot_attribution(found, prompt=1)
