"""Edits of language models: standard names, padding, generation, added modules, and scripts of other eras."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from nnsight_core import LanguageModel, ModuleNotRunError, NNsight, RecordingError, StepNotRunError
from nnterp import StandardizedTransformer
from nnterp.errors import LayerIndexError
from tests.families import FAMILY_VARIANTS, IDS, tiny_inputs, tiny_model

ROWS = pytest.mark.parametrize(("model_type", "overrides"), [row[1:] for row in FAMILY_VARIANTS], ids=IDS)
LONG, SHORT = [5, 6, 7, 8, 9], [3, 4]


@contextmanager
def changed(layer: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """A plain hook that changes the output of ``layer``."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.fixture
def module() -> Any:
    return tiny_model("gpt2").eval()


@pytest.fixture
def model(module: Any) -> StandardizedTransformer:
    return StandardizedTransformer(module)


# Standard names.


@ROWS
@torch.no_grad()
def test_accessors_steering_and_skipping_in_every_family(model_type: str, overrides: dict[str, Any]) -> None:
    module = tiny_model(model_type, **overrides)
    model = StandardizedTransformer(module)
    ids, vector = tiny_inputs(), torch.randn(model.hidden_size)
    with model.edit() as edited:
        attention = edited.attentions_output[0]
        edited.layers_output[0] += 0.5 * attention
        edited.steer(0, vector, factor=0.5, positions=-1)
        edited.skip_layer(-1)
        edited.logits[..., 0] = 0
    with edited.trace(ids):
        hidden = edited.layers_output[-2].save()
        skipped = edited.layers_output[-1].save()
        logits = edited.logits.save()
    with model.trace(ids):
        attention = model.attentions_output[0]
        model.layers_output[0] += 0.5 * attention
        model.steer(0, vector, factor=0.5, positions=-1)
        expected_hidden = model.layers_output[-2].save()
        model.skip_layer(-1)
        model.logits[..., 0] = 0
        expected = model.logits.save()
    assert torch.equal(hidden, expected_hidden) and torch.equal(skipped, hidden)
    assert torch.equal(logits, expected)
    called = edited(input_ids=ids)
    assert torch.equal(called.logits if hasattr(called, "logits") else called[0], expected)
    assert not torch.equal(module(input_ids=ids).logits, expected)


def test_the_edited_model_is_one_of_its_kind_and_is_not_loaded_again(
    model: StandardizedTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StandardizedTransformer, "__init__", lambda *args, **kwargs: pytest.fail("made anew"))
    with model.edit() as edited:
        edited.layers_output[0] *= 0
    assert type(edited) is StandardizedTransformer
    assert edited.num_layers == model.num_layers and edited.tokenizer is model.tokenizer
    assert edited.layers_output._root._tree is edited._tree is not model._tree
    assert edited.layers[0]._module is model.layers[0]._module
    with pytest.raises(LayerIndexError), edited.edit() as twice:
        twice.layers_output[99] = 0


@torch.no_grad()
def test_every_tool_works_on_an_edited_model(model: StandardizedTransformer, module: Any) -> None:
    with model.edit() as edited:
        edited.layers_output[1][:] = 0
    with edited.trace(LONG):
        lens = edited.project_on_vocab(edited.layers_output[1]).save()
        probabilities = edited.next_token_probs.save()
    layer = module.transformer.h[1]
    with changed(layer, torch.zeros_like):
        expected = module(torch.tensor([LONG])).logits
    torch.testing.assert_close(probabilities.value, expected[:, -1].softmax(-1))
    assert lens.shape == (1, len(LONG), model.vocab_size)


# Batches.


