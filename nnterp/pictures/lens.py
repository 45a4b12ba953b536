"""The logit lens as figures: what each layer would say, and how likely it finds some words.

plot_lens(lens_tokens(model, "The Eiffel Tower is in the city of")).write_html("lens.html")
plot_target_probs(run_prompts(model, prompts, get_probs_func=logit_lens)).show()
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import unescape
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from nnterp.errors import UsageError
from nnterp.interventions.logit_lens import LensResult
from nnterp.lens_table import cells, marks_legend
from nnterp.pictures.drawing import as_label, check_plotly

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["plot_lens", "plot_target_probs"]

#: Pixels: of a row, of a letter, and what stands around the figure; above it with tokens over the map, and without.
ROW, LETTER, BELOW, LEFT, RIGHT = 26, 8, 60, 70, 110
OVER_TOKENS, OVER_LINES = 140, 100
#: Pixels of a letter of a title, and of what stands below it.
TITLE_LETTER, BELOW_LETTER, NARROWEST = 8, 6.5, 620
#: Longer tokens are cut in the map, and stand in full where one points at them.
LONGEST = 16
#: So many cells still have room for their texts; a larger map shows its colours alone.
WRITTEN = 4000
MONOSPACE = "DejaVu Sans Mono, Menlo, Consolas, monospace"
#: The standard normal distribution has 95 % of its mass within so many deviations.
WITHIN_95 = 1.96
LENS_TITLE = "Logit lens: the most probable next token if the model stopped after each layer"
TARGETS_TITLE = "Probability of the next token, read after each layer"
LINES_SIZE = (640, 340)
COLOURS = ("#1f6feb", "#e8590c", "#2b8a3e", "#9c36b5", "#c92a2a", "#0b7285", "#5f3dc4", "#664d03")


def plot_lens(lens: LensResult, title: str | None = None) -> Figure:
    """The most probable next token at each layer and position, coloured by its probability; the first layer on top.

    >>> from nnterp import StandardizedTransformer
    >>> from nnterp.interventions import lens_tokens
    >>> figure = plot_lens(lens_tokens(StandardizedTransformer("demo-gpt2"), "The Eiffel Tower is in the city of"))
    >>> figure.data[0].text[-1][-1]      # last layer, last position: the model's own prediction
    '␣Paris'

    Where one points, all tokens are shown that ``lens`` holds. The model's own prediction has a frame.

    Args:
        lens: what the lens read: of all positions, or of some.
        title: the figure's title, which may be HTML; says what is shown if None.

    Returns:
        A plotly figure, not shown: ``figure.show()``, ``figure.write_html(...)``, ``figure.write_image(...)``.

    Raises:
        UsageError: plotly is not installed.
    """
    check_plotly()
    from plotly.graph_objects import Figure

    texts = [[as_label(position[0], LONGEST) for position in layer] for layer in lens.top_tokens]
    names = [as_label(token, LONGEST) for token in lens.tokens]
    edges = _edges([max(map(cells, column)) for column in zip(names, *texts, strict=True)])
    middles = [(left + right) / 2 for left, right in pairwise(edges)]
    layers = len(texts)
    figure = Figure()
    figure.add_heatmap(
        z=lens.top_probs[..., 0].tolist(),
        x=edges,
        y=list(range(layers)),
        text=texts,
        texttemplate="%{text}" if layers * len(names) <= WRITTEN else None,
        textfont={"family": MONOSPACE, "size": 12, "color": "#1a1a1a"},
        customdata=_hovers(lens),
        hovertemplate="%{customdata}<extra></extra>",
        hoverlabel={"font_family": MONOSPACE, "align": "left"},
        colorscale=[[0, "#ffffff"], [1, "#f76707"]],
        zmin=0,
        zmax=1,
        colorbar={"title": "probability", "lenmode": "pixels", "len": max(150, ROW * layers), "tickformat": ".1f"},
        xgap=1,
        ygap=1,
    )
    ticks = [f"{name}<br>{position}" for name, position in zip(names, lens.positions, strict=True)]
    figure.update_xaxes(tickvals=middles, ticktext=ticks, tickfont_family=MONOSPACE, side="top", tickangle=0)
    figure.update_yaxes(tickvals=list(range(layers)), title="layer", autorange="reversed")
    _frame(figure, edges, layers, lens)
    _lay_out(figure, title or LENS_TITLE, _legend(lens), (int(edges[-1]), ROW * layers), OVER_TOKENS)
    return figure


def plot_target_probs(
    probs: Mapping[str, torch.Tensor], title: str | None = None, layers: Sequence[int] | None = None
) -> Figure:
    """The probability of each target after each layer: one line for each, the mean over the prompts.

    >>> from nnterp import StandardizedTransformer
    >>> from nnterp.interventions import logit_lens
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> lens = logit_lens(model, ["The Eiffel Tower is in the city of", "The Louvre is in the city of"])
    >>> words = [" Paris", " London"]
    >>> figure = plot_target_probs({word: lens[..., model.tokenizer.encode(word)[0]] for word in words})
    >>> [line.name for line in figure.data if line.name]
    ['␣Paris', '␣London']

    With several prompts a band reaches 1.96 standard errors to each side: of many prompts, the interval of 95 %
    confidence for the mean.

    Args:
        probs: for each target its probabilities, (prompt, layer), or of one prompt (layer), as ``run_prompts`` gives
            them with the logit lens or a patchscope.
        title: the figure's title, which may be HTML; says what is shown if None.
        layers: the numbers of the layers; from 0 on if None.

    Returns:
        A plotly figure, not shown: ``figure.show()``, ``figure.write_html(...)``, ``figure.write_image(...)``.

    Raises:
        UsageError: plotly is not installed, there is no target, or the numbers do not fit one another.
    """
    check_plotly()
    from plotly.graph_objects import Figure

    values = {name: _by_prompt(name, each) for name, each in probs.items()}
    shapes = {tuple(each.shape) for each in values.values()}
    if len(shapes) != 1:
        raise UsageError(f"The targets' probabilities are of shapes {sorted(shapes)}: give one, the same for all.")
    count, depth = shapes.pop()
    numbers = list(range(depth)) if layers is None else list(layers)
    if len(numbers) != depth:
        raise UsageError(f"There are {len(numbers)} layers and probabilities of {depth}: give as many.")
    figure = Figure()
    for index, (name, each) in enumerate(values.items()):
        _draw_line(figure, name, each, numbers, COLOURS[index % len(COLOURS)])
    figure.update_xaxes(title="layer", zeroline=False, dtick=1 if depth <= 24 else None)
    figure.update_yaxes(title="probability", range=[-0.02, 1.02], zeroline=False)
    what = f"mean of {count} prompts; bands: {WITHIN_95} standard errors" if count > 1 else "of one prompt"
    _lay_out(figure, title or TARGETS_TITLE, what, LINES_SIZE, OVER_LINES)
    return figure


def _by_prompt(name: str, probs: torch.Tensor) -> torch.Tensor:
    """What was given, as (prompt, layer)."""
    values = torch.as_tensor(probs).detach().float().cpu()
    values = values[None] if values.ndim == 1 else values
    if values.ndim != 2 or not values.numel():
        raise UsageError(f"The probabilities of {name!r} are of shape {tuple(probs.shape)}: give (prompt, layer).")
    return values


def _draw_line(figure: Figure, name: str, values: torch.Tensor, layers: list[int], colour: str) -> None:
    mean = values.mean(0)
    if len(values) > 1:
        error = WITHIN_95 * values.std(0) / len(values) ** 0.5
        low, high = (mean - error).clamp(0, 1).tolist(), (mean + error).clamp(0, 1).tolist()
        figure.add_scatter(
            x=[*layers, *layers[::-1]],
            y=[*high, *low[::-1]],
            mode="lines",
            fill="toself",
            fillcolor=colour,
            opacity=0.15,
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
            legendgroup=name,
        )
    figure.add_scatter(
        x=layers,
        y=mean.tolist(),
        # A long name would take the room of the lines.
        name=as_label(name, LONGEST),
        mode="lines+markers",
        line={"color": colour},
        legendgroup=name,
        showlegend=True,
        hovertemplate=f"{as_label(name)}<br>layer %{{x}}<br>probability %{{y:.3f}}<extra></extra>",
    )


def _edges(widths: Sequence[int]) -> list[float]:
    """Where columns of so many letters begin and end, in pixels."""
    edges = [0.0]
    for width in widths:
        edges.append(edges[-1] + LETTER * (max(width, 3) + 1))
    return edges


def _hovers(lens: LensResult) -> list[list[str]]:
    """For each cell where it is, and all tokens that the lens holds for it."""
    names = [as_label(token) for token in lens.tokens]
    return [
        [
            f"{name}, after {names[index]} (position {lens.positions[index]})<br>"
            + "<br>".join(
                f"{prob:.4f}  {as_label(text)}"
                for prob, text in zip(probs[index], lens.top_tokens[layer][index], strict=True)
            )
            for index in range(len(names))
        ]
        for layer, (name, probs) in enumerate(zip(lens.layer_names, lens.top_probs.tolist(), strict=True))
    ]


def _legend(lens: LensResult) -> str:
    shown = [text for layer in lens.top_tokens for position in layer for text in position[:1]]
    marks = marks_legend([*lens.tokens, *shown])
    return f"above: the prompt's tokens and their positions; framed: the model's own answer; {marks}"


def _frame(figure: Figure, edges: list[float], layers: int, lens: LensResult) -> None:
    """A frame around the model's own answer: the last layer at the last of the positions."""
    last = lens.positions.index(max(lens.positions))
    figure.add_shape(
        type="rect",
        x0=edges[last],
        x1=edges[last + 1],
        y0=layers - 1.5,
        y1=layers - 0.5,
        line={"color": "#1c4fb8", "width": 2},
    )


def _lay_out(figure: Figure, title: str, below: str, size: tuple[int, int], above: int) -> None:
    width, height = size
    longest = max(len(unescape(re.sub("<[^>]*>", "", line))) for line in title.split("<br>"))
    least = max(NARROWEST, 40 + TITLE_LETTER * longest, 40 + int(BELOW_LETTER * len(below)))
    figure.update_layout(
        title={
            "text": f"{title}<br><span style='font-size:12px'>{below}</span>",
            "font_size": 16,
            "x": 0,
            "y": 1,
            "xref": "container",
            "yanchor": "top",
            # Below plotly's own buttons.
            "pad": {"l": 20, "t": 40},
        },
        template="plotly_white",
        height=height + above + BELOW,
        width=max(least, width + LEFT + RIGHT),
        margin={"t": above, "b": BELOW, "l": LEFT, "r": RIGHT},
    )
