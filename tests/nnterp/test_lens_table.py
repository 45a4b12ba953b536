"""The table of the logit lens fits the terminal, whatever the tokens are."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nnterp.interventions import LensResult
from nnterp.lens_table import cells, fit, lens_table, marks_legend, visible

MARKS_LINE = "The last line is the model's own prediction."


def lens_of(rows: list[list[str]], probs: list[list[float]] | None = None) -> LensResult:
    """What a lens would read that finds these tokens, by layer and rank, at its one position."""
    layers, k = len(rows), len(rows[0])
    top_probs = torch.full((layers, 1, k), 0.125) if probs is None else torch.tensor(probs)[:, None]
    return LensResult(
        prompt="text",
        tokens=("text",),
        positions=(0,),
        ids=torch.tensor([0]),
        layer_names=tuple(f"layer {layer}" for layer in range(layers)),
        top_ids=torch.arange(layers * k).reshape(layers, 1, k),
        top_probs=top_probs,
        top_tokens=tuple((tuple(row),) for row in rows),
    )


PARIS = lens_of([[" the", " a"], [" Paris", " London"]], [[0.125, 0.09], [0.934, 0.004]])


def test_one_line_for_each_layer_in_columns() -> None:
    assert lens_table(PARIS, width=80, encoding="utf-8").splitlines() == [
        "layer 0 | ␣the   0.12 | ␣a      0.09",
        "layer 1 | ␣Paris 0.93 | ␣London 0.00",
        f"␣ is a space. {MARKS_LINE}",
    ]


def test_fewer_columns_where_they_do_not_fit() -> None:
    table = lens_table(PARIS, width=35, encoding="utf-8").splitlines()
    assert table[:2] == ["layer 0 | ␣the   0.12", "layer 1 | ␣Paris 0.93"]
    assert lens_table(PARIS, top=1, width=80).splitlines()[:2] == table[:2]
    # The first token is there even where it has to be cut.
    assert lens_table(PARIS, width=19, encoding="utf-8").splitlines()[1] == "layer 1 | ␣Pa… 0.93"


def test_a_terminal_without_unicode() -> None:
    lens = lens_of([[" café\n"], ["日本"]])
    table = lens_table(lens, width=80, encoding="ascii")
    assert table.splitlines() == [
        "layer 0 | _caf\\xe9\\n   0.12",
        "layer 1 | \\u65e5\\u672c 0.12",
        f"_ is a space, \\n a line break. {MARKS_LINE}",
    ]
    # é is in this encoding, the marks are not.
    assert "_café\\n" in lens_table(lens, width=80, encoding="latin-1")


def test_the_terminal_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "35")
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert lens_table(PARIS).splitlines()[1] == "layer 1 | _Paris 0.93"


def test_wide_characters_keep_the_columns_in_line() -> None:
    lines = lens_table(
        lens_of([["日本", "a"], ["e\u0301", "b"], ["abc", "c"]]), width=80, encoding="utf-8"
    ).splitlines()
    assert len({cells(line) for line in lines[:3]}) == 1
    assert lines[0] == "layer 0 | 日本 0.12 | a 0.12"
    assert lines[1] == "layer 1 | e\u0301    0.12 | b 0.12"


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" Paris", "␣Paris"),
        ("\n\r\t", "⏎␍⇥"),
        ("\x00\x1b[31m", "\\x00\\x1b[31m"),
        ("\u202eabc\u200b", "\\u202eabc\\u200b"),
        ("\xa0\u3000\u2028", "\\xa0\\u3000\\u2028"),
        ("\udce2\ue000", "\\udce2\\ue000"),
        ("<0xE2>", "<0xE2>"),
        ("\u0301a", "◌\u0301a"),
        ("العربية 👍🏽", "العربية␣👍🏽"),
        ("", ""),
    ],
)
def test_what_cannot_be_seen_is_written_out(token: str, shown: str) -> None:
    assert visible(token) == shown
    assert visible(token, "ascii").isascii()


def test_the_legend_names_the_marks_that_stand_there() -> None:
    assert marks_legend([]) == "␣ is a space"
    assert marks_legend(["a\tb", "\n"]) == "␣ is a space, ⏎ a line break, ⇥ a tab"


def test_fit() -> None:
    assert fit("Constantinople", 8) == "Constan…"
    assert fit("Constantinople", 8, "ascii") == "Consta.."
    assert fit("日本語", 4) == "日…"
    assert fit("ab", 1, "ascii") == "a"
    assert fit("日", 1) == "…"


TOKENS = st.text(max_size=30) | st.sampled_from([" Paris", "日本語", "e\u0301", "👍🏽", "\n", "\x1b[2J", "|", " | "])


@given(
    rows=st.integers(1, 6).flatmap(
        lambda k: st.lists(st.lists(TOKENS, min_size=k, max_size=k), min_size=1, max_size=12)
    ),
    width=st.integers(1, 200),
    encoding=st.sampled_from(["utf-8", "ascii", "latin-1", "cp437", "shift_jis"]),
)
def test_no_line_is_longer_than_the_terminal_is_wide(rows: list[list[str]], width: int, encoding: str) -> None:
    table = lens_table(lens_of(rows), width=width, encoding=encoding)
    table.encode(encoding)
    lines = table.splitlines()
    assert all(cells(line) <= width for line in lines)
    if width >= 40:
        # Every layer has its line with its probability, and all columns stand below one another.
        for layer, line in enumerate(lines[: len(rows)]):
            assert line.startswith(f"layer {layer} ") and " 0.12" in line
        assert len({line.count(" | ") for line in lines[: len(rows)]}) == 1
