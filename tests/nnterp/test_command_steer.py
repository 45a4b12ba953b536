"""``nnterp steer``: what it writes is what steering by hand writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.command_line import main
from nnterp.interventions import SteeringVector

FRANCE, JAPAN = "The capital of France is", "The capital of Japan is"
CONTRAST = ["--toward", JAPAN, "--away", FRANCE]


def test_the_answer_moves(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["steer", FRANCE, *CONTRAST, "--layers", "4", "--tokens", "1", "--model", "demo-gpt2"]) == 0
    out, err = capsys.readouterr()
    assert out == f"plain     {FRANCE}| Paris\nsteered   {FRANCE}| Tokyo\n"
    assert err == ""


def test_for_machines_with_a_vector_that_was_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "vector.safetensors")
    words = ["--tokens", "4", "--model", "demo-llama", "--json"]
    assert main(["steer", FRANCE, *CONTRAST, "--layers", "4", "2", "--save", file, *words]) == 0
    first = json.loads(capsys.readouterr().out)
    assert main(["steer", FRANCE, "--load", file, *words]) == 0
    assert json.loads(capsys.readouterr().out) == first
    assert first["layers"] == [2, 4]

    model = StandardizedTransformer("demo-llama")
    vector = SteeringVector.load(file)
    ids = model.tokenizer(FRANCE, return_tensors="pt").input_ids
    handles = [
        model.layers[layer]._module.register_forward_hook(
            lambda _, __, output, layer=layer: (
                output + vector[layer] if isinstance(output, torch.Tensor) else (output[0] + vector[layer], *output[1:])
            )
        )
        for layer in (2, 4)
    ]
    found = model._module.generate(ids, max_new_tokens=4, do_sample=False)
    for handle in handles:
        handle.remove()
    assert first["steered"] == model.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--toward and --away"),
        (["--toward", "a"], "--toward and --away"),
        ([*CONTRAST, "--tokens", "0"], "0 is too few"),
        ([*CONTRAST, "--layers", "9"], "LayerIndexError"),
        ([*CONTRAST, "--factor", "nan"], "'nan' is no number"),
        ([*CONTRAST, "--load", "nowhere.safetensors"], "and not both"),
        (["--toward", "\udcff", "--away", "a"], "is no text in the encoding"),
        # Before the model is loaded, which there is none.
        (["--load", "nowhere.safetensors", "--model", "nowhere"], "There is no file"),
        (["--load", __file__, "--model", "nowhere"], "is no safetensors file"),
        ([*CONTRAST, "--save", "/nowhere/x.safetensors", "--model", "nowhere"], "there is no folder '/nowhere'"),
    ],
)
def test_mistakes_are_named(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["steer", FRANCE, *words]) == 2
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err
