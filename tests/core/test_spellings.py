"""Spellings of other eras: each does what it did, and gives the numbers that the plain model gives."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import nnsight_core
from nnsight_core import LanguageModel, NNsight, NoTraceError, ReleasedValueError
from nnterp import StandardizedTransformer
from nnterp.demo_models import demo_model_path
from tests.oracle import logits_with_hook, seen_by_hook

TOWER = "The Eiffel Tower is in the city of"
STORE = "John and Mary went to the store. John handed the milk to"
X = torch.linspace(-1, 1, 6).reshape(2, 3)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel(demo_model_path("demo-gpt2"))


@pytest.fixture
def small() -> NNsight:
    return NNsight(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)))


def ids_of(model: LanguageModel, text: str) -> torch.Tensor:
    assert model.tokenizer is not None
    return torch.tensor([model.tokenizer.encode(text)])


# Plain objects.


@dataclass
class Record:
    first: Any = None
    others: list[Any] = field(default_factory=list)


class Slotted:
    __slots__ = ("first", "nothing")


def fill_list(kept: Any, hidden: Any) -> None:
    kept.append(hidden)


def fill_dict(kept: Any, hidden: Any) -> None:
    kept["first"] = hidden


def fill_nested(kept: Any, hidden: Any) -> None:
    kept["layers"].append((hidden, {"again": [hidden * 2]}))


def fill_object(kept: Any, hidden: Any) -> None:
    kept.first = hidden


def fill_record(kept: Any, hidden: Any) -> None:
    kept.append(Record(hidden, [hidden + 1]))


FILLED: dict[str, tuple[Any, Any, Any]] = {
    "a list": (list, fill_list, lambda kept: kept[0]),
    "a dict": (dict, fill_dict, lambda kept: kept["first"]),
    "a dict that makes its entries": (
        lambda: defaultdict(list),
        fill_nested,
        lambda kept: kept["layers"][0][1]["again"][0] / 2,
    ),
    "an object": (SimpleNamespace, fill_object, lambda kept: kept.first),
    "an object with slots": (Slotted, fill_object, lambda kept: kept.first),
    "a record in a list": (list, fill_record, lambda kept: kept[0].others[0] - 1),
}


@pytest.mark.parametrize("name", FILLED)
@pytest.mark.parametrize("way", ["live", "in an invoke", "before the invokes"])
def test_an_object_may_be_saved_first_and_filled_later(name: str, way: str, small: NNsight) -> None:
    make, fill, first = FILLED[name]
    if way == "live":
        with small.trace(X) as tracer:
            kept = tracer.save(make())
            fill(kept, small[0].output)
    else:
        with small.trace() as tracer:
            kept = nnsight_core.save(make()) if way == "before the invokes" else None
            with tracer.invoke(X):
                kept = nnsight_core.save(make()) if kept is None else kept
                fill(kept, small[0].output)
    torch.testing.assert_close(first(kept) + 0, small._module[0](X))


def test_what_is_not_saved_is_let_go_all_the_same(small: NNsight) -> None:
    with small.trace(X):
        kept, other = nnsight_core.save([]), []
        kept.append(small[0].output)
        other.append(small[0].output * 2)
        assert nnsight_core.save("text") == "text" and nnsight_core.save(3) == 3
    assert kept[0].shape == (2, 3)
    with pytest.raises(ReleasedValueError):
        assert other[0].shape
    with small.trace(X):
        kept.append(small[0].output)
    with pytest.raises(ReleasedValueError):
        assert kept[1].shape


def test_a_list_over_the_steps_of_a_generation(model: LanguageModel) -> None:
    with model.generate(TOWER, max_new_tokens=3, do_sample=False) as tracer:
        kept = nnsight_core.save([])
        for _ in tracer.iter[:]:
            kept.append(model.lm_head.output[:, -1])
        tokens = tracer.result.save()
    assert [each.argmax().item() for each in kept] == tokens[0, -3:].tolist()


def test_an_object_that_holds_itself_or_the_model(small: NNsight) -> None:
    with small.trace(X):
        kept = nnsight_core.save(SimpleNamespace(model=small, module=small._module))
        kept.itself, kept.list = kept, [1]
        kept.list.append(kept.list)
        kept.hidden = small[0].output
    assert kept.hidden.shape == (2, 3)


def test_after_an_error_what_came_is_kept(small: NNsight) -> None:
    with pytest.raises(ZeroDivisionError), small.trace(X):
        kept = nnsight_core.save([])
        kept.append(small[0].output)
        assert 1 / 0
    torch.testing.assert_close(kept[0].value, small._module[0](X))


# apply and log.


def furthest(value: torch.Tensor, *, power: int = 1) -> torch.Tensor:
    assert type(value) is torch.Tensor
    return torch.tensor(max(value.flatten().tolist())) ** power


@pytest.mark.parametrize("apply", ["nnsight_core", "tracer"])
def test_a_function_of_ones_own(apply: str, small: NNsight) -> None:
    first = small._module[0](X)
    with small.trace(X) as tracer:
        call = nnsight_core.apply if apply == "nnsight_core" else tracer.apply
        live = call(furthest, small[0].output, power=2).save()
    with small.trace() as tracer, tracer.invoke(X):
        call = nnsight_core.apply if apply == "nnsight_core" else tracer.apply
        taped = call(furthest, small[0].output, power=2).save()
    assert live.item() == taped.item() == pytest.approx(first.max().item() ** 2)
    assert tracer.forward_passes == 1


def test_logging_prints_when_the_values_are_there(small: NNsight, capsys: pytest.CaptureFixture[str]) -> None:
    first = small._module[0](X)
    expected = f"before 1\nfirst {first}\nafter\n"
    with small.trace(X) as tracer:
        tracer.log("before", 1)
        tracer.log("first", small[0].output)
        tracer.log("after")
        assert capsys.readouterr().out == expected
    with small.trace() as tracer:
        with tracer.invoke(X):
            tracer.log("before", 1)
            tracer.log("first", small[0].output)
            tracer.log("after")
        assert capsys.readouterr().out == ""
    assert capsys.readouterr().out == expected
    assert tracer.forward_passes == 1
    with small.trace() as tracer, tracer.invoke(X):
        nnsight_core.log("first", small[0].output)
    nnsight_core.log("no", "trace")
    assert capsys.readouterr().out == f"first {first}\nno trace\n"


# The oldest era: a runner, and its output after the block.


def test_a_runner_has_the_output_after_the_block(model: LanguageModel) -> None:
    ids = ids_of(model, TOWER)
    mlp = model._module.transformer.h[-1].mlp
    with model.forward(inference=False) as runner:
        with runner.invoke(TOWER) as invoker:
            hidden = model.transformer.h[1].input.save()
            model.transformer.h[-1].mlp.output = 0
    expected = logits_with_hook(model._module, ids, mlp, lambda m, args, output: output * 0)
    torch.testing.assert_close(runner.output.logits, expected)
    (before,) = seen_by_hook(model._module.transformer.h[0], lambda: model._module(ids))
    torch.testing.assert_close(hidden.value[0][0], before)
    assert invoker.input["input_ids"].tolist() == ids.tolist()
    with model.forward(TOWER) as runner:
        inside = runner.output.logits.save()
    torch.testing.assert_close(runner.output.logits, inside.value)


def test_the_output_of_a_batch_that_took_two_passes(small: NNsight) -> None:
    with small.forward() as runner:
        with runner.invoke(X):
            late = small[1].output[:, :1]
        with runner.invoke(X):
            small[0].output[:] = late
    assert runner.forward_passes == 2
    net = small._module
    torch.testing.assert_close(runner.output[:2], net(X))
    torch.testing.assert_close(runner.output[2:], net[1](net(X)[:, :1].expand(2, 3)))


def test_several_batches_have_no_one_output(small: NNsight) -> None:
    with small.forward() as runner:
        for _ in range(2):
            with runner.invoke(X):
                assert small[0].output.sum().item()
    with pytest.raises(RuntimeError, match=r"2 batches, not one. Save model.output in each invoke"):
        assert runner.output


def test_without_that_spelling_nothing_is_held(small: NNsight) -> None:
    with small.trace(X) as tracer:
        assert tracer.output.shape == (2, 2)
    with pytest.raises(NoTraceError, match=r"model.output was asked for outside a trace"):
        assert tracer.output
    with pytest.raises(ZeroDivisionError), small.forward(X) as runner:
        assert 1 / 0
    with pytest.raises(NoTraceError):
        assert runner.output
    with small.forward(X) as runner:
        runner.stop()
    with pytest.raises(NoTraceError):
        assert runner.output


def test_a_generator_has_the_tokens_after_the_block(model: LanguageModel) -> None:
    with model.generate(max_new_tokens=3, do_sample=False) as generator:
        with generator.invoke(TOWER) as invoker:
            first = model.lm_head.output[:, -1].argmax(-1).save()
            invoker.next()
            second = model.lm_head.output[:, -1].argmax(-1).save()
    ids = ids_of(model, TOWER)
    expected: Any = model._module.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert torch.equal(generator.output, expected)
    assert [first.item(), second.item()] == expected[0, -3:-1].tolist()
    assert torch.equal(model.generate(TOWER, max_new_tokens=3, do_sample=False, trace=False), expected)


def test_what_an_invoke_was_given(model: LanguageModel, small: NNsight) -> None:
    with model.trace() as tracer:
        with tracer.invoke(TOWER) as invoker:
            logits = model.lm_head.output.save()
        with tracer.invoke() as everybody:
            pass
    ids = ids_of(model, TOWER)
    for found in (invoker.inputs[0][0]["input_ids"], invoker.inputs[0]["input_ids"], invoker.input["input_ids"]):
        assert torch.equal(found, ids)
    assert everybody.input is None and everybody.inputs == ((), {})
    torch.testing.assert_close(logits.value, model._module(ids).logits)
    with small.trace() as tracer, tracer.invoke(X) as invoker:
        small.output.save()
    assert torch.equal(invoker.input, X) and torch.equal(invoker.inputs[0][0], X)


# Options.


def test_options_of_the_tokenizer(model: LanguageModel) -> None:
    assert model.tokenizer is not None
    options = {"truncation": True, "max_length": 4}
    expected = ids_of(model, TOWER)[:, :4].tolist()

    def given() -> Any:
        return model.input[1]["input_ids"].save()

    with model.trace(TOWER, invoker_args=options):
        found = [given()]
    with model.forward(TOWER, invoker_args=options):
        found.append(given())
    with model.trace(TOWER, **options):
        found.append(given())
    with model.trace(invoker_args=options) as tracer, tracer.invoke(TOWER):
        found.append(given())
    with model.trace() as tracer, tracer.invoke(TOWER, invoker_args=options):
        found.append(given())
    with model.trace() as tracer, tracer.invoke(TOWER, **options):
        found.append(given())
    with model.generate(TOWER, max_new_tokens=1, invoker_args=options):
        found.append(given())
    with model.generate(max_new_tokens=1, invoker_args=options) as tracer, tracer.invoke(TOWER):
        found.append(given())
    with model.generate(max_new_tokens=1) as tracer, tracer.invoke(TOWER, invoker_args=options):
        found.append(given())
    assert [each.tolist() for each in found] == [expected] * 9
    output = model.trace(TOWER, trace=False, invoker_args=options)
    assert output.logits.shape[1] == 4


@pytest.mark.parametrize(
    "options",
    [
        {"padding": True},
        {"padding": True, "return_tensors": "pt", "return_attention_mask": False},
        {"padding": "max_length", "max_length": 20},
        {"padding": True, "padding_side": "left", "scan": False, "validate": False},
    ],
)
def test_padding_by_the_tokenizer_is_padding(model: LanguageModel, options: dict[str, Any]) -> None:
    with model.trace([STORE, TOWER], invoker_args=options):
        mask = model.input[1]["attention_mask"].save()
        logits = model.lm_head.output.save()
    lengths = [ids_of(model, text).shape[1] for text in (STORE, TOWER)]
    assert mask.sum(-1).tolist() == lengths and mask[:, -1].all()
    assert mask.shape[1] == options.get("max_length", max(lengths))
    for row, text in enumerate((STORE, TOWER)):
        own = logits[row, -lengths[row] :]
        torch.testing.assert_close(own, model._module(ids_of(model, text)).logits[0], atol=1e-4, rtol=1e-4)


def test_options_for_all_invokes(model: LanguageModel) -> None:
    with model.trace(output_hidden_states=True) as tracer, tracer.invoke(TOWER):
        states = model.output.hidden_states[1].save()
    (expected,) = seen_by_hook(model._module.transformer.h[0], lambda: model._module(ids_of(model, TOWER)))
    torch.testing.assert_close(states.value, expected)


OLD = {"scan": False, "validate": True, "remote": False}


def test_options_that_change_nothing_here(model: LanguageModel, small: NNsight) -> None:
    expected = small._module(X)
    with small.trace(X, **OLD):
        found = [small.output.save()]
    with small.trace(**OLD) as tracer, tracer.invoke(X, scan=True, validate=False):
        found.append(small.output.save())
    with small.forward(X, **OLD) as runner:
        pass
    found += [runner.output, small.trace(X, trace=False, **OLD)]
    with small.trace(X, invoker_args={"scan": False}):
        found.append(small.output.save())
    for each in found:
        torch.testing.assert_close(each + 0, expected)
    with model.generate(TOWER, max_new_tokens=2, **OLD) as tracer:
        assert tracer.result.shape[1] == ids_of(model, TOWER).shape[1] + 2


def test_a_model_that_takes_such_an_option_itself_gets_it() -> None:
    class Scans(torch.nn.Module):
        def forward(self, x: torch.Tensor, scan: bool = False, remote: int = 0) -> torch.Tensor:
            return x * (2 if scan else 1) + remote

    with NNsight(Scans()).trace(X, scan=True, remote=3) as tracer:
        found = tracer.output.save()
    assert torch.equal(found.value, X * 2 + 3)


def test_a_model_is_loaded_whatever_is_said_about_when() -> None:
    loaded = LanguageModel(demo_model_path("demo-gpt2"), device_map="auto", dispatch=True)
    for model in (
        loaded,
        LanguageModel(demo_model_path("demo-gpt2"), dispatch=False),
        LanguageModel(loaded._module, loaded.tokenizer, dispatch=True),
        StandardizedTransformer("demo-gpt2", dispatch=True),
    ):
        with model.trace(TOWER):
            assert model.lm_head.output.shape[1] == ids_of(model, TOWER).shape[1]


# Steps, barriers, names on the tracer.


def test_steps_by_next_and_by_list(model: LanguageModel) -> None:
    given: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with model.generate(TOWER, **given) as tracer:
        first = model.lm_head.output[:, -1].argmax(-1).save()
        third = model.transformer.ln_f.next(2).output.save()
        tracer.next(3)
        fourth = model.transformer.ln_f.output.save()
    ids = ids_of(model, TOWER)
    given["attention_mask"] = torch.ones_like(ids)
    normed = seen_by_hook(model._module.transformer.ln_f, lambda: model._module.generate(ids, **given))
    logits = seen_by_hook(model._module.lm_head, lambda: model._module.generate(ids, **given))
    assert first.item() == logits[0][:, -1].argmax().item()
    torch.testing.assert_close(third.value, normed[2])
    torch.testing.assert_close(fourth.value, normed[3])
    del given["attention_mask"]
    for wanted in ([0, 2], (0, 2), range(0, 4, 2)):
        with model.generate(TOWER, **given) as tracer:
            found = nnsight_core.save([])
            for step in tracer.iter[wanted]:
                found.append(model.lm_head.output)
                assert step in wanted
        for each, expected in zip(found, (logits[0], logits[2]), strict=True):
            torch.testing.assert_close(each.value, expected)


def test_a_barrier_does_no_harm(small: NNsight) -> None:
    with small.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(X):
            first = small[0].output
            barrier()
        with tracer.invoke(X * 2):
            barrier()
            small[0].output = first
            found = small.output.save()
    torch.testing.assert_close(found.value, small._module(X))
    assert tracer.forward_passes == 1


def test_modules_by_way_of_the_tracer(model: LanguageModel) -> None:
    with model.trace(TOWER) as tracer:
        tracer.transformer.h[2].mlp.output[:] = 0
        found = tracer.output.logits.save()
    mlp = model._module.transformer.h[2].mlp
    expected = logits_with_hook(model._module, ids_of(model, TOWER), mlp, lambda m, args, output: output * 0)
    torch.testing.assert_close(found.value, expected)


def test_a_block_without_an_input_in_a_trace_that_has_one(model: LanguageModel) -> None:
    """Scripts put what is to come after a loop over steps into a block of its own."""
    with model.generate(TOWER, max_new_tokens=2, do_sample=False) as tracer:
        with tracer.invoke():
            for _ in tracer.iter[:]:
                last = model.lm_head.output[:, -1].argmax(-1).save()
        with tracer.invoke() as invoker:
            tokens = model.generator.output.save()
    assert tokens[0, -1].item() == last.item()
    assert torch.equal(invoker.input["input_ids"], ids_of(model, TOWER))


def test_a_cache_by_paths_that_begin_with_the_models_own_name(model: LanguageModel) -> None:
    with model.trace(TOWER) as tracer:
        cache = tracer.cache()
        logits = model.output.logits.save()
    assert torch.equal(cache.model.transformer.h[0].output, cache["model.transformer.h.0"].output)
    assert torch.equal(cache.transformer.h[0].output, cache["transformer.h.0"].output)
    for whole in (cache.model.output, cache.output, cache["model"].output):
        assert torch.equal(whole.logits, logits)
