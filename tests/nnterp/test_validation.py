"""A wrong specification is found by numbers when a model is opened, and the error names the line that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nnterp import StandardizedTransformer
from nnterp.architectures import specs_folder
from nnterp.errors import RenamingError, ValidationError
from tests.families import FAMILY_VARIANTS, IDS, tiny_model


@pytest.mark.parametrize(("model_type", "overrides"), [row[1:] for row in FAMILY_VARIANTS], ids=IDS)
def test_every_promise_holds_and_nothing_is_left_changed(model_type: str, overrides: dict[str, Any]) -> None:
    module = tiny_model(model_type, **overrides)
    module.train()
    module.get_output_embeddings().eval()
    modes = {name: each.training for name, each in module.named_modules()}
    state = torch.random.get_rng_state()
    StandardizedTransformer(module)
    assert {name: each.training for name, each in module.named_modules()} == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in module.parameters())


def broken(tmp_path: Path, family: str, old: str, new: str) -> tuple[Path, int]:
    """A copy of a family's file with one thing changed, and the line that it is on, counted from 1."""
    text = (specs_folder() / f"{family}.yaml").read_text(encoding="utf-8")
    assert text.count(old) >= 1, old
    line = text[: text.index(old)].count("\n") + 1
    path = tmp_path / f"{family}_broken.yaml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return path, line


@pytest.mark.parametrize(
    ("model_type", "family", "old", "new", "promise"),
    [
        # Only these modules' numbers tell that they are the wrong ones: all of them exist.
        ("granite", "granite", "ln_final: model.norm", "ln_final: model.layers.0.input_layernorm", "takes its turn in"),
        ("gemma2", "gemma2", "softcap: final_logit_softcapping", "softcap: attn_logit_softcapping", "logits is"),
        ("gemma2", "gemma2", "contribution: post_feedforward_layernorm", "contribution: mlp", "contributions"),
        ("gpt2", "gpt2", "module: attn,", "module: ln_1,", "reads the layer's input through"),
        (
            "gpt_neox",
            "gpt_neox",
            "module: mlp,",
            "input: mlp.dense_h_to_4h, output: mlp.dense_h_to_4h,",
            "mlps_output",
        ),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, model_type: str, family: str, old: str, new: str, promise: str) -> None:
    path, line = broken(tmp_path, family, old, new)
    module = tiny_model(model_type)
    with pytest.raises(ValidationError, match=promise) as caught:
        StandardizedTransformer(module, spec=path)
    message = str(caught.value)
    assert path.name in message
    assert "promised:" in message and "seen:" in message and "Mend that line" in message
    named = int(message.split(".yaml:")[1].split(":")[0])
    # What a layer adds up to is promised by the whole of `block`, so its first line stands for it.
    assert abs(line - named) <= (12 if promise == "contributions" else 0), message
    # Unchecked, the user may go on at their own risk.
    StandardizedTransformer(module, spec=path, check_renaming=False)


def test_a_path_that_the_model_does_not_have_is_named_with_the_nearest(tmp_path: Path) -> None:
    path, line = broken(tmp_path, "granite", "ln_final: model.norm", "ln_final: model.normm")
    with pytest.raises(RenamingError, match=rf"granite_broken.yaml:{line}") as caught:
        StandardizedTransformer(tiny_model("granite"), spec=path)
    assert "model.norm" in str(caught.value)


def test_a_wrong_number_is_found_in_the_last_layer_as_well() -> None:
    module = tiny_model("llama")
    # A layer that scales what it hands on breaks the sum that the specification promises for every layer.
    module.model.layers[-1].register_forward_hook(lambda m, args, output: output * 1.5)
    with pytest.raises(ValidationError, match=r"layers_output\[2\] is layers_input\[2\]"):
        StandardizedTransformer(module)
