"""Figures of lenses hold what was found, the right way round, with tokens that read as they are."""

from __future__ import annotations

import re
import sys
from html import unescape
from typing import Any

import numpy as np
import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.errors import UsageError
from nnterp.interventions import LensResult, lens_tokens, logit_lens
from nnterp.pictures import plot_lens, plot_target_probs

PROMPT = "The Eiffel Tower is in the city of"


@pytest.fixture(scope="module")
def model() -> StandardizedTransformer:
    return StandardizedTransformer("demo-gpt2")


def lens_of(tokens: tuple[str, ...], texts: list[list[list[str]]], positions: tuple[int, ...]) -> LensResult:
    """What a lens would read that finds these tokens, by layer, position and rank."""
    shape = np.shape(texts)
    probs = torch.arange(1, 1 + int(np.prod(shape))).reshape(shape) / 100
    return LensResult(
        prompt="".join(tokens),
        tokens=tokens,
        positions=positions,
        ids=torch.arange(len(tokens)),
        layer_names=tuple(f"layer {layer}" for layer in range(shape[0])),
        top_ids=torch.zeros(shape, dtype=torch.long),
        top_probs=probs,
        top_tokens=tuple(tuple(map(tuple, layer)) for layer in texts),
    )


def test_the_heat_map_is_what_the_lens_read(model: StandardizedTransformer) -> None:
    lens = lens_tokens(model, PROMPT)
    (trace,) = plot_lens(lens).data
    np.testing.assert_allclose(np.array(trace.z, dtype=float), lens.top_probs[..., 0], rtol=1e-6)
    assert (trace.zmin, trace.zmax) == (0, 1)
    assert trace.text[-1][-1] == "␣Paris" and np.shape(trace.text) == (model.num_layers, len(lens.tokens))
    for rank in range(5):
        text, prob = lens.top_tokens[3][2][rank], float(lens.top_probs[3, 2, rank])
        assert f"{prob:.4f}  {text.replace(' ', '␣')}" in trace.customdata[3][2]
    assert trace.customdata[3][2].startswith("layer 3, after ")


def test_the_first_layer_is_on_top_and_the_answer_is_framed() -> None:
    lens = lens_of(("a", " <b>", "\n"), [[[" x"], ["&"], ["é"]], [["p"], ["q" * 20], ["r"]]], (2, 5, 4))
    figure = plot_lens(lens)
    layout, trace = figure.layout, figure.data[0]
    assert layout.yaxis.autorange == "reversed" and list(trace.y) == [0, 1]
    # plotly takes labels for HTML.
    assert list(layout.xaxis.ticktext) == ["a<br>2", "␣&lt;b><br>5", "⏎<br>4"]
    assert [list(row) for row in trace.text] == [["␣x", "&amp;", "é"], ["p", "q" * 15 + "…", "r"]]
    assert "q" * 20 in trace.customdata[1][1]
    # Columns are as wide as what stands in them, and their labels in the middle.
    edges = np.array(trace.x)
    assert len(edges) == 4 and edges[2] - edges[1] > 2 * (edges[1] - edges[0])
    np.testing.assert_allclose(layout.xaxis.tickvals, (edges[1:] + edges[:-1]) / 2)
    (frame,) = layout.shapes
    assert (frame.x0, frame.x1, frame.y0, frame.y1) == (edges[1], edges[2], 0.5, 1.5)
    assert "␣ is a space, ⏎ a line break" in layout.title.text
    assert plot_lens(lens, "mine").layout.title.text.startswith("mine<br>")


def test_a_map_too_large_for_texts_has_colours_alone() -> None:
    row = [["a"]] * 2001
    figure = plot_lens(lens_of(("t",) * 2001, [row, row], tuple(range(2001))))
    assert figure.data[0].texttemplate is None
    assert plot_lens(lens_of(("t",), [[["a"]]], (0,))).data[0].texttemplate == "%{text}"


