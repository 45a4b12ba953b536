"""Attention probabilities by other names: against transformers' own eager attention, and sources of one's own."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nnterp import RenameConfig, StandardizedTransformer, rename_utils
from nnterp.errors import RenamingError, UsageError
from nnterp.rename_utils import AttentionProbabilitiesAccessor, AttnProbFunction, default_attention_prob_source
from tests.families import tiny_inputs, tiny_model

FUNCTIONS = [getattr(rename_utils, f"{name}_attention_prob_source") for name in ("default", "bloom", "gpt2", "gptj")]


def eager(model_type: str) -> list[torch.Tensor]:
    module = tiny_model(model_type)
    module.set_attn_implementation("eager")
    with torch.no_grad():
        return list(module(tiny_inputs(), output_attentions=True).attentions)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_every_function_serves_every_family(model_type: str) -> None:
    wanted, model = eager(model_type), StandardizedTransformer(tiny_model(model_type))
    for function in FUNCTIONS:
        with model.trace(tiny_inputs()):
            found = function(model.attentions[1]).output.save()
        torch.testing.assert_close(found.value, wanted[1])
    source = default_attention_prob_source(model.attentions[1], return_module_source=True)
    assert "scaled_dot_product_attention_0" in str(source)


@torch.no_grad()
def test_what_is_set_lands(demo_gpt2: StandardizedTransformer) -> None:
    with demo_gpt2.trace("The Eiffel Tower"):
        demo_gpt2.attention_probabilities[2] = demo_gpt2.attention_probabilities[2].flip(-1)
        wanted = demo_gpt2.logits.save()
    accessor = AttentionProbabilitiesAccessor(demo_gpt2)
    with demo_gpt2.trace("The Eiffel Tower"):
        accessor[2] = accessor[2].flip(-1)
        one = demo_gpt2.logits.save()
    with demo_gpt2.trace("The Eiffel Tower"):
        source = default_attention_prob_source(demo_gpt2.attentions[2])
        source.output = source.output.flip(-1)
        other = demo_gpt2.logits.save()
    assert torch.equal(one.value, wanted.value) and torch.equal(other.value, wanted.value)


class Own(AttnProbFunction):
    """What a script says of its attention."""

    def __init__(self, choose: Callable[[Any], Any]) -> None:
        self.choose = choose

    def get_attention_prob_source(self, attention_module: Any, return_module_source: bool = False) -> Any:
        return attention_module.source if return_module_source else self.choose(attention_module)


def of_own(model: StandardizedTransformer, choose: Callable[[Any], Any]) -> AttentionProbabilitiesAccessor:
    return AttentionProbabilitiesAccessor(model, RenameConfig(attn_prob_source=Own(choose)))


class Frozen:
    """Gives probabilities, and lets nothing be set."""

    def __init__(self, module: Any) -> None:
        self.source = default_attention_prob_source(module)

    @property
    def output(self) -> Any:
        return self.source.output

    @output.setter
    def output(self, value: Any) -> None:
        """The model is left as it is."""


def test_a_source_of_ones_own_is_checked(demo_gpt2: StandardizedTransformer) -> None:
    demo_gpt2.attention_probabilities.check_source(layer=2)
    AttentionProbabilitiesAccessor(demo_gpt2).check_source(layer=-1)
    of_own(demo_gpt2, default_attention_prob_source).check_source()
    with pytest.raises(RenamingError, match=r"of shape .* and not \(batch, head, query, key\) = \(1, 4, 5, 5\)"):
        of_own(demo_gpt2, lambda module: module.source.scaled_dot_product_attention_0).check_source()
    with pytest.raises(RenamingError, match="nothing that the model goes on with"):
        of_own(demo_gpt2, Frozen).check_source()

    class Scores(Frozen):
        @property
        def output(self) -> Any:
            return self.source.output * 2

    with pytest.raises(RenamingError, match="add up to 1 only within 1"):
        of_own(demo_gpt2, Scores).check_source()


def test_disabled(demo_gpt2: StandardizedTransformer, capsys: pytest.CaptureFixture[str]) -> None:
    accessor = AttentionProbabilitiesAccessor(demo_gpt2, None, True)
    accessor.print_source()
    demo_gpt2.attention_probabilities.print_source(1)
    assert capsys.readouterr().out.count("scaled_dot_product_attention_0 ") == 2
    assert accessor.is_open(3)
    accessor.disable()
    assert not accessor.is_open(3) and demo_gpt2.attention_probabilities.is_open(3)
    for use in (lambda: accessor[3], lambda: accessor.__setitem__(3, 0)):
        with pytest.raises(UsageError, match=r"layer 3 .* after disable\(\)"):
            use()


@torch.no_grad()
def test_the_users_source_wins() -> None:
    asked: list[str] = []

    def choose(module: Any) -> Any:
        asked.append(module.path)
        return module.source.softmax_0

    module = tiny_model("gpt2")
    module.set_attn_implementation("eager")
    model = StandardizedTransformer(module, rename_config=RenameConfig(attn_prob_source=Own(choose)))
    wanted = eager("gpt2")
    with model.trace(tiny_inputs()):
        found = model.attention_probabilities[1].save()
    torch.testing.assert_close(found.value, wanted[1])
    assert asked == ["transformer.h.1.attn"] and model.attn_probs_available
    model.attention_probabilities.check_source(layer=-1)
    assert len(asked) > 2
    with model.edit() as edited:
        edited.attention_probabilities[1] = edited.attention_probabilities[1].flip(-1)
    with edited.trace(tiny_inputs()):
        turned = edited.attention_probabilities[2].save()
    assert not torch.allclose(turned.value, wanted[2])


def test_a_source_of_ones_own_is_told_with_its_line(demo_gpt2: StandardizedTransformer) -> None:
    found = demo_gpt2.attention_probabilities.source_of(1)
    own = of_own(demo_gpt2, lambda module: module.source.scaled_dot_product_attention_0).source_of(-5)
    # The operation is the same one, and so is its line in transformers' own file; what is read of it is not.
    assert own == found.replace("probabilities of", "output of", 1)
    head, line = own.splitlines()
    path = demo_gpt2.attentions[1].path
    assert head == f"attention_probabilities[1]: output of scaled_dot_product_attention_0 in {path}"
    file, number, text = re.fullmatch(r"  (.*):(\d+)   (.*)", line).groups()  # type: ignore[union-attr]
    assert Path(file).read_text(encoding="utf-8").splitlines()[int(number) - 1].strip() == text
    assert of_own(demo_gpt2, default_attention_prob_source).source_of(1) == found
    # What is no operation has no line, and nothing is said of another one.
    assert "Frozen object" in of_own(demo_gpt2, Frozen).source_of(1)


def test_a_model_is_not_held_by_its_own() -> None:
    model = StandardizedTransformer(tiny_model("gpt2"))
    gone, accessor = weakref.ref(model), model.attention_probabilities
    assert isinstance(accessor, AttentionProbabilitiesAccessor)
    del model
    assert gone() is None
