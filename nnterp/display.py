"""Probabilities of the next token as a picture, and prompts with their targets as a table.

plot_topk_tokens(logit_lens(model, prompts), model.tokenizer).write_html("lens.html")
prompts_to_df(prompts, model.tokenizer)

Both need more than the package asks for: pip install 'nnsight-core[display]'.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nnsight_core import LanguageModel
from nnterp.errors import TopCountError, UsageError
from nnterp.pictures.drawing import as_label, check_plotly
from nnterp.pictures.saving import PAGES, check_figure_file, save_figure
from nnterp.prompt_utils import Prompt
from nnterp.token_text import token_text

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure
    from transformers import PreTrainedTokenizerBase

__all__ = ["plot_topk_tokens", "prompts_to_df"]

#: How many maps stand side by side.
COLUMNS = 3
#: Pixels: of a layer, of a letter, between the maps, around them all.
ROW, LETTER, BETWEEN, ABOVE, BESIDE = 20, 8, 80, 110, 170
#: One scale for all maps, beside the first ones however far down they go.
BAR = {"title": "probability<br> ", "lenmode": "pixels", "len": 300, "y": 1, "yanchor": "top"}
#: Longer tokens are cut in the map, and stand in full where one points at them.
LONGEST = 16
#: So many layers still have a number each.
NUMBERED = 40


def plot_topk_tokens(
    next_token_probs: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase | LanguageModel,
    k: int = 4,
    title: str | None = None,
    use_token_ids: bool = False,
    file: str | Path | None = None,
    save_html: bool = True,
    height: int = 300,
    width: int = 400,
) -> Figure:
    """The most probable next tokens at every layer, one map for each prompt, the first layer on top.

    >>> from nnterp import StandardizedTransformer
    >>> from nnterp.interventions import logit_lens
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> figure = plot_topk_tokens(logit_lens(model, ["The capital of Japan is"]), model.tokenizer)
    >>> figure.data[0].text[-1][0]      # the last layer's first
    '␣Tokyo'

    A row is a layer and a column a rank; the colour is the probability, from 0 to 1, and where one points, the token's
    id and its probability are shown.

    Args:
        next_token_probs: probabilities, (prompt, layer, vocab), or of one prompt (layer, vocab), or (vocab).
        tokenizer: a tokenizer, or a model with its tokenizer.
        k: how many tokens, from 1 to the size of the vocabulary.
        title: the figure's title; says what is shown if None.
        use_token_ids: show the ids of tokens instead of their texts.
        file: where to save the figure: a self-contained page if it ends in ``.html``, else a picture (``.png``,
            ``.svg``, ``.pdf``, ...).
        save_html: beside a picture, save a page of the same name, too.
        height: pixels of a map; more where the layers need it.
        width: pixels of a map; more where the tokens need it.

    Returns:
        A plotly figure, not shown: ``figure.show()`` shows it.

    Raises:
        UsageError: plotly is not installed; or the numbers are no probabilities.
        FigureFileError: the file cannot be written, such as a picture without kaleido; said before the work.
        TopCountError: ``k`` is out of range.
    """
    check_plotly()
    target = None if file is None else check_figure_file(file)
    probs = _probabilities(next_token_probs)
    if not 1 <= k <= probs.shape[-1]:
        raise TopCountError(k, probs.shape[-1])
    top = probs.topk(k)
    texts = {each: _text(tokenizer, each) for each in top.indices.unique().tolist()}
    title = f"The {k} most probable next tokens at each layer" if title is None else title
    figure = _figure(top.values, top.indices, texts, use_token_ids, title, (height, width))
    if target is not None:
        if save_html and target.suffix.lower() not in PAGES:
            save_figure(figure, target.with_suffix(PAGES[0]))
        save_figure(figure, target)
    return figure


def _probabilities(given: Any) -> torch.Tensor:
    """What was given as (prompt, layer, vocab), float32, on the CPU."""
    plain = given.value if hasattr(given, "save") else given
    shape = tuple(getattr(plain, "shape", ()))
    if not isinstance(plain, torch.Tensor) or not 1 <= plain.ndim <= 3 or 0 in shape:
        got = f"of shape {shape}" if isinstance(plain, torch.Tensor) else f"a {type(plain).__name__}"
        raise UsageError(
            f"The probabilities are {got}, and should be (prompt, layer, vocab), (layer, vocab) or (vocab)."
        )
    probs = plain.detach().float().cpu()
    low, high = float(probs.min()), float(probs.max())
    if not (low >= 0 and high <= 1 + 1e-3):
        raise UsageError(
            f"The probabilities are from {low:.3g} to {high:.3g}, and should be from 0 to 1. "
            "Of logits: logits.softmax(-1)."
        )
    return probs[(None,) * (3 - probs.ndim)]


def _text(tokenizer: PreTrainedTokenizerBase | LanguageModel, token: int) -> str:
    return token_text(tokenizer.tokenizer if isinstance(tokenizer, LanguageModel) else tokenizer, token)


def _cells(indices: torch.Tensor, texts: dict[int, str], use_token_ids: bool, flat: bool = False) -> list[Any]:
    """What stands in the cells, by layer and rank, or all in one row."""
    if indices.ndim > 1 and not flat:
        return [_cells(row, texts, use_token_ids) for row in indices]
    return [str(each) if use_token_ids else as_label(texts[each], LONGEST) for each in indices.flatten().tolist()]


def _figure(
    probs: torch.Tensor,
    ids: torch.Tensor,
    texts: dict[int, str],
    use_token_ids: bool,
    title: str,
    least: tuple[int, int],
) -> Figure:
    """All maps, from probabilities and tokens, (prompt, layer, rank)."""
    from plotly.subplots import make_subplots

    prompts, layers, k = ids.shape
    columns = min(COLUMNS, prompts)
    rows = math.ceil(prompts / columns)
    longest = max(len(each) for each in _cells(ids, texts, use_token_ids, flat=True))
    high, wide = max(least[0], ROW * layers), max(least[1], k * LETTER * (longest + 1))
    across, down = columns * wide + (columns - 1) * BETWEEN, rows * high + (rows - 1) * BETWEEN
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=[f"prompt {index}" for index in range(prompts)] if prompts > 1 else None,
        vertical_spacing=BETWEEN / down if rows > 1 else 0,
        horizontal_spacing=BETWEEN / across if columns > 1 else 0,
    )
    for index in range(prompts):
        cells = _cells(ids[index], texts, use_token_ids)
        _draw(figure, (index // columns + 1, index % columns + 1), probs[index], ids[index], cells, texts)
    above = ABOVE if prompts > 1 else ABOVE - LETTER * 4
    figure.update_layout(
        title={"text": title, "x": 0.02, "font_size": 16},
        template="plotly_white",
        height=down + above + BETWEEN,
        width=across + BESIDE,
        margin={"t": above, "b": BETWEEN, "l": 60, "r": BESIDE - 60},
        coloraxis={"colorscale": "Blues", "cmin": 0, "cmax": 1, "colorbar": BAR},
    )
    return figure


def _draw(
    figure: Figure,
    place: tuple[int, int],
    probs: torch.Tensor,
    ids: torch.Tensor,
    cells: Sequence[Sequence[str]],
    texts: dict[int, str],
) -> None:
    """One prompt's map, (layer, rank)."""
    row, col = place
    layers, k = ids.shape
    figure.add_heatmap(
        z=probs.tolist(),
        coloraxis="coloraxis",
        text=cells,
        texttemplate="%{text}",
        customdata=[[[each, as_label(texts[each])] for each in layer] for layer in ids.tolist()],
        hovertemplate="layer %{y}, rank %{x}<br>%{customdata[1]} (id %{customdata[0]})"
        "<br>probability %{z:.4f}<extra></extra>",
        x=list(range(1, k + 1)),
        y=list(range(layers)),
        xgap=1,
        ygap=1,
        row=row,
        col=col,
    )
    figure.update_xaxes(title="rank", dtick=1, showgrid=False, zeroline=False, row=row, col=col)
    step = 1 if layers <= NUMBERED else 5
    figure.update_yaxes(
        title="layer", dtick=step, autorange="reversed", showgrid=False, zeroline=False, row=row, col=col
    )


