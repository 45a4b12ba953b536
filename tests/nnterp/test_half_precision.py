"""Models of half precision: their structure shows, they stay as they were, and their own roundings are no faults."""

from __future__ import annotations

import pytest
import torch

from nnterp import StandardizedTransformer, naming
from nnterp.inference import infer, infer_spec, stand_in
from nnterp.inference.errors import ProbeError
from nnterp.inference.stand_in import with_numbers
from nnterp.naming import name_modules
from nnterp.validation import Row
from tests.families import tiny_inputs
from tests.matrix.models import tiny_model
from tests.nnterp.test_inference import differences, no_specs

#: Types of which rounding to half precision hides something: sums with factors, caps, norms, what is added.
ROUNDED = ["falcon_h1", "gemma2", "granite", "hrm_text", "minicpm3", "minimax", "nanochat", "rwkv", "xlstm"]


@pytest.mark.parametrize("model_type", ROUNDED)
def test_structure_shows_in_half_precision(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(model_type).to(torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wanted = name_modules(model)
    monkeypatch.setattr(naming, "load_specs", no_specs)
    own = name_modules(model)
    assert own.spec.source.startswith("<inferred")
    assert not differences(own, wanted, model.config)
    StandardizedTransformer(model)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) and value.dtype == after[name].dtype for name, value in before.items())


def test_the_copy_has_the_same_numbers() -> None:
    model = tiny_model("gpt2").half()
    copied = with_numbers(model)
    assert copied is not model and {each.dtype for each in copied.parameters()} == {torch.float32}
    assert all(torch.equal(one.half(), two) for one, two in zip(copied.parameters(), model.parameters(), strict=True))
    assert copied.lm_head.weight is copied.transformer.wte.weight  # type: ignore[union-attr]
    assert with_numbers(copied) is copied


def test_without_numbers_a_copy_is_in_single_precision() -> None:
    with torch.device("meta"):
        model = torch.nn.Linear(3, 3, dtype=torch.float16)
    assert {each.dtype for each in with_numbers(model).parameters()} == {torch.float32}


def test_what_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = torch.nn.Linear(3, 3).half()
    packed.weight = torch.nn.Parameter(torch.zeros(3, 3, dtype=torch.int8), requires_grad=False)
    assert with_numbers(packed) is packed
    model = tiny_model("gpt2").half()
    monkeypatch.setattr(stand_in, "LARGEST", 1000)
    assert with_numbers(model) is model
    assert infer_spec(model).layer.attention is not None


def test_a_model_that_runs_in_its_own_type_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, probed = tiny_model("gpt2").half(), []
    run = infer.run_probe

    def choosy(given: torch.nn.Module) -> object:
        probed.append(given)
        if given is not model:
            raise ProbeError("GPT2", "it wants half precision")
        return run(given)

    monkeypatch.setattr(infer, "run_probe", choosy)
    assert infer_spec(model).layer.attention is not None and probed[-1] is model and len(probed) == 2


def test_logits_that_were_half_precision_on_their_way() -> None:
    exact = torch.linspace(-2, 2, 100)
    rounded = exact.bfloat16()
    assert Row("logits", "", "", exact, rounded).disagreement() is None
    assert Row("logits", "", "", rounded.float(), exact).disagreement() is not None
    assert Row("logits", "", "", exact, rounded * 1.5).disagreement() is not None


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba"])
def test_a_stream_of_single_precision_before_half_a_head(model_type: str) -> None:
    model = StandardizedTransformer(tiny_model(model_type).to(torch.bfloat16))
    with model.trace(tiny_inputs()):
        hidden = model.layers_output[-1].save()
        logits = model.logits.save()
    assert hidden.dtype == torch.float32 and model.lm_head._module.weight.dtype == torch.bfloat16
    torch.testing.assert_close(model.project_on_vocab(hidden.value).float(), logits.value.float(), atol=2e-2, rtol=2e-2)