def test_lines_are_means_with_their_standard_errors(model: StandardizedTransformer) -> None:
    lens = logit_lens(model, [PROMPT, "The capital of Japan is", "The capital of France is"])
    assert isinstance(lens, torch.Tensor)
    probs = lens[..., model.tokenizer.encode(" Paris")[0]]
    band, line = plot_target_probs({" Paris": probs}).data
    values = probs.numpy()
    np.testing.assert_allclose(line.y, values.mean(0), rtol=1e-5)
    assert list(line.x) == list(range(model.num_layers)) and line.name == "␣Paris"
    error = 1.96 * values.std(0, ddof=1) / np.sqrt(3)
    high, low = (values.mean(0) + error).clip(0, 1), (values.mean(0) - error).clip(0, 1)
    np.testing.assert_allclose(band.y, [*high, *low[::-1]], rtol=1e-4, atol=1e-6)
    assert list(band.x) == [*line.x, *line.x[::-1]] and not band.showlegend


def test_targets_of_one_prompt() -> None:
    figure = plot_target_probs(
        {"right": torch.tensor([0.1, 0.9]), "<wrong>": torch.tensor([[0.5, 0.1]])}, layers=[4, 8]
    )
    right, wrong = figure.data
    assert (list(right.x), list(wrong.x)) == ([4, 8], [4, 8])
    np.testing.assert_allclose(wrong.y, [0.5, 0.1])
    assert wrong.name == "&lt;wrong>" and right.line.color != wrong.line.color
    assert "one prompt" in figure.layout.title.text and figure.layout.yaxis.title.text == "probability"


@pytest.mark.parametrize(
    ("probs", "options", "message"),
    [
        ({}, {}, r"of shapes \[\]"),
        ({"a": torch.ones(2), "b": torch.ones(3)}, {}, r"of shapes \[\(1, 2\), \(1, 3\)\]"),
        ({"a": torch.ones(1, 2, 3)}, {}, r"'a' are of shape \(1, 2, 3\)"),
        ({"a": torch.ones(0, 2)}, {}, r"'a' are of shape \(0, 2\)"),
        ({"a": torch.ones(2)}, {"layers": [1]}, "1 layers and probabilities of 2"),
    ],
)
def test_mistakes(probs: dict[str, torch.Tensor], options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plot_target_probs(probs, **options)


def test_dollars_are_no_formula() -> None:
    lens = lens_of(("$x$",), [[["$y$"]]], (0,))
    figure = plot_lens(lens)
    written = [*figure.layout.xaxis.ticktext, figure.data[0].text[0][0], figure.data[0].customdata[0][0]]
    assert not any("$" in text for text in written)
    assert [unescape(text) for text in written[:2]] == ["$x$<br>0", "$y$"]


@pytest.mark.parametrize("title", [None, "<b>one</b><br>a title of a user's own that is longer than " + "that " * 20])
def test_the_title_has_room_over_the_smallest_map(title: str | None) -> None:
    figure = plot_lens(lens_of(("a",), [[["b"]]], (0,)), title)
    shown = max(re.sub("<[^>]*>", "", figure.layout.title.text.replace("<br>", "\n")).split("\n"), key=len)
    assert 6 * len(shown) < figure.layout.width < 9 * len(shown) + 100


def test_a_long_target_leaves_room_for_its_line() -> None:
    (line,) = plot_target_probs({" word" * 20: torch.rand(3)}).data
    assert len(line.name) == 16 and line.hovertemplate.count("word") == 20


def test_without_plotly(model: StandardizedTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    lens = lens_tokens(model, PROMPT)
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setattr("nnterp.pictures.drawing.find_spec", lambda name: None)
    for call in (lambda: plot_lens(lens), lambda: plot_target_probs({"a": torch.ones(2)})):
        with pytest.raises(UsageError, match="pip install 'nnsight-core"):
            call()