@torch.no_grad()
def test_tokens_of_an_edit_are_those_of_each_prompt(model: StandardizedTransformer, module: Any) -> None:
    vector = torch.randn(model.hidden_size)
    with model.edit() as edited:
        edited.layers_output[0].t[0] = 0
        edited.layers_output[1].t[-1] += vector
        edited.steer(1, vector, token_positions=1)
        first = edited.layers_output[1].t[0].save()

    def alone(ids: list[int]) -> torch.Tensor:
        def zero(hidden: torch.Tensor) -> torch.Tensor:
            hidden = hidden.clone()
            hidden[:, 0] = 0
            return hidden

        def add(hidden: torch.Tensor) -> torch.Tensor:
            hidden = hidden.clone()
            hidden[:, -1] += vector
            hidden[:, 1] += vector
            return hidden

        with changed(module.transformer.h[0], zero), changed(module.transformer.h[1], add):
            result: torch.Tensor = module(torch.tensor([ids])).logits[:, -1]
        return result

    with edited.trace([LONG, SHORT]):
        together = edited.logits[:, -1].save()
    torch.testing.assert_close(together.value, torch.cat([alone(LONG), alone(SHORT)]), rtol=1e-4, atol=1e-5)
    assert first.shape == (2, model.hidden_size)
    with edited.trace() as tracer:
        with tracer.invoke(SHORT):
            short = edited.logits[:, -1].save()
        with tracer.invoke(LONG):
            long = edited.logits[:, -1].save()
    torch.testing.assert_close(torch.cat([long.value, short.value]), together.value, rtol=1e-4, atol=1e-5)
    for ids in (LONG, SHORT):
        with edited.trace(ids):
            single = edited.logits[:, -1].save()
        torch.testing.assert_close(single.value, alone(ids), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_a_trace_is_given_can_be_used(model: StandardizedTransformer) -> None:
    with model.edit() as edited:
        mask = edited.input_ids == 7
        edited.layers_output[0] = edited.layers_output[0].masked_fill(mask[..., None], 0)
    with edited.trace(LONG):
        hidden = edited.layers_output[0].save()
    with model.trace(LONG):
        expected = model.layers_output[0].save()
    expected[:, 2] = 0
    assert torch.equal(hidden, expected)
    with pytest.raises(RecordingError, match="looked at in an edit"), model.edit() as edited:
        edited.input_size  # noqa: B018 - to look


# Generation.


@torch.no_grad()
def generated(module: Any, ids: list[int], count: int, change: Callable[[int, torch.Tensor], torch.Tensor]) -> Any:
    """Greedy tokens with a plain hook on layer 1 that knows the step."""
    step = iter(range(1000))
    with changed(module.transformer.h[1], lambda hidden: change(next(step), hidden)):
        return module.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False, pad_token_id=0)


OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}


def test_it_is_done_in_every_run_of_a_generation(model: StandardizedTransformer, module: Any) -> None:
    vector = 3 * torch.randn(model.hidden_size)
    with model.edit() as edited:
        edited.layers_output[1] += vector
        kept = edited.layers_output[1].save()
    expected = generated(module, LONG, 4, lambda step, hidden: hidden + vector)
    with edited.generate(LONG, **OPTIONS) as tracer:
        norms = [edited.layers_output[1].norm().item() for step in tracer.iter[:]]
        tokens = tracer.result.save()
    assert torch.equal(tokens, expected) and len(norms) == 4
    assert torch.equal(edited.generate(LONG, trace=False, **OPTIONS), expected)
    assert kept.shape == (1, 1, model.hidden_size)
    plain = module.generate(torch.tensor([LONG]), **OPTIONS)
    assert torch.equal(model.generate(LONG, trace=False, **OPTIONS), plain) and not torch.equal(plain, expected)
    with edited.generate(**OPTIONS) as tracer:
        with tracer.invoke(LONG):
            one = tracer.result.save()
        with tracer.invoke(LONG):
            two = tracer.result.save()
    assert torch.equal(one, expected) and torch.equal(two, expected)


@pytest.mark.parametrize(
    ("steps", "chosen"),
    [(0, {0}), (2, {2}), (slice(1, 3), {1, 2}), (slice(1, None), {1, 2, 3}), (slice(0, None, 2), {0, 2})],
)
@pytest.mark.parametrize("spelling", ["loop", "block", "unpacked", "model"])
def test_it_may_be_for_some_runs_alone(
    model: StandardizedTransformer, module: Any, steps: Any, chosen: set[int], spelling: str
) -> None:
    vector = 3 * torch.randn(model.hidden_size)
    editor = model.edit(inplace=spelling == "model")
    if spelling == "loop":
        with editor as edited:
            for _ in editor.iter[steps]:
                edited.layers_output[1] += vector
            edited.layers_output[2][:] = 0
    elif spelling == "block":
        with editor as edited, editor.iter[steps]:
            edited.layers_output[1] += vector
    elif spelling == "unpacked":
        with model.edit() as (tracer, edited), tracer.iter[steps]:
            edited.layers_output[1] += vector
    else:
        with editor as edited:
            for _ in edited.iter[steps]:
                edited.layers_output[1] += vector
    expected = generated(module, LONG, 4, lambda step, hidden: hidden + vector * (step in chosen))
    if spelling == "loop":
        with changed(module.transformer.h[2], torch.zeros_like):
            expected = generated(module, LONG, 4, lambda step, hidden: hidden + vector * (step in chosen))
    with edited.generate(LONG, **OPTIONS) as tracer:
        tokens = tracer.result.save()
    assert torch.equal(tokens, expected)


def test_the_number_of_the_run_is_a_value(model: StandardizedTransformer, module: Any) -> None:
    vector = torch.randn(model.hidden_size)
    with model.edit() as (editor, edited):
        for step in editor.all():
            edited.layers_output[1] += vector * step
    expected = generated(module, LONG, 4, lambda step, hidden: hidden + vector * step)
    assert torch.equal(edited.generate(LONG, trace=False, **OPTIONS), expected)
    with pytest.raises(RecordingError, match="looked at"), model.edit() as (editor, edited):
        for step in editor.all():
            if step == 1:
                edited.layers_output[1] += vector