def prompts_to_df(prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase | LanguageModel | None = None) -> DataFrame:
    """Prompts and their targets as a pandas table: one column for each prompt, one row for each thing that it has.

    >>> from nnterp import StandardizedTransformer
    >>> model = StandardizedTransformer("demo-gpt2")
    >>> table = prompts_to_df([Prompt.from_strings("The capital of Japan is", {"right": "Tokyo"}, model)], model)
    >>> table[0]["prompt"], table[0]["right_string"], table[0]["right_tokens"]
    ('The capital of Japan is', 'Tokyo', ['Tokyo', ' Tokyo'])

    Rows are ``prompt``, and for each target ``NAME_string``, the words that it was made from, where it was, and
    ``NAME_tokens``, the texts of its tokens, where there is a tokenizer. ``.T`` has one row for each prompt.

    Args:
        prompts: the prompts.
        tokenizer: a tokenizer, or a model with its tokenizer.

    Raises:
        UsageError: pandas is not installed.
    """
    if find_spec("pandas") is None:
        raise UsageError("Tables are made with pandas, which is not installed: pip install 'nnsight-core[display]'.")
    from pandas import DataFrame

    columns: dict[int, dict[str, Any]] = {}
    for index, prompt in enumerate(prompts):
        column: dict[str, Any] = {"prompt": prompt.prompt}
        column |= {f"{name}_string": words for name, words in (prompt.target_strings or {}).items()}
        if tokenizer is not None:
            for name, ids in prompt.target_tokens.items():
                column[f"{name}_tokens"] = [_text(tokenizer, each) for each in ids]
        columns[index] = column
    return DataFrame.from_dict(columns)
