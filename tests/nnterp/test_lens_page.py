"""The heat map: whole, well-formed, of itself alone, and with nothing of the model's taken for HTML."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

import pytest
import torch

from nnterp.interventions import LensResult
from nnterp.lens_page import PAPER_COLUMNS, lens_page

VOID = {"meta", "br"}
LAYERS, POSITIONS, K = 3, PAPER_COLUMNS + 2, 5


@dataclass
class Element:
    """An HTML element: its tag, its attributes, what stands in it."""

    tag: str
    attributes: dict[str, str]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag: str, mark: str = "") -> list[Element]:
        """The elements in it of this tag, and of this class if one is given."""
        inner = [child for child in self.children if isinstance(child, Element)]
        here = [each for each in inner if each.tag == tag and mark in ["", *each.attributes.get("class", "").split()]]
        return here + [found for each in inner for found in each.all(tag, mark)]


class Tree(HTMLParser):
    """Builds the elements; a tag that is never closed, or closed twice, is an error."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self._open = [self.root]
        self.feed(page)
        self.close()
        assert self._open == [self.root], f"never closed: {[each.tag for each in self._open[1:]]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self._open[-1].children.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().tag == tag, f"</{tag}> at {self.getpos()} closes something else"

    def handle_data(self, data: str) -> None:
        self._open[-1].children.append(data)


def lens_of(token: str = "token", prompt: str = "a prompt") -> LensResult:
    probs = torch.linspace(0, 1, LAYERS * POSITIONS * K).flip(0).reshape(LAYERS, POSITIONS, K)
    return LensResult(
        prompt=prompt,
        tokens=tuple(f" {token}{position}" for position in range(POSITIONS)),
        positions=tuple(range(POSITIONS)),
        ids=torch.arange(POSITIONS),
        layer_names=tuple(f"layer {layer}" for layer in range(LAYERS)),
        top_ids=torch.arange(LAYERS * POSITIONS * K).reshape(LAYERS, POSITIONS, K),
        top_probs=probs,
        top_tokens=tuple(
            tuple(tuple(f" {token}-{layer}-{position}-{rank}" for rank in range(K)) for position in range(POSITIONS))
            for layer in range(LAYERS)
        ),
    )


@pytest.fixture(scope="module")
def page() -> str:
    return lens_page(lens_of(), "some/model")


@pytest.fixture(scope="module")
def tree(page: str) -> Element:
    return Tree(page).root


def test_every_cell_shows_its_token_and_its_probability(tree: Element) -> None:
    (screen,) = tree.all("div", "screen")
    rows = screen.all("tbody")[0].all("tr")
    assert [row.all("th")[0].text for row in rows] == ["layer 0", "layer 1", "layer 2"]
    lens = lens_of()
    for layer, row in enumerate(rows):
        cells = row.all("td")
        assert len(cells) == POSITIONS
        for position, cell in enumerate(cells):
            assert cell.all("span", "text")[0].text == f"␣token-{layer}-{position}-0"
            prob = float(lens.top_probs[layer, position, 0])
            assert cell.attributes["style"] == f"--p:{prob:.3f}"


def test_every_cell_holds_its_top_tokens_for_pointer_and_keyboard(tree: Element) -> None:
    lens = lens_of()
    for row, layer in zip(tree.all("div", "screen")[0].all("tbody")[0].all("tr"), range(LAYERS), strict=True):
        for position, cell in enumerate(row.all("td")):
            assert cell.attributes["tabindex"] == "0"
            (box,) = cell.all("div", "top")
            assert box.all("em")[0].text == f"layer {layer}, after ␣token{position} (position {position})"
            expected = [
                f"␣token-{layer}-{position}-{rank}{prob:.4f}"
                for rank, prob in enumerate(lens.top_probs[layer, position].tolist())
            ]
            assert [entry.text for entry in box.all("li")] == expected


def test_the_prompt_runs_along_the_top_and_the_answer_is_marked(tree: Element) -> None:
    (head,) = tree.all("div", "screen")[0].all("thead")
    tokens = [each.all("span", "text")[0].text for each in head.all("th") if each.all("span", "text")]
    assert tokens == [f"␣token{position}" for position in range(POSITIONS)]
    answers = tree.all("div", "screen")[0].all("td", "answer")
    assert [each.all("span", "text")[0].text for each in answers] == [
        f"␣token-{layer}-{POSITIONS - 1}-0" for layer in range(LAYERS)
    ]
    assert "answer" in head.all("th", "answer")[0].text
    assert "layers ↓" in head.text and "tokens →" in head.text


def test_the_title_names_model_and_prompt(tree: Element) -> None:
    assert tree.all("title")[0].text == "some/model: a prompt"
    assert tree.all("h1")[0].text == "Logit lens of some/model"
    assert tree.all("pre")[0].text == "a prompt"
    assert "␣ is a space" in tree.all("div", "legend")[0].text


def test_paper_has_all_positions_without_scrolling(tree: Element) -> None:
    tables = tree.all("div", "paper")[0].all("table")
    assert [len(each.all("tbody")[0].all("tr")[0].all("td")) for each in tables] == [PAPER_COLUMNS, 2]
    last = tables[-1].all("td")[-1]
    assert last.text.startswith(f"␣token-{LAYERS - 1}-{POSITIONS - 1}-0")


def test_nothing_comes_from_elsewhere(page: str, tree: Element) -> None:
    assert not re.search(r"https?:|url\(|@import|\bsrc\s*=|\bhref\s*=|//\w+\.\w+", page)
    assert not any(tree.all(tag) for tag in ("link", "img", "iframe", "object", "base"))
    assert len(tree.all("script")) == len(tree.all("style")) == 1


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", "</pre></td>", '" onfocus="alert(1)', "&lt;b&gt;", "$p"])
def test_nothing_of_the_models_is_taken_for_html(text: str, tree: Element) -> None:
    hostile = Tree(lens_page(lens_of(token=text, prompt=text), text)).root
    for tag in ("script", "td", "th", "pre", "li", "bdi"):
        assert len(hostile.all(tag)) == len(tree.all(tag))
    assert hostile.all("pre")[0].text == hostile.all("h1")[0].all("span", "model")[0].text == text
    assert hostile.all("td")[0].all("span", "text")[0].text == f" {text}-0-0-0".replace(" ", "␣")
    assert {name for cell in hostile.all("td") for name in cell.attributes} == {"style", "class", "tabindex"}


def test_what_is_no_text_is_written_out() -> None:
    page = lens_page(lens_of(token="\udce2\x00", prompt="\udce2"), "model")
    assert "\\udce2\\x00" in page
    page.encode("utf-8")


def test_one_position() -> None:
    lens = lens_of()
    one = LensResult(
        prompt="x",
        tokens=lens.tokens[:1],
        positions=(0,),
        ids=lens.ids[:1],
        layer_names=lens.layer_names,
        top_ids=lens.top_ids[:, :1, :1],
        top_probs=lens.top_probs[:, :1, :1],
        top_tokens=tuple((layer[0][:1],) for layer in lens.top_tokens),
    )
    tree = Tree(lens_page(one, "model")).root
    assert len(tree.all("div", "screen")[0].all("td", "answer")) == LAYERS
