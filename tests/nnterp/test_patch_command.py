"""`nnterp patch`: what it prints, writes, and says when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.command_line import main
from nnterp.interventions import activation_patching, attribution_patching, logit_difference
from tests.nnterp.test_activation_patching import CLEAN, CORRUPTED

ASKED = ("patch", CLEAN, CORRUPTED, "--answers", " Mary", " John", "--model", "demo-gpt2")


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ASKED, "--sites", "layers_output"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].startswith("demo-gpt2: corrupted -") and lines[2] == "layers_output: part recovered, by layer"
    assert len(lines) == 4 + 13 and err == ""
    assert lines[-5].startswith("␣Mary (␣John)   0.98") and lines[-1].split()[-1] == "1.00"
    assert "-0.00" not in out


def test_json_holds_the_same_numbers(demo_gpt2: StandardizedTransformer, capsys: pytest.CaptureFixture[str]) -> None:
    metric = logit_difference(demo_gpt2, " Mary", " John")
    assert main([*ASKED, "--json", "--sites", "mlps_output"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = activation_patching(demo_gpt2, CLEAN, CORRUPTED, metric, "mlps_output").recovered("mlps_output")
    assert torch.allclose(torch.tensor(found["recovered"]["mlps_output"]), expected, atol=1e-6)
    assert found["axes"] == {"mlps_output": ["layer", "position"]} and not found["estimated"]
    assert main([*ASKED, "--json", "--sites", "mlps_output", "--estimate", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = attribution_patching(demo_gpt2, CLEAN, CORRUPTED, metric, "mlps_output", steps=2).recovered(
        "mlps_output"
    )
    assert torch.allclose(torch.tensor(found["recovered"]["mlps_output"]), expected, atol=1e-6)


def test_the_maps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "maps.html"
    assert main([*ASKED, "--html", str(page), "--sites", "mlps_output"]) == 0
    assert capsys.readouterr().out.endswith(f"maps: {page}\n")
    assert "<script src=" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("patch", CLEAN, CORRUPTED), "required: --answers"),
        (("patch", "", CORRUPTED, *ASKED[3:]), "CLEAN: the prompt is empty"),
        (("patch", CLEAN, "John and", "--answers", " Mary", " John"), "13 tokens, the corrupted one 2"),
        (("patch", CLEAN, CORRUPTED, "--answers", " Mary and", " John"), "' Mary and' is not one token"),
        ((*ASKED, "--sites", "layer"), "invalid choice: 'layer'"),
        ((*ASKED, "--html", "/nowhere/maps.html"), "there is no folder '/nowhere'"),
        ((*ASKED[:-1], "no-such-model", "--html", "maps.doc"), "its name ends in '.doc'"),
        ((*ASKED, "--estimate", "0"), "0 is too few"),
        (("patch", CLEAN, CLEAN, *ASKED[3:]), "nothing was lost"),
    ],
)
def test_what_cannot_be(arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(list(arguments)) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["patch", "--help"]) == 0
    assert '--answers " Mary" " John"' in capsys.readouterr().out
