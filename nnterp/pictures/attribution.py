"""Direct logit attribution as a waterfall: what each part adds, one below the other, up to the logit.

plot_attribution(logit_attribution(model, "The Eiffel Tower is in the city of", " Paris", against=" Rome")).show()
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

from nnterp.errors import UsageError
from nnterp.interventions.logit_attribution import LogitAttribution
from nnterp.pictures.drawing import check_plotly

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["plot_attribution"]

#: Pixels: of a bar, of a letter of its name, of the map, above and below it.
ROW, LETTER, WIDTH, ABOVE, BELOW = 22, 8, 640, 80, 60
#: Which part of the map is left free on both sides, for the numbers beside the bars.
ROOM = 0.1
TITLE = "What each part adds to the logit, from the first to the last"
UP, DOWN, TOTAL = "#2a72b2", "#e8590c", "#495057"


def plot_attribution(found: LogitAttribution, prompt: int = 0, top: int = 40, title: str | None = None) -> Figure:
    """A bar for each part, which starts where the one above it ends; the last is the logit, or the difference of two.

    >>> from nnterp import StandardizedTransformer
    >>> from nnterp.interventions import logit_attribution
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> figure = plot_attribution(logit_attribution(model, "The Eiffel Tower is in the city of", " Paris"))
    >>> figure.data[0].y[0], figure.data[0].y[-1]
    ('embeddings', 'sum')

    Args:
        found: by part, layer, head or neuron.
        prompt: which of its prompts.
        top: of more parts than this, those that add or take away most are shown, and one bar for all others together.
        title: the figure's title, which may be HTML; says what is shown if None.

    Returns:
        A plotly figure, not shown: ``figure.show()``, ``figure.write_html(...)``, ``figure.write_image(...)``.

    Raises:
        UsageError: plotly is not installed, there is no such prompt, or ``top`` is below 1.
    """
    check_plotly()
    from plotly.graph_objects import Figure

    count = found.scores.shape[1]
    if not -count <= prompt < count or top < 1:
        raise UsageError(
            f"prompt={prompt}, top={top}: there are {count} prompts, counted from 0, and 1 bar is the least."
        )
    scores = found.scores[:, prompt].double()
    shown = sorted(scores.abs().topk(min(top, len(scores))).indices.tolist())
    names, values = [found.names[index] for index in shown], [float(scores[index]) for index in shown]
    others = len(scores) - len(shown)
    if others:
        names.append(f"{others} others together")
        values.append(float(scores.sum()) - sum(values))
    figure = Figure()
    _draw(figure, names, values, float(scores.sum()))
    left = LETTER * max(map(len, names)) + 20
    figure.update_layout(
        title={"text": title or TITLE, "x": 0.02, "font_size": 16},
        template="plotly_white",
        width=WIDTH + left + 60,
        height=ROW * (len(names) + 1) + ABOVE + BELOW,
        margin={"l": left, "r": 60, "t": ABOVE, "b": BELOW},
        waterfallgap=0.25,
        showlegend=False,
    )
    ends = [0.0, *accumulate(values)]
    room = ROOM * (max(ends) - min(ends)) or 1.0
    span = [min(ends) - room, max(ends) + room]
    figure.update_xaxes(title="logit", zeroline=True, zerolinecolor="#adb5bd", range=span)
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category")
    return figure


def _draw(figure: Figure, names: list[str], values: list[float], total: float) -> None:
    """The bars, and below them their sum."""
    figure.add_waterfall(
        orientation="h",
        y=[*names, "sum"],
        x=[*values, total],
        measure=["relative"] * len(names) + ["total"],
        text=[_number(each) for each in values] + [f"{total:.2f}"],
        customdata=[*accumulate(values), total],
        textposition="outside",
        cliponaxis=False,
        increasing={"marker": {"color": UP}},
        decreasing={"marker": {"color": DOWN}},
        totals={"marker": {"color": TOTAL}},
        connector={"line": {"color": "#adb5bd", "width": 1}},
        hovertemplate="%{y}: %{text}<br>up to here %{customdata:.3f}<extra></extra>",
    )


def _number(value: float) -> str:
    """With its sign, and none where there is nothing but rounding."""
    return f"{value:+.2f}" if abs(value) >= 0.005 else "0.00"
