"""Figures become pages that need nothing else and images of the right size, or an error says what is missing."""

from __future__ import annotations

import os
import re
import struct
import zlib
from importlib.util import find_spec
from pathlib import Path

import pytest
from plotly.graph_objects import Figure

from nnterp.pictures import FigureFileError, check_figure_file, save_figure

RED = (0xC9, 0x2A, 0x2A)


def missing() -> str | None:
    """What an error about an image must say here; None where images can be drawn."""
    if find_spec("kaleido") is None:
        return "kaleido is not installed"
    from choreographer.browsers.chromium import Chromium

    return None if Chromium.find_browser(skip_local=False) else "Chrome"


def png(file: Path) -> tuple[int, int, tuple[int, ...]]:
    """Width, height and the colour of the first pixel, by the PNG specification."""
    data = file.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, found = 8, {b"IDAT": b""}
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        found[kind] = found.get(kind, b"") + data[at + 8 : at + 8 + length]
        at += length + 12
    # Every filter leaves the first pixel as it is.
    return *struct.unpack(">II", found[b"IHDR"][:8]), tuple(zlib.decompress(found[b"IDAT"])[1:4])


@pytest.fixture
def figure() -> Figure:
    return Figure().add_bar(y=[1, 2]).update_layout(width=300, height=200, paper_bgcolor="rgb(201, 42, 42)")


def test_a_page_needs_nothing_else(tmp_path: Path) -> None:
    page = save_figure(Figure(), tmp_path / "figure.html")
    text = page.read_text(encoding="utf-8")
    assert "plotly.js v" in text and re.search(r"<script[^>]+src=", text) is None


@pytest.mark.parametrize("ending", ["PNG", "svg", "pdf"])
def test_an_image_or_what_it_takes(tmp_path: Path, figure: Figure, ending: str) -> None:
    file, fact = tmp_path / f"figure.{ending}", missing()
    if fact is not None:
        for call in (lambda: save_figure(figure, file), lambda: check_figure_file(file)):
            with pytest.raises(
                FigureFileError, match=rf"{fact}[\s\S]*pip install -U 'kaleido>=1' plotly.*BROWSER_PATH"
            ):
                call()
        return
    assert save_figure(figure, str(file)) == file
    if ending == "PNG":
        assert check_figure_file(str(file)) == file
        assert png(file) == (600, 400, RED)
    else:
        assert file.read_bytes().startswith({"svg": b"<svg", "pdf": b"%PDF-"}[ending])


def test_a_browser_that_is_not_there_or_does_not_start(
    tmp_path: Path, figure: Figure, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "browser"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    facts = {os.fspath(tmp_path / "none"): "Google Chrome", os.fspath(broken): "close immediately"}
    for path, fact in facts.items():
        monkeypatch.setenv("BROWSER_PATH", path)
        expected = fact if find_spec("kaleido") else "kaleido is not installed"
        for call in (lambda: save_figure(figure, tmp_path / "x.png"), lambda: check_figure_file(tmp_path / "x.png")):
            with pytest.raises(FigureFileError, match=rf"{expected}[\s\S]*BROWSER_PATH") as caught:
                call()
            assert str(caught.value).count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_releases_that_do_not_fit_one_another(
    tmp_path: Path, figure: Figure, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def refuses(*_: object, **__: object) -> None:
        raise error("\nImage export using the engine\nrequires kaleido.\n")

    monkeypatch.setattr("nnterp.pictures.saving.find_spec", lambda name: object())
    monkeypatch.setattr(Figure, "write_image", refuses)
    with pytest.raises(FigureFileError, match="Image export using the engine requires kaleido\\.\nImages are drawn by"):
        save_figure(figure, tmp_path / "figure.svg")


def test_files_that_cannot_be(tmp_path: Path) -> None:
    for name, fact in (("none/x.html", "there is no folder"), ("", "that is a folder"), ("x", "has no ending")):
        with pytest.raises(FigureFileError, match=fact):
            save_figure(Figure(), tmp_path / name)


def test_a_file_that_one_may_not_write_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "kept.html"
    kept.write_text("kept", encoding="utf-8")
    closed = {kept}
    monkeypatch.setattr("os.access", lambda path, mode: path not in closed)
    with pytest.raises(FigureFileError, match="you may not write there"):
        check_figure_file(kept)
    assert check_figure_file(tmp_path / "new.html") == tmp_path / "new.html"
    closed.add(tmp_path)
    with pytest.raises(FigureFileError, match="you may not write there"):
        check_figure_file(tmp_path / "new.html")
