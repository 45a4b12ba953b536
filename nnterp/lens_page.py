"""The logit lens as a heat map: one HTML file that opens offline in any browser.

page = lens_page(lens_tokens(model, "The Eiffel Tower is in the city of"), "demo-llama")
Path("lens.html").write_text(page, encoding="utf-8")

One row for each layer, the first layer on top, and one column for each token of the prompt; what it looks like and how
it moves is in lens_page.html beside this file.
"""

from __future__ import annotations

from functools import lru_cache
from html import escape
from importlib.resources import files
from string import Template

from nnterp.interventions.logit_lens import LensResult
from nnterp.lens_table import marks_legend, visible

__all__ = ["lens_page"]

#: How many positions stand side by side on paper.
PAPER_COLUMNS = 12


def lens_page(lens: LensResult, model: str) -> str:
    """A page with the top token of each layer and position, coloured by its probability.

    Pointing at a cell, or going to it by keyboard, shows all tokens that ``lens`` holds for it.

    >>> from nnterp import StandardizedTransformer
    >>> from nnterp.interventions import lens_tokens
    >>> lens = lens_tokens(StandardizedTransformer("demo-gpt2"), "The Eiffel Tower is in the city of")
    >>> "␣Paris" in lens_page(lens, "demo-gpt2")
    True

    Args:
        lens: what the lens read.
        model: what to call the model.
    """
    positions = len(lens.tokens)
    paper = [
        _table(lens, range(start, min(start + PAPER_COLUMNS, positions)), on_paper=True)
        for start in range(0, positions, PAPER_COLUMNS)
    ]
    shown = [text for layer in lens.top_tokens for position in layer for text in position]
    return _template().substitute(
        title=_text(f"{model}: {lens.prompt}"),
        model=_text(model),
        prompt=_text(lens.prompt),
        k=lens.top_ids.shape[-1],
        marks=_text(marks_legend([*lens.tokens, *shown])),
        map=_table(lens, range(positions)),
        paper="\n".join(paper),
    )


@lru_cache(maxsize=1)
def _template() -> Template:
    return Template(files("nnterp").joinpath("lens_page.html").read_text(encoding="utf-8"))


def _text(text: str) -> str:
    # Half of a surrogate pair is no text, and no file in UTF-8 can hold it.
    return escape(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def _token(text: str) -> str:
    """A token's text as HTML, isolated so that one that is written from right to left leaves the others in order."""
    return f"<bdi>{_text(visible(text))}</bdi>"


def _table(lens: LensResult, positions: range, on_paper: bool = False) -> str:
    last = len(lens.tokens) - 1
    answer = ["answer" if position == last else "" for position in positions]
    head = [
        f'<th scope="col"{_class(mark)}><small>{position}{" answer" if mark else ""}</small>'
        f'<span class="text">{_token(lens.tokens[position])}</span></th>'
        for position, mark in zip(positions, answer, strict=True)
    ]
    rows = [
        f'<tr><th scope="row">{_text(name)}</th>'
        + "".join(_cell(lens, layer, position, on_paper) for position in positions)
        + "</tr>"
        for layer, name in enumerate(lens.layer_names)
    ]
    corner = '<th class="corner">tokens →<br>layers ↓</th>'
    return "\n".join(
        ["<table>", f"<thead><tr>{corner}{''.join(head)}</tr></thead>", "<tbody>", *rows, "</tbody>", "</table>"]
    )


def _cell(lens: LensResult, layer: int, position: int, on_paper: bool) -> str:
    texts = lens.top_tokens[layer][position]
    probs: list[float] = lens.top_probs[layer, position].tolist()
    mark = "answer" if position == len(lens.tokens) - 1 else ""
    start = f'<td style="--p:{probs[0]:.3f}"{_class(mark)}'
    if on_paper:
        return f'{start}><span class="text">{_token(texts[0])}</span><small>{probs[0]:.2f}</small></td>'
    entries = "".join(
        f"<li>{_token(text)}<span>{prob:.4f}</span></li>" for text, prob in zip(texts, probs, strict=True)
    )
    where = f"{_text(lens.layer_names[layer])}, after {_token(lens.tokens[position])} (position {position})"
    return (
        f'{start} tabindex="0"><span class="text">{_token(texts[0])}</span>'
        f'<div class="top"><em>{where}</em><ol>{entries}</ol></div></td>'
    )


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
