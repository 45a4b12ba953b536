"""Patching maps: layers against positions, or heads, coloured by what each site changes.

plot_patching(activation_patching(model, clean, corrupted, metric)).write_html("patching.html")
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import unescape
from typing import TYPE_CHECKING

import torch

from nnterp.errors import UsageError
from nnterp.interventions.activation_patching import PatchingResult
from nnterp.interventions.sweep import SweepResult
from nnterp.lens_table import cells
from nnterp.pictures.drawing import as_label, check_plotly

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["plot_patching"]

#: Pixels: of a row and a column of cells, of what stands around a map, and of the whole.
ROW, COLUMN, BETWEEN, AROUND = 26, 62, 100, 190
#: Pixels of a letter in a label, and how wide a column may become for its label.
LETTER, WIDEST = 7, 130
#: A title and the bar of colours take so many pixels, however little there is to show.
NARROWEST, LOWEST = 620, 120
#: Longer tokens are cut under the map, and stand in full where one points.
LONGEST = 16
#: So many cells in a map still have room for their numbers.
NUMBERED = 400


def plot_patching(
    result: SweepResult, sites: str | Sequence[str] | None = None, title: str | None = None, relative: bool = True
) -> Figure:
    """One map for each kind of site, the first layer on top; red recovers, blue does harm, grey is not there.

    >>> from nnterp import StandardizedTransformer
    >>> from nnterp.interventions import activation_patching, logit_difference
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> clean = "John and Mary went to the store. John handed the milk to"
    >>> corrupted = "John and Mary went to the store. Mary handed the milk to"
    >>> result = activation_patching(model, clean, corrupted, logit_difference(model, " Mary", " John"))
    >>> figure = plot_patching(result)
    >>> len(figure.data)
    3

    Args:
        result: what a sweep found: of activation, attribution or path patching, or of an ablation.
        sites: which of its kinds of sites; all if None.
        title: the figure's title; says what the numbers are if None.
        relative: of patching the part of the metric that is recovered, 0 as corrupted and 1 as clean, instead of the
            metric's change. An ablation has the change alone.

    Returns:
        A plotly figure, not shown: ``figure.show()``, ``figure.write_html(...)``, ``figure.write_image(...)``.

    Raises:
        UsageError: plotly is not installed, or the result has no such sites, or has them by head and position together,
            which no map can show.
    """
    check_plotly()
    from plotly.subplots import make_subplots

    kinds = list(result.values) if sites is None else [sites] if isinstance(sites, str) else list(sites)
    is_part = relative and isinstance(result, PatchingResult)
    maps = [_map(result, kind, is_part) for kind in kinds]
    rows = len(result.layers)
    total = max(ROW * rows * len(kinds), LOWEST) + BETWEEN * (len(kinds) - 1)
    figure = make_subplots(
        rows=len(kinds),
        cols=1,
        subplot_titles=[_name(kind) for kind in kinds],
        vertical_spacing=BETWEEN / total if len(kinds) > 1 else 0,
    )
    largest = max(float(each.abs().nan_to_num().max()) for each in maps) or 1.0
    unit = "recovered" if is_part else "change"
    for row, (kind, values) in enumerate(zip(kinds, maps, strict=True), 1):
        _draw(figure, row, result, kind, values, unit)
    figure.update_xaxes(row=len(kinds), col=1, title=_columns(result, kinds[-1])[1])
    width = max(_width(_columns(result, kind)[0]) for kind in kinds)
    _lay_out(figure, total, width, largest, unit, _title(result, title, is_part))
    return figure


def _draw(figure: Figure, row: int, result: SweepResult, kind: str, values: torch.Tensor, unit: str) -> None:
    """One map of the figure, (layer, column)."""
    labels = _columns(result, kind)[0]
    names = [label.replace("<br>", " ") for label in _columns(result, kind, None)[0]]
    figure.add_heatmap(
        z=values.tolist(),
        coloraxis="coloraxis",
        text=_numbers(values),
        texttemplate="%{text}",
        textfont_size=11,
        customdata=[[[layer, name] for name in names] for layer in result.layers],
        hovertemplate=f"layer %{{customdata[0]}}<br>%{{customdata[1]}}<br>{unit} %{{z:.3f}}<extra></extra>",
        xgap=1,
        ygap=1,
        row=row,
        col=1,
    )
    figure.update_yaxes(autorange="reversed", row=row, col=1, title="layer", **_ticks(map(str, result.layers)))
    figure.update_xaxes(row=row, col=1, **_ticks(labels))


def _lay_out(figure: Figure, height: int, width: int, largest: float, unit: str, title: str) -> None:
    figure.update_layout(
        title={"text": title, "x": 0.02, "font_size": 16},
        template="plotly_white",
        plot_bgcolor="#d9d9d9",
        height=height + AROUND,
        width=max(NARROWEST, width + AROUND),
        margin={"t": 90, "b": 80},
        coloraxis={
            "colorscale": "RdBu_r",
            "cmin": -largest,
            "cmax": largest,
            "colorbar": {"title": unit, "lenmode": "pixels", "len": min(300, height), "y": 1, "yanchor": "top"},
        },
    )
    figure.update_xaxes(showgrid=False, zeroline=False, tickangle=0)
    figure.update_yaxes(showgrid=False, zeroline=False)


def _map(result: SweepResult, kind: str, is_part: bool) -> torch.Tensor:
    """What is drawn, (layer, column)."""
    values = result.recovered(kind) if is_part and isinstance(result, PatchingResult) else result.effect(kind)
    if values.ndim > 2:
        raise UsageError(
            f"{kind} was changed by {' and '.join(result.axes[kind])}, and a map has two axes: "
            "give each_position=False for a map of heads, or draw result.effect(...) for one head."
        )
    return values if values.ndim == 2 else values[:, None]


def _columns(result: SweepResult, kind: str, longest: int | None = LONGEST) -> tuple[list[str], str]:
    """The labels of the columns, their tokens cut to so many characters, and what they are."""
    if result.axes[kind][-1] == "layer":
        return ["all positions together"], ""
    if result.axes[kind][-1] == "head":
        return [str(head) for head in range(result.values[kind].shape[-1])], "head"
    clean = result.clean_tokens if isinstance(result, PatchingResult) else result.tokens
    labels = []
    for position in result.positions:
        here, there = result.tokens[position], clean[position]
        mark = "" if here == there else f"<br>({as_label(there, longest)})"
        labels.append(f"{as_label(here, longest)}<br>{position}{mark}")
    return labels, "token and position; in brackets the token of the clean prompt, where it differs"


def _ticks(labels: Iterable[str]) -> dict[str, object]:
    texts = list(labels)
    return {"tickvals": list(range(len(texts))), "ticktext": texts}


def _width(labels: Sequence[str]) -> int:
    """Pixels of a map whose columns have room for their labels."""
    longest = max(cells(unescape(line)) for label in labels for line in label.split("<br>"))
    return len(labels) * max(COLUMN, min(LETTER * longest + LETTER, WIDEST))


def _numbers(values: torch.Tensor) -> list[list[str]]:
    """What stands in the cells: where nothing changed, nothing, so that the eye finds what did."""
    show = values.numel() <= NUMBERED
    return [[f"{each:.2f}" if show and abs(each) >= 0.005 else "" for each in row] for row in values.tolist()]


def _name(kind: str) -> str:
    return kind.replace("_", " ")


def _title(result: SweepResult, title: str | None, is_part: bool) -> str:
    if title is not None:
        return title
    before = float(result.before.mean())
    if not isinstance(result, PatchingResult):
        return f"Change of the metric, which is {before:.2f} as the model is"
    what = "Part of the metric that is recovered" if is_part else "Change of the metric"
    return f"{what} by one patch: corrupted {before:.2f}, clean {float(result.clean.mean()):.2f}"
