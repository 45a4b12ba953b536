"""Every family keeps every promise, or its specification says why it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nnsight_core import kernels
from nnterp import StandardizedTransformer
from nnterp.architectures import specs_folder
from nnterp.errors import CannotError, MissingPartError, ValidationError
from nnterp.spec import PROMISES as NAMED
from tests.matrix import hooks, table
from tests.matrix.models import MODEL_TYPES, Case, read_json
from tests.matrix.promises import PROMISES, restored


def test_the_table_has_every_promise_that_a_specification_may_take_back() -> None:
    assert set(PROMISES) == set(NAMED)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_promise(model_type: str) -> None:
    case = Case(model_type)
    outcome, broken = table.outcome(case)
    assert not broken, "\n".join(broken)
    expected = table.results()[model_type] | dict.fromkeys(case.cannot, "cannot") | dict.fromkeys(case.absent, "absent")
    expected |= dict.fromkeys(case.holds, "holds")
    assert outcome == expected, "the table is stale: python -m tests.matrix.table"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", [row for row in table.SIZES if row[0] in MODEL_TYPES], ids=table.size_id)
def test_other_sizes(row: tuple[str, dict[str, Any]]) -> None:
    """Grouped heads, tied embeddings, other widths and depths: nothing fits one size only."""
    case = Case(row[0], **row[1])
    for name, fact in table.FACTS.get(table.size_id(row), {}).items():
        if name == "mlp":
            for row in case.facts["parts"]:
                row["mlp"] = fact
        else:
            case.facts[name] = fact
    _, broken = table.outcome(case)
    assert not broken, "\n".join(broken)
    heads = case.model.num_heads
    assert case.model.num_layers == case.num_layers == len(case.model.layers_output)
    assert heads == 0 or case.model.num_kv_heads in range(1, heads + 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("model_type", "promise"), [("gpt2", "layers"), ("llama", "mlps"), ("jamba", "mixers"), ("opt", "logits")]
)
def test_a_broken_promise_would_be_seen(model_type: str, promise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(model_type)
    facts = read_json("modules.json")[model_type]
    # The truth is read one layer further down, or from a model that has moved on.
    if promise == "logits":
        case.logits.add_(1)
    else:
        name = {"layers": "layers", "mlps": "mlp", "mixers": "mixer"}[promise]
        wrong = [dict(each) for each in facts["parts"]]
        wrong[0], wrong[1] = wrong[1], wrong[0]
        path = facts["layers"] + ".0" if name == "layers" else facts["layers"]
        case.facts = {**facts, "layers": path if name == "layers" else facts["layers"] + ".0", "parts": wrong}
    with pytest.raises((AssertionError, AttributeError)):
        PROMISES[promise](case)
    restored(Case(model_type))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("promise", ["attention_scores", "attention_probabilities"])
def test_attention_that_is_a_little_off_would_be_seen(promise: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, right = Case("llama"), kernels._Call.scores
    monkeypatch.setattr(kernels._Call, "scores", lambda call: right(call) * 1.001)
    with pytest.raises(AssertionError, match=rf"{promise}\[0\]: off by"):
        PROMISES[promise](case)


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_had_is_refused_with_the_reason() -> None:
    case = Case("reformer")
    reason = case.spec.cannot["skip"]
    with pytest.raises(CannotError) as refused:
        with case.model.trace(case.ids):
            case.model.skip_layer(1)
    assert reason in str(refused.value) and "reformer.yaml:" in str(refused.value)


@pytest.mark.filterwarnings("ignore")
def test_a_layer_without_attention_says_what_it_has_instead() -> None:
    case = Case("jamba")
    with pytest.raises(MissingPartError, match=r"state-space mixer instead, which mixers_output\[0\] reads"):
        with case.model.trace(case.ids):
            case.model.attentions_output[0].save()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("model_type", "block"), [("zamba", "shared_transf"), ("zamba2", "shared_transformer")])
def test_the_attention_that_layers_share_is_read_and_set_in_each_by_its_own_name(model_type: str, block: str) -> None:
    case = Case(model_type)
    layers = {
        getattr(each, block): index for index, each in enumerate(case.module.model.layers) if hasattr(each, block)
    }
    for layer in layers.values():
        with pytest.raises(MissingPartError, match=block), case.model.trace(case.ids):
            case.model.attentions_output[layer].save()
        place = (f"model.layers.{layer}.{block}.self_attn", "output")
        truth = hooks.read(case.module, [place], case.ids)[place]
        expected = hooks.changed_logits(case.module, place, lambda each: each * 2, case.ids)
        with torch.no_grad(), case.model.trace(case.ids):
            attention = case.model.layers[layer].get(f"{block}.self_attn")
            seen = attention.output[0].clone().save()
            attention.output[0][:] = attention.output[0] * 2
            logits = case.model.logits.save()
        assert torch.equal(seen, truth) and torch.equal(logits, expected) and not torch.equal(logits, case.logits)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", ["transformer.h.0.mlp", "transformer.h.0.mlp.dense_4h_to_h"])
def test_what_a_model_writes_into_is_read_as_it_was(path: str) -> None:
    """Falcon adds the attention into what the MLP gave; by the module's own name as well, it is what it was."""
    case = Case("falcon")
    truth = hooks.read(case.module, [(path, "output")], case.ids)[path, "output"]
    with torch.no_grad(), case.model.trace(case.ids):
        seen = case.model.get(path).output.save()
        logits = case.model.logits.save()
    assert torch.equal(seen, truth) and torch.equal(logits, case.logits)


@pytest.mark.filterwarnings("ignore")
def test_a_module_that_is_written_into_has_to_be_listed(tmp_path: Path) -> None:
    text = (specs_folder() / "falcon.yaml").read_text(encoding="utf-8")
    line = "written_over: [mlp, mlp.dense_4h_to_h]\n"
    assert text.count(line) == 1
    path = tmp_path / "falcon.yaml"
    path.write_text(text.replace(line, ""), encoding="utf-8")
    with pytest.raises(ValidationError, match="the model writes into it later"):
        StandardizedTransformer(Case("falcon").module, spec=path)
