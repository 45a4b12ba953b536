"""Figures and tables of probabilities and prompts hold what was given, in the right place, and read well."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.display import plot_topk_tokens, prompts_to_df
from nnterp.errors import TopCountError, UsageError
from nnterp.interventions import logit_lens
from nnterp.pictures import FigureFileError
from nnterp.prompt_utils import Prompt

PROMPTS = ["The Eiffel Tower is in the city of", "The capital of Japan is", "One and one", "Mary"]


def test_cells_are_the_most_probable_tokens(demo_gpt2: StandardizedTransformer) -> None:
    probs = logit_lens(demo_gpt2, PROMPTS)
    assert isinstance(probs, torch.Tensor)
    figure = plot_topk_tokens(probs, demo_gpt2.tokenizer, k=3)
    assert len(figure.data) == 4 and figure.layout.coloraxis.cmin == 0 and figure.layout.coloraxis.cmax == 1
    assert [each.text for each in figure.layout.annotations] == [f"prompt {index}" for index in range(4)]
    for index, trace in enumerate(figure.data):
        order = np.argsort(-probs[index].numpy(), axis=-1)[:, :3]
        np.testing.assert_allclose(np.array(trace.z), np.take_along_axis(probs[index].numpy(), order, -1))
        assert np.array(trace.customdata)[..., 0].astype(int).tolist() == order.tolist()
        assert list(trace.x) == [1, 2, 3] and list(trace.y) == list(range(demo_gpt2.num_layers))
    assert figure.data[0].text[-1][0] == "␣Paris" and figure.layout.yaxis.autorange == "reversed"
    assert figure.layout.width > 3 * 400 and figure.layout.height > 2 * 300
    ids = plot_topk_tokens(probs[0], demo_gpt2, use_token_ids=True, title="mine")
    assert ids.data[0].text[-1][0] == str(int(probs[0, -1].argmax())) and ids.layout.title.text == "mine"
    one = plot_topk_tokens(probs[0, -1], demo_gpt2, k=1)
    assert list(one.data[0].text[0]) == ["␣Paris"] and not one.layout.annotations


def test_many_layers_and_long_tokens_have_room() -> None:
    class Tokens:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "<b>&" if ids[0] else "a" * 30

        def convert_ids_to_tokens(self, token: int) -> str:
            return self.decode([token])

    figure = plot_topk_tokens(torch.full((100, 2), 0.5), Tokens(), k=2)  # type: ignore[arg-type]
    assert {text for row in figure.data[0].text for text in row} == {"&lt;b>&amp;", "a" * 15 + "…"}
    assert "a" * 30 in np.array(figure.data[0].customdata)
    assert figure.layout.height > 100 * 20 and figure.layout.yaxis.dtick == 5


def test_files(demo_gpt2: StandardizedTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probs = torch.full((1, 4), 0.25)
    page = tmp_path / "own.html"
    plot_topk_tokens(probs, demo_gpt2, file=page, save_html=False)
    assert "cdn" not in page.read_text(encoding="utf-8")[:300] and page.stat().st_size > 10**6
    monkeypatch.setattr("nnterp.pictures.saving.find_spec", lambda name: None)
    for name, fact in (("own.png", "kaleido is not installed"), ("own", "its name has no ending")):
        # Before the numbers are looked at.
        with pytest.raises(FigureFileError, match=fact):
            plot_topk_tokens("no numbers", demo_gpt2, file=str(tmp_path / name))  # type: ignore[arg-type]
    from plotly.graph_objects import Figure

    saved: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr("nnterp.pictures.saving.find_spec", lambda name: name)
    monkeypatch.setattr(Figure, "to_image", lambda *_, **__: b"")
    monkeypatch.setattr(Figure, "write_image", lambda self, path, **how: saved.append((path.name, how)))
    plot_topk_tokens(probs, demo_gpt2, file=tmp_path / "a.png")
    plot_topk_tokens(probs, demo_gpt2, file=tmp_path / "b.png", save_html=False)
    assert saved == [("a.png", {"scale": 2}), ("b.png", {"scale": 2})]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "own.html"]


@pytest.mark.parametrize(
    ("probs", "match"),
    [
        (torch.tensor([[0.5, -3.0]]), "from -3 to 0.5.*softmax"),
        (torch.tensor([0.5, float("nan")]), "from nan to nan"),
        (torch.ones(1, 1, 1, 2), r"of shape \(1, 1, 1, 2\)"),
        (torch.ones(0, 2, 3), r"of shape \(0, 2, 3\)"),
        ([0.5, 0.5], "a list"),
    ],
)
def test_what_is_no_probability(demo_gpt2: StandardizedTransformer, probs: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        plot_topk_tokens(probs, demo_gpt2)


def test_how_many(demo_gpt2: StandardizedTransformer) -> None:
    for k in (0, 3):
        with pytest.raises(TopCountError):
            plot_topk_tokens(torch.tensor([0.5, 0.5]), demo_gpt2, k=k)


def test_prompts_as_a_table(demo_gpt2: StandardizedTransformer) -> None:
    made = Prompt.from_strings("The city is", {"right": ["Paris"], "wrong": "London"}, demo_gpt2)
    bare = Prompt("It is", {"right": [1], "wrong": [2]})
    table = prompts_to_df([made, bare], demo_gpt2.tokenizer)
    assert list(table.columns) == [0, 1]
    assert list(table.index) == ["prompt", "right_string", "wrong_string", "right_tokens", "wrong_tokens"]
    assert table[0]["right_string"] == ["Paris"] and table[0]["wrong_string"] == "London"
    assert table[0]["right_tokens"] == ["Paris", " Paris"] and table.T["prompt"].tolist() == ["The city is", "It is"]
    assert table[1].isna().tolist() == [False, True, True, False, False]
    assert list(prompts_to_df([made]).index) == ["prompt", "right_string", "wrong_string"]


def test_what_is_not_installed(demo_gpt2: StandardizedTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("plotly", "pandas"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UsageError, match=r"pip install 'nnsight-core\[display\]'"):
        plot_topk_tokens(torch.ones(1), demo_gpt2)
    with pytest.raises(UsageError, match=r"pip install 'nnsight-core\[display\]'"):
        prompts_to_df([])
