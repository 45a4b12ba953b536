"""Attention as pictures: what each head looks at in a prompt, and what kind of head each is.

plot_attention(attention_patterns(model, "The Eiffel Tower is in the city of", layers=[2])).write_html("attention.html")
plot_head_scores(head_scores(model)).show()
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from nnterp.errors import UsageError
from nnterp.interventions.attention_patterns import AttentionPatterns
from nnterp.lens_table import cells, marks_legend
from nnterp.pictures.drawing import as_label, check_plotly

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["plot_attention", "plot_head_scores"]

#: Pixels: of a letter of a label, of a cell, and of a map at least and at most.
LETTER, SMALL_LETTER, CELL, SMALLEST, LARGEST = 8, 6, 20, 150, 420
#: Pixels between maps, and what stands above and beside all of them.
BETWEEN, ABOVE, RIGHT = 46, 110, 110
#: Pixels that maps side by side may take; longer tokens are cut in the labels.
WIDEST, LONGEST = 1100, 12
#: More tokens than this have no labels: they stand in the box where one points.
LABELLED = 64
MONOSPACE = "DejaVu Sans Mono, Menlo, Consolas, monospace"
#: Much of attention is faint: colours go with the square root of the probability, and the bar beside them says so.
SHADES = ("#ffffff", "#d7e5f5", "#a6c8e8", "#62a0d2", "#2a72b2", "#0b3c7d")
SCALE = [[(step / (len(SHADES) - 1)) ** 2, shade] for step, shade in enumerate(SHADES)]
#: The size of a cell in the map of scores; of more cells than this numbers have no room, and they are small squares.
ROW, COLUMN, NUMBERED, SMALL = 30, 54, 400, 18
#: A title and the bar of colours take so many pixels, however little there is to show.
NARROWEST, LOWEST = 620, 120
#: What a kind of head does, under its name.
KINDS = {
    "previous": "looks one token back",
    "induction": "looks at the token after an earlier copy",
    "duplicate": "looks at an earlier copy of the token",
}


def plot_attention(patterns: AttentionPatterns, heads: Sequence[int] | None = None, title: str | None = None) -> Figure:
    """A grid with one map for each head: the token that looks from top to bottom, those looked at from left to right.

    >>> from nnterp import StandardizedTransformer
    >>> from nnterp.interventions import attention_patterns
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> figure = plot_attention(attention_patterns(model, "The Eiffel Tower is in the city of", layers=[2]))
    >>> len(figure.data) == model.num_heads
    True

    Where one points, the two tokens are shown, with their positions and the probability. What no head lets a token see,
    such as the tokens after it, is left out.

    Args:
        patterns: the attention of some layers on one prompt.
        heads: which heads of each layer; all if None.
        title: the figure's title, which may be HTML; says what is shown if None.

    Returns:
        A plotly figure, not shown: ``figure.show()``, ``figure.write_html(...)``, ``figure.write_image(...)``.

    Raises:
        UsageError: plotly is not installed, or a layer has no such head.
    """
    check_plotly()
    from plotly.subplots import make_subplots

    count = len(patterns.tokens)
    side = min(max(CELL * count, SMALLEST), LARGEST)
    grid = _grid(patterns, heads, max(1, (WIDEST + BETWEEN) // (side + BETWEEN)))
    columns = max(map(len, grid))
    named = [f"layer {row[i][0]}, head {row[i][1]}" if i < len(row) else "" for row in grid for i in range(columns)]
    figure = make_subplots(
        rows=len(grid),
        cols=columns,
        shared_xaxes="all",
        shared_yaxes="all",
        horizontal_spacing=BETWEEN / (side * columns + BETWEEN * (columns - 1)),
        vertical_spacing=BETWEEN / (side * len(grid) + BETWEEN * (len(grid) - 1)),
        subplot_titles=named,
    )
    names = [f"{as_label(token)} ({position})" for position, token in enumerate(patterns.tokens)]
    for row, entries in enumerate(grid, 1):
        for column, entry in enumerate(entries, 1):
            _draw(figure, (row, column), patterns, entry, names)
    _label(figure, patterns.tokens, names, side)
    size = side * columns + BETWEEN * (columns - 1), side * len(grid) + BETWEEN * (len(grid) - 1)
    room = LETTER * max(cells(text) for text in _labels(patterns.tokens)) if count <= LABELLED else 0
    _lay_out(figure, title or _title(patterns), size, room + 50, "probability")
    return figure


def plot_head_scores(scores: Mapping[str, torch.Tensor], title: str | None = None) -> Figure:
    """One map for each kind of head, layers from top to bottom and heads from left to right.

    >>> from nnterp import StandardizedTransformer
    >>> from nnterp.interventions import head_scores
    >>> figure = plot_head_scores(head_scores(StandardizedTransformer("demo-gpt2")))
    >>> [trace.name for trace in figure.data]
    ['previous', 'induction', 'duplicate']

    Args:
        scores: by kind the scores of all heads, (layer, head), from 0 to 1; NaN where there is none.
        title: the figure's title, which may be HTML; says what is shown if None.

    Returns:
        A plotly figure, not shown.

    Raises:
        UsageError: plotly is not installed, or there are no scores.
    """
    check_plotly()
    from plotly.subplots import make_subplots

    if not scores:
        raise UsageError("scores={} leaves nothing to draw: give what head_scores(model) gives.")
    layers, heads = next(iter(scores.values())).shape
    row, column = (ROW, COLUMN) if layers * heads <= NUMBERED else (SMALL, SMALL)
    wide = max(column * heads, SMALL_LETTER * max(len(KINDS.get(kind, "")) for kind in scores))
    size = wide * len(scores) + BETWEEN * (len(scores) - 1), max(row * layers, LOWEST)
    figure = make_subplots(
        cols=len(scores),
        shared_yaxes=True,
        horizontal_spacing=BETWEEN / size[0],
        subplot_titles=[f"<b>{kind}</b><br><sub>{KINDS.get(kind, '')}</sub>" for kind in scores],
    )
    for place, (kind, values) in enumerate(scores.items(), 1):
        shown = [["" if math.isnan(each) else f"{each:.2f}" for each in row] for row in values.tolist()]
        figure.add_heatmap(
            z=values.tolist(),
            name=kind,
            text=shown,
            texttemplate="%{text}" if row == ROW else None,
            hovertemplate=f"layer %{{y}}, head %{{x}}<br>{kind} %{{z:.3f}}<extra></extra>",
            hoverongaps=False,
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            row=1,
            col=place,
        )
    figure.update_xaxes(title="head", dtick=1, tickangle=0)
    figure.update_yaxes(autorange="reversed", dtick=1)
    figure.update_yaxes(title="layer", col=1)
    _lay_out(figure, title or "Where each head looks in random tokens that are given twice", size, 70, "score")
    return figure


def _grid(patterns: AttentionPatterns, heads: Sequence[int] | None, most: int) -> list[list[tuple[int, int]]]:
    """Layers and heads in the rows in which they are drawn: a layer starts a row, and fills its rows evenly."""
    grid = []
    for layer, values in patterns.probabilities.items():
        wanted = list(range(len(values)) if heads is None else heads)
        if not wanted or not all(0 <= head < len(values) for head in wanted):
            raise UsageError(f"heads={heads!r}: layer {layer} has {len(values)} heads, counted from 0.")
        width = math.ceil(len(wanted) / math.ceil(len(wanted) / most))
        grid += [[(layer, head) for head in wanted[at : at + width]] for at in range(0, len(wanted), width)]
    return grid


def _draw(
    figure: Figure, place: tuple[int, int], patterns: AttentionPatterns, entry: tuple[int, int], names: Sequence[str]
) -> None:
    """One map of the figure, of a layer's head."""
    layer, head = entry
    values, gap = patterns.probabilities[layer], 1 if len(names) <= LABELLED else 0
    figure.add_heatmap(
        # What a token may not see has no share in any head.
        z=values[head].masked_fill((values == 0).all(0), math.nan).tolist(),
        x=names,
        y=names,
        hovertemplate=f"layer {layer}, head {head}<br>%{{y}}<br>looks at %{{x}}<br>%{{z:.3f}}<extra></extra>",
        hoverlabel={"font_family": MONOSPACE, "align": "left"},
        hoverongaps=False,
        coloraxis="coloraxis",
        xgap=gap,
        ygap=gap,
        row=place[0],
        col=place[1],
    )


