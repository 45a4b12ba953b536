"""The promises, asked of models that keep them and of such that break one each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.command_line import main
from nnterp.contract import PROMISES, Verdict, run_contract
from nnterp.inference import infer_yaml
from nnterp.residual_stream import ResidualStream
from tests.families import tiny_model
from tests.nnterp.handmade import handmade

MODEL_TYPES = ("gpt2", "llama", "gemma2", "gpt_neox", "opt")


def answers(model: torch.nn.Module, **options: Any) -> dict[str, Verdict]:
    opened = StandardizedTransformer(model, check_renaming=False, **options)
    return {verdict.promise: verdict for verdict in run_contract(opened)}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_families_keep_every_promise(model_type: str) -> None:
    found = answers(tiny_model(model_type))
    assert list(found) == [promise.name for promise in PROMISES]
    assert {verdict.answer for verdict in found.values()} == {"ok"}, [v for v in found.values() if v.answer != "ok"]


def test_a_handmade_module_keeps_what_it_can() -> None:
    found = answers(handmade())
    assert {name for name, verdict in found.items() if verdict.answer == "cannot"} == {"generate", "padding"}
    assert "no method `generate`" in found["generate"].why and "attention_mask" in found["padding"].why
    assert all(verdict.answer != "not" for verdict in found.values())


def test_a_model_without_gradients_says_so() -> None:
    found = answers(tiny_model("gpt2").requires_grad_(False))
    assert found["gradients"].answer == "cannot" and "no parameter" in found["gradients"].why


def test_a_specification_that_is_wrong_is_seen(tmp_path: Path) -> None:
    def verdicts(change: Callable[[str], str]) -> dict[str, Verdict]:
        own = tmp_path / "own.yaml"
        own.write_text(change(infer_yaml(model)), encoding="utf-8")
        return answers(model, spec=own)

    model = handmade()
    wrong = verdicts(lambda text: text.replace("{module: thinking, norm: two}", "{module: looking, norm: one}"))
    assert wrong["sum"].answer == "not" and "own.yaml:" in wrong["sum"].why
    wrong = verdicts(lambda text: text.replace("ln_final: last", "ln_final: null") + "absent: {ln_final: 'None.'}\n")
    assert wrong["logits"].answer == "not" and wrong["sum"].answer == "ok"
    wrong = verdicts(lambda text: text.replace("hidden_size: 24", "hidden_size: 23"))
    assert wrong["shapes"].answer == "not"


def test_an_interface_that_reads_or_writes_wrongly_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gpt2")
    with monkeypatch.context() as patched:
        patched.setattr(ResidualStream, "steer", lambda *args, **kwargs: None)
        assert answers(model)["steer"].answer == "not"
        patched.setattr(ResidualStream, "skip_layer", lambda *args, **kwargs: None)
        assert answers(model)["skip"].answer == "not"
    with monkeypatch.context() as patched:
        patched.setattr("nnterp.contract.promises.write", lambda *args, **kwargs: None)
        assert answers(model)["writes"].answer == "not"
        patched.setattr("nnterp.contract.promises.read", lambda root, place: plain_zero(root))
        assert answers(model)["reads"].answer == "not"


def plain_zero(root: StandardizedTransformer) -> Any:
    return root.layers_output[0] * 0


def test_what_is_left_behind_is_seen() -> None:
    model = tiny_model("gpt2")
    opened = StandardizedTransformer(model, check_renaming=False)
    handles = []
    seen = []
    for verdict in run_contract(opened):
        seen.append(verdict)
        if verdict.promise == "padding":
            handles.append(model.transformer.h[0].register_forward_hook(lambda *args: None))
    handles[0].remove()
    left = next(verdict for verdict in seen if verdict.promise == "nothing left")
    assert left.answer == "not" and "transformer.h.0" in left.why


def test_check_prints_a_table_and_gives_a_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "demo-gpt2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("ok      load") and out.endswith(f"demo-gpt2: {len(PROMISES) + 1} ok\n")
    own = tmp_path / "wrong.yaml"
    assert main(["spec", "demo-gpt2", "--inferred"]) == 0
    own.write_text(capsys.readouterr().out.replace("norm: ln_1", "norm: ln_2"), encoding="utf-8")
    assert main(["check", "demo-gpt2", "--spec", str(own), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["kept"] and {each["answer"] for each in found["promises"]} == {"ok", "not"}
    wrong = next(each for each in found["promises"] if each["answer"] == "not")
    assert wrong["promise"] == "sum" and "wrong.yaml:" in wrong["why"]
    own.write_text(own.read_text(encoding="utf-8").replace("module: mlp", "module: mpl"), encoding="utf-8")
    assert main(["check", "demo-gpt2", "--spec", str(own)]) == 1
    assert "not     load" in capsys.readouterr().out
    assert main(["check", "no-such-model"]) == 2
    assert "ModelNotFoundError" in capsys.readouterr().err


def test_spec_prints_the_file_or_what_the_structure_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spec", "demo-llama"]) == 0
    served = capsys.readouterr().out
    assert served.startswith("family: llama") and "notes:" in served
    assert main(["spec", "demo-llama", "--inferred"]) == 0
    inferred = capsys.readouterr().out
    assert inferred.startswith("# Inferred") and "layers: model.layers" in inferred
