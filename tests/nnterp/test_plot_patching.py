"""Patching maps hold what was found, the right way round, with tokens that read as they are."""

from __future__ import annotations

import sys
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.command_line import main
from nnterp.errors import UsageError
from nnterp.interventions import PatchingResult, SweepResult, activation_patching, logit_difference
from nnterp.pictures import plot_patching
from tests.nnterp.test_activation_patching import CLEAN, CORRUPTED


def result(**values: torch.Tensor) -> PatchingResult:
    axes = {"layers_output": ("layer", "position"), "mlps_output": ("layer",), "heads": ("layer", "head")}
    return PatchingResult(
        values,
        {kind: axes[kind] for kind in values},
        before=torch.tensor([-1.0, -3.0]),
        layers=(0, 3),
        positions=(0, 1, 2),
        tokens=("a", " <b>", "\n"),
        clean=torch.tensor([2.0, 2.0]),
        clean_tokens=("a", " c", "\n"),
    )


def test_the_numbers_stand_where_they_belong() -> None:
    values = torch.tensor([[[1.0, 2, 3], [4, float("nan"), 6]], [[1.0, 2, 3], [4, float("nan"), 8]]])
    figure = plot_patching(result(layers_output=values))
    (trace,) = figure.data
    drawn = np.array(trace.z, dtype=float)
    np.testing.assert_allclose(drawn, [[0.75, 1, 1.25], [1.5, np.nan, 2.25]])
    assert trace.customdata[1][2][0] == 3 and figure.layout.yaxis.autorange == "reversed"
    assert list(figure.layout.yaxis.ticktext) == ["0", "3"]
    assert list(figure.layout.xaxis.ticktext) == ["a<br>0", "␣&lt;b><br>1<br>(␣c)", "⏎<br>2"]
    assert figure.layout.coloraxis.cmax == -figure.layout.coloraxis.cmin == 2.25
    assert "corrupted -2.00, clean 2.00" in figure.layout.title.text
    change = plot_patching(result(layers_output=values), relative=False)
    np.testing.assert_allclose(np.array(change.data[0].z, dtype=float), drawn * 4)


def test_other_axes() -> None:
    found = result(mlps_output=torch.ones(2, 2), heads=torch.ones(2, 2, 4))
    figure = plot_patching(found)
    assert [np.shape(trace.z) for trace in figure.data] == [(2, 1), (2, 4)]
    assert list(figure.layout.xaxis2.ticktext) == ["0", "1", "2", "3"]
    assert len(plot_patching(found, "heads", title="mine").data) == 1
    ablated = SweepResult(
        {"mlps_output": torch.ones(1, 2)}, {"mlps_output": ("layer",)}, torch.zeros(1), (0, 1), (0,), ("a",)
    )
    assert "Change of the metric, which is 0.00" in plot_patching(ablated).layout.title.text
    cube = SweepResult(
        {"k": torch.ones(1, 2, 3, 4)}, {"k": ("layer", "head", "position")}, torch.zeros(1), (0, 1), (0,), ("a",)
    )
    with pytest.raises(UsageError, match="by layer and head and position"):
        plot_patching(cube)
    with pytest.raises(UsageError, match="has no sites 'queries'"):
        plot_patching(found, "queries")


def test_a_real_one_is_of_itself_alone(demo_gpt2: StandardizedTransformer) -> None:
    found = activation_patching(demo_gpt2, CLEAN, CORRUPTED, logit_difference(demo_gpt2, " Mary", " John"))
    figure = plot_patching(found)
    assert len(figure.data) == 3
    np.testing.assert_allclose(figure.data[1].z, found.recovered("attentions_output").numpy(), atol=1e-6)
    page = figure.to_html(include_plotlyjs=False)
    assert "␣Mary" in page or "\\u2423Mary" in page


def test_without_plotly_it_is_said_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(UsageError, match=r"pip install 'nnsight-core\[display\]'"):
        plot_patching(result(mlps_output=torch.ones(2, 2)))
    # Before anything is loaded: there is no such model.
    words = ["--answers", " a", " b", "--model", "no-such-model", "--html", str(tmp_path / "maps.html")]
    assert main(["patch", "a", "b", *words]) == 2
    assert "pip install" in capsys.readouterr().err


def test_a_single_site_and_long_tokens_have_room() -> None:
    tokens = (" word" * 8, "$a$")
    result = PatchingResult(
        values={"mlps_output": torch.tensor([[[0.5, 1.0]]])},
        axes={"mlps_output": ("layer", "position")},
        before=torch.zeros(1),
        layers=(3,),
        positions=(0, 1),
        tokens=tokens,
        clean=torch.ones(1),
        clean_tokens=(tokens[0], "$b$"),
    )
    figure = plot_patching(result)
    first, second = figure.layout.xaxis.ticktext
    assert len(first.removesuffix("<br>0")) == 16 and unescape(second) == "$a$<br>1<br>($b$)"
    assert figure.data[0].customdata[0][0][1].count("word") == 8
    assert figure.layout.coloraxis.colorbar.len >= 100 and figure.layout.coloraxis.colorbar.lenmode == "pixels"
