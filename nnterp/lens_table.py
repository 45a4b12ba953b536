"""The logit lens as a table for the terminal: one line for each layer, at the last position of the prompt.

sys.stdout.write(lens_table(lens_tokens(model, "The Eiffel Tower is in the city of")))

    layer 0 | ␣the    0.12 | ␣a      0.09
    layer 1 | ␣the    0.31 | ␣London 0.11
    layer 2 | ␣Paris  0.93 | ␣London 0.02
    ␣ is a space. The last line is the model's own prediction.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
import unicodedata
from collections.abc import Sequence

from nnterp.interventions.logit_lens import LensResult

__all__ = ["PLAIN_MARKS", "cells", "fit", "lens_table", "marks_legend", "visible"]

#: How characters are shown that would not be seen: a space, the ends of lines, a tab.
MARKS = {" ": "␣", "\n": "⏎", "\r": "␍", "\t": "⇥"}
#: The same for a terminal that cannot show those.
PLAIN_MARKS = {" ": "_", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_NAMES = {" ": "a space", "\n": "a line break", "\r": "a carriage return", "\t": "a tab"}
#: Tokens are cut to this many columns of the terminal, so that one long token does not push out the others.
TOKEN_COLUMNS = 16
#: Unicode categories that cannot be seen, or that change how the text around them is shown.
_HIDDEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"}


def lens_table(lens: LensResult, top: int | None = None, width: int | None = None, encoding: str | None = None) -> str:
    """One line for each layer: the most probable next tokens at the last position, with their probabilities.

    >>> from nnterp import StandardizedTransformer
    >>> from nnterp.interventions import lens_tokens
    >>> table = lens_table(lens_tokens(StandardizedTransformer("demo-gpt2"), "The Eiffel Tower is in the city of"))
    >>> "␣Paris" in table.splitlines()[-2]
    True

    Args:
        lens: what the lens read.
        top: how many tokens a line shows at most; fewer where the width does not allow more, but always one.
        width: the columns of the terminal, those of the present one if None. No line is longer.
        encoding: what the terminal can show; that of ``sys.stdout`` if None. What it cannot show is written as an
            escape, ``\\xe9``.
    """
    width = max(1, shutil.get_terminal_size().columns if width is None else width)
    encoding = encoding or getattr(sys.stdout, "encoding", None) or "utf-8"
    layers = [layer[-1][:top] for layer in lens.top_tokens]
    probs = lens.top_probs[:, -1, :top].tolist()
    lines = _column([visible(name, encoding, {}) for name in lens.layer_names], encoding, width)
    shown: list[str] = []
    for rank in range(len(layers[0])):
        tokens = [layer[rank] for layer in layers]
        room = max(1, width - cells(lines[0]) - len(" |  0.00"))
        texts = [visible(token, encoding) for token in tokens]
        # The first token is there at any width, cut if need be; of the others, half a token says less than none.
        if rank > 0 and room < min(TOKEN_COLUMNS, max(map(cells, texts))):
            break
        column = _column(texts, encoding, min(TOKEN_COLUMNS, room))
        lines = [f"{line} | {text} {prob[rank]:.2f}" for line, text, prob in zip(lines, column, probs, strict=True)]
        shown += tokens
    legend = f"{marks_legend(shown, encoding)}. The last line is the model's own prediction."
    return "\n".join([*(fit(line, width, encoding) for line in lines), *textwrap.wrap(legend, width)]) + "\n"


def _column(texts: Sequence[str], encoding: str, limit: int) -> list[str]:
    """The texts, cut to ``limit`` columns and filled up to one length."""
    cut = [fit(text, limit, encoding) for text in texts]
    widest = max(map(cells, cut))
    return [text + " " * (widest - cells(text)) for text in cut]


def visible(text: str, encoding: str = "utf-8", marks: dict[str, str] | None = None) -> str:
    """A token as it reads: spaces and line breaks marked, what cannot be seen or shown written as an escape.

    >>> visible(" Paris\\n")
    '␣Paris⏎'
    >>> visible(" Paris\\n", "ascii")
    '_Paris\\\\n'
    >>> visible("a\\u202eb")
    'a\\\\u202eb'

    Args:
        text: the token.
        encoding: what is to be able to show it.
        marks: what stands for which character; by default what the encoding allows.
    """
    marks = _marks(encoding) if marks is None else marks
    shown = "".join(marks.get(letter) or _shown(letter, encoding) for letter in text)
    # An accent without a letter would go onto whatever stands before the token.
    return f"◌{shown}" if shown and unicodedata.combining(shown[0]) and _can_show("◌", encoding) else shown


def _shown(letter: str, encoding: str) -> str:
    if letter == " ":
        return letter
    if unicodedata.category(letter) in _HIDDEN:
        return letter.encode("ascii", "backslashreplace").decode("ascii") if ord(letter) > 127 else repr(letter)[1:-1]
    return letter.encode(encoding, "backslashreplace").decode(encoding)


def _can_show(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _marks(encoding: str) -> dict[str, str]:
    return MARKS if _can_show("".join(MARKS.values()), encoding) else PLAIN_MARKS


def marks_legend(texts: Sequence[str], encoding: str = "utf-8") -> str:
    """Which mark means what, for those that stand in ``texts``; the space is always among them.

    >>> marks_legend([" a", "\\n"])
    '␣ is a space, ⏎ a line break'
    """
    marks, met = _marks(encoding), set("".join(texts))
    named = [f"{marks[letter]} {name}" for letter, name in _NAMES.items() if letter in met - {" "}]
    return ", ".join([f"{marks[' ']} is a space", *named])


def cells(text: str) -> int:
    """How many columns of a terminal a text takes: two for each wide character, none for an accent on a letter.

    >>> cells("日本"), cells("e\\u0301")
    (4, 1)
    """
    return sum(
        2 if unicodedata.east_asian_width(letter) in "WF" else 0 if unicodedata.combining(letter) else 1
        for letter in text
    )


def fit(text: str, width: int, encoding: str = "utf-8") -> str:
    """The text cut to ``width`` columns; an ellipsis shows where it was cut.

    >>> fit("Constantinople", 8)
    'Constan…'
    """
    if cells(text) <= width:
        return text
    mark = "…" if _can_show("…", encoding) else ".."
    mark = mark if cells(mark) <= width else ""
    kept, used = "", cells(mark)
    for letter in text:
        used += cells(letter)
        if used > width:
            break
        kept += letter
    return kept + mark
