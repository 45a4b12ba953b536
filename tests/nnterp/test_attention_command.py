"""`nnterp attention` and `nnterp heads`: what they print, write, and say when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.command_line import main
from nnterp.interventions import attention_patterns, head_scores

PROMPT = "The Eiffel Tower is in the city of"
LOOK = ("attention", PROMPT, "--model", "demo-gpt2")


def test_a_line_for_each_head(demo_gpt2: StandardizedTransformer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LOOK, "--layer", "2", "-1", "--top", "2"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == "" and lines[0] == "demo-gpt2: what ␣of (position 7) looks at"
    assert lines[2] == "layer 2" and lines[8] == "layer 5" and lines[-1] == "␣ is a space."
    found = attention_patterns(demo_gpt2, PROMPT, [2, 5])
    for layer, start in ((2, 3), (5, 9)):
        for head in range(4):
            values, keys = found.probabilities[layer][head, -1].topk(2)
            entries = lines[start + head].split(" | ")
            assert entries[0] == f"head {head:<2}" and len(entries) == 3
            assert [float(each.split()[-1]) for each in entries[1:]] == [round(value, 2) for value in values.tolist()]
            assert [each.split("(")[1].split(")")[0] for each in entries[1:]] == [str(key) for key in keys.tolist()]


def test_another_token_looks_at_no_later_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LOOK, "--layer", "0", "--position", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("␣Eiffel (position 1) looks at") and lines[3].count("|") == 2


def test_json_holds_the_same_numbers(demo_gpt2: StandardizedTransformer, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LOOK, "--json", "--layer", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    (layer,) = found["layers"]
    expected = attention_patterns(demo_gpt2, PROMPT, [3]).probabilities[3]
    assert layer["layer"] == 3 and found["tokens"][1] == " Eiffel" and found["axes"] == ["head", "query", "key"]
    assert torch.allclose(torch.tensor(layer["probabilities"]), expected, atol=1e-6)
    assert main(["heads", "--model", "demo-gpt2", "--json", "--length", "6", "--sequences", "2", "--seed", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    for kind, values in head_scores(demo_gpt2, 6, 2, 4).items():
        assert torch.allclose(torch.tensor(found["scores"][kind]), values, atol=1e-6)
    assert found["length"] == 6 and found["seed"] == 4


def test_the_best_heads(demo_gpt2: StandardizedTransformer, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--length", "6", "--sequences", "2"]
    assert main(["heads", "--model", "demo-gpt2", "--kind", "previous", "--top", "3", *small]) == 0
    lines = capsys.readouterr().out.splitlines()
    scores = head_scores(demo_gpt2, 6, 2)["previous"]
    assert lines[2] == "previous" and len(lines) == 6
    layer, head = divmod(int(scores.argmax()), 4)
    assert lines[3] == f"  layer {layer:>2}  head {head:>2}  {float(scores.max()):.2f}"


def test_the_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "looks.html"
    assert main([*LOOK, "--layer", "1", "--html", str(page)]) == 0
    assert capsys.readouterr().out.endswith(f"maps: {page}\n")
    assert "<script src=" not in page.read_text(encoding="utf-8")
    page = tmp_path / "heads.html"
    assert main(["heads", "--model", "demo-gpt2", "--length", "4", "--sequences", "1", "--html", str(page)]) == 0
    assert capsys.readouterr().out.endswith(f"map: {page}\n") and page.stat().st_size > 1_000_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("attention",), "required: PROMPT"),
        ((*LOOK, "--layer", "9"), "the model has 6 layers"),
        ((*LOOK, "--position", "8"), "the prompt has 8 tokens"),
        ((*LOOK, "--top", "0"), "0 is too few"),
        ((*LOOK, "--top", "some"), "'some' is no whole number"),
        ((*LOOK, "--html", "/nowhere/maps.html"), "there is no folder '/nowhere'"),
        (("attention", "", "--model", "demo-gpt2"), "the prompt is empty"),
        (("attention", "\udcff"), "'\\udcff' is no text in the encoding of this terminal"),
        (("heads", "--kind", "inductive"), "invalid choice: 'inductive'"),
        (("heads", "--length", "2"), "a length from 3"),
        (("heads", "--length", "100"), "positions"),
    ],
)
def test_what_cannot_be(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(list(arguments)) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


@pytest.mark.parametrize("command", ["attention", "heads"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert f"examples:\n  nnterp {command}" in capsys.readouterr().out