def _labels(tokens: Sequence[str]) -> list[str]:
    return [as_label(token, LONGEST) for token in tokens]


def _label(figure: Figure, tokens: Sequence[str], names: Sequence[str], side: int) -> None:
    ticks: dict[str, object] = {"showticklabels": False, "ticks": ""}
    if len(tokens) <= LABELLED:
        labels = _labels(tokens)
        size = min(12, side // len(tokens) - 1)
        ticks = {
            "tickvals": list(names),
            "ticktext": labels,
            "tickfont": {"family": MONOSPACE, "size": size},
        }
    figure.update_xaxes(**ticks, type="category", tickangle=-90)
    figure.update_yaxes(**ticks, type="category", autorange="reversed")


def _title(patterns: AttentionPatterns) -> str:
    note = f"<br><sub>down: the token that looks; across: what it looks at; {marks_legend(patterns.tokens)}</sub>"
    layers = ", ".join(map(str, patterns.layers))
    return f"Attention of layer{'s' * (len(patterns.layers) > 1)} {layers}{note}"


def _lay_out(figure: Figure, title: str, size: tuple[int, int], left: int, unit: str) -> None:
    """Size, colours and title; ``size`` is that of all maps together, in pixels."""
    right = max(RIGHT, NARROWEST - size[0] - left)
    figure.update_layout(
        title={"text": title, "x": 0.02, "font_size": 16},
        template="plotly_white",
        plot_bgcolor="#f1f1f1",
        width=size[0] + left + right,
        height=size[1] + ABOVE + left,
        margin={"l": left, "r": right, "t": ABOVE, "b": left},
        coloraxis={
            "colorscale": SCALE,
            "cmin": 0,
            "cmax": 1,
            "colorbar": {"title": unit, "lenmode": "pixels", "len": min(300, size[1]), "y": 1, "yanchor": "top"},
        },
    )
    figure.update_xaxes(showgrid=False, zeroline=False)
    figure.update_yaxes(showgrid=False, zeroline=False)