def test_a_run_that_does_not_come_is_an_error(model: StandardizedTransformer) -> None:
    with model.edit() as (editor, edited), editor.iter[3]:
        edited.layers_output[1] *= 0
    edited.generate(LONG, trace=False, **OPTIONS)
    with pytest.raises(StepNotRunError, match=r"step 3[\s\S]*ran 2 times"):
        edited.generate(LONG, trace=False, **{**OPTIONS, "max_new_tokens": 2})
    with pytest.raises(StepNotRunError), edited.trace(LONG):
        pass
    with model.edit() as (editor, edited), editor.iter[3:]:
        edited.layers_output[1] *= 0
    edited.generate(LONG, trace=False, **{**OPTIONS, "max_new_tokens": 2})


def test_values_of_some_runs_are_none_of_others(model: StandardizedTransformer) -> None:
    with pytest.raises(RecordingError, match="comes in some runs"), model.edit() as (editor, edited):
        with editor.iter[1]:
            hidden = edited.layers_output[1]
        edited.layers_output[2] += hidden


def test_a_module_that_does_not_run_in_a_generation(model: StandardizedTransformer) -> None:
    model.layers[0].spare = torch.nn.Identity()
    with model.edit() as edited:
        edited.layers[0].spare.output[:] = 0
    with pytest.raises(ModuleNotRunError, match=r"part of an edit"):
        edited.generate(LONG, trace=False, **OPTIONS)


def test_the_root_and_the_result_in_every_run(model: StandardizedTransformer, module: Any) -> None:
    with model.edit() as edited:
        ids = edited.input
        assert ids is not None
        edited.logits[..., 7] = 1e4
        edited.generator.output[:, -1] = 3
    tokens = edited.generate(LONG, trace=False, **OPTIONS)
    assert tokens[0].tolist() == [*LONG, 7, 7, 7, 3]
    with edited.generate(LONG, **OPTIONS):
        tokens = model.generator.output.save()
    assert tokens[0].tolist() == [*LONG, 7, 7, 7, 3]


# Added modules, as scripts of other eras have them.


class Wrapper(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class ComplexModule(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = Wrapper()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.one(x)
        return result


@pytest.mark.parametrize("batch", [[LONG], [LONG, SHORT]])
def test_an_attachment_in_an_edit(model: StandardizedTransformer, batch: list[list[int]]) -> None:
    gpt2 = LanguageModel(model._module)
    l0 = gpt2.transformer.h[0]
    l0.attachment = ComplexModule()
    with gpt2.edit("Test") as gpt2_edited:
        acts = l0.output
        l0.output[:] = l0.attachment(acts, hook=True)
    with gpt2.trace(batch):
        original = l0.output.clone().save()
        l0.output[:] *= 0.0
        original_output = gpt2.output.logits.save()
    with gpt2_edited.trace(batch):
        one = l0.attachment.one.output.clone().save()
        l0.attachment.output *= 0.0
        edited_output = gpt2_edited.output.logits.save()
    assert torch.equal(original, one)
    assert torch.equal(original_output, edited_output)
    assert type(gpt2_edited) is LanguageModel


def test_an_attachment_at_every_step_of_a_generation(model: StandardizedTransformer, module: Any) -> None:
    layer = model.layers[1]
    layer.attachment = ComplexModule()
    with model.edit() as edited:
        edited.layers_output[1] = layer.attachment(edited.layers_output[1], hook=True)
    vector = torch.randn(model.hidden_size)
    with edited.generate(LONG, **OPTIONS) as tracer:
        shapes = []
        for step in tracer.iter[:]:
            inner = layer.attachment.one.output
            shapes.append(tuple(inner.shape[:2]))
            layer.attachment.output += vector * step
        tokens = tracer.result.save()
    del layer.attachment
    assert shapes == [(1, 5), (1, 1), (1, 1), (1, 1)]
    assert torch.equal(tokens, generated(module, LONG, 4, lambda step, hidden: hidden + vector * step))


def test_a_shared_core_wrapper_sees_no_edit_of_another(model: StandardizedTransformer, module: Any) -> None:
    with model.edit(inplace=True):
        model.layers_output[0] *= 0
    other = NNsight(module)
    ids = torch.tensor([LONG])
    with torch.no_grad():
        expected = module(ids).logits
        assert torch.equal(other(ids).logits, expected)
        assert not torch.equal(model(ids).logits, expected)


def test_an_edit_reads_what_the_model_writes_over_as_it_was() -> None:
    """Falcon adds the attention into what the MLP gave, in place."""
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    model = StandardizedTransformer(tiny_model("falcon"))
    with model.trace(ids):
        mixed = model.mixers_output[1].save()
        expected = model.mlps_output[1].save()
        logits = model.logits.save()
    with model.edit() as edited:
        in_edit = edited.mixers_output[1].save(), edited.mlps_output[1].save()
    with edited.trace(ids):
        unchanged = edited.logits.save()
    assert torch.equal(in_edit[0], mixed) and torch.equal(in_edit[1], expected)
    assert torch.equal(unchanged, logits)
