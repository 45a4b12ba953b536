"""Edits: done in every later trace of the edited model, and nowhere else."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from typing import Any

import pytest
import torch

from nnsight_core import (
    EditError,
    ModuleNotRunError,
    NNsight,
    NoSuchModuleError,
    OutOfOrderError,
    RecordingError,
    ReleasedValueError,
    apply,
)
from tests.core.conftest import Chain
from tests.leaks import hooks_on


@pytest.fixture
def module() -> Any:
    return Chain().double()


@pytest.fixture
def model(module: Any) -> NNsight:
    return NNsight(module)


X = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
Y = torch.tensor([[-1.0, 0.5, 2.0], [0.0, 1.0, -1.0]], dtype=torch.float64)


def halved(model: NNsight) -> NNsight:
    """``model`` with the first layer's output halved."""
    with model.edit() as edited:
        edited.one.output[:] *= 0.5
    assert isinstance(edited, NNsight)
    return edited


def plain(module: Any, x: torch.Tensor, factor: float = 0.5) -> torch.Tensor:
    result: torch.Tensor = module.head(module.two(module.one(x) * factor))
    return result


# Where an edit holds.


def test_the_original_stays_and_the_copy_is_of_its_class_on_the_same_modules(model: NNsight, module: Any) -> None:
    edited = halved(model)
    assert type(edited) is NNsight and edited is not model and edited._module is module
    with model.trace(X):
        before = model.output.save()
    with edited.trace(X):
        hidden = edited.one.output.save()
        after = edited.output.save()
    assert torch.equal(before, module(X))
    assert torch.equal(hidden, module.one(X) * 0.5)
    assert torch.equal(after, plain(module, X))
    assert torch.equal(module(X), before)


@pytest.mark.parametrize("times", [1, 3])
def test_it_is_done_anew_in_every_trace(model: NNsight, module: Any, times: int) -> None:
    edited = halved(model)
    for _ in range(times):
        for x in (X, Y):
            with edited.trace(x):
                result = edited.output.save()
            assert torch.equal(result, plain(module, x))


def test_plain_calls_too(model: NNsight, module: Any) -> None:
    edited = halved(model)
    assert torch.equal(edited(X), plain(module, X))
    assert torch.equal(edited.trace(X, trace=False), plain(module, X))
    assert type(edited(X)) is torch.Tensor
    with torch.no_grad():
        assert not edited(X).requires_grad
    assert torch.equal(model(X), module(X))
    assert hooks_on([module]) == {}


def test_a_plain_call_inside_a_trace(model: NNsight, module: Any) -> None:
    edited = halved(model)
    with model.trace(X):
        hidden = model.one.output
        again = edited(hidden).save()
        result = model.output.save()
    assert torch.equal(again, plain(module, module.one(X)))
    assert torch.equal(result, module(X))
    with model.trace() as tracer, tracer.invoke(Y):
        again = edited(model.one.output).save()
    assert torch.equal(again, plain(module, module.one(Y)))


def test_in_invokes_live_and_taped_each_on_its_own_rows(model: NNsight, module: Any) -> None:
    edited = halved(model)
    with edited.trace() as tracer:
        with tracer.invoke(X):
            one = edited.output.save()
        with tracer.invoke(Y):
            edited.two.output[0] = 0
            two = edited.output.save()
        with tracer.invoke(X):
            hidden = edited.one.output
            assert hidden.shape == (1, 3)
            live = edited.output.save()
    torch.testing.assert_close(one.value, plain(module, X))
    torch.testing.assert_close(two[1], plain(module, Y)[1])
    torch.testing.assert_close(two[0], module.head.bias)
    torch.testing.assert_close(live.value, plain(module, X))
    assert tracer.forward_passes == 2


def test_a_cache_sees_it(model: NNsight, module: Any) -> None:
    with halved(model).trace(X) as tracer:
        cache = tracer.cache(modules=["one", "head"])
    assert torch.equal(cache.one.output, module.one(X) * 0.5)
    assert torch.equal(cache.head.output, plain(module, X))


def test_in_place_and_cleared(model: NNsight, module: Any) -> None:
    with model.edit(inplace=True) as same:
        model.one.output[:] *= 0.5
    assert same is model
    assert torch.equal(model(X), plain(module, X))
    model.clear_edits()
    assert not model.edits
    assert torch.equal(model(X), module(X))


def test_edits_stack_in_order_and_copies_go_their_own_way(model: NNsight, module: Any) -> None:
    once = halved(model)
    with once.edit() as twice:
        once.one.output[:] += 1
    with once.edit("other") as other:
        other.one.output = other.one.output * other.one.output
    hidden = module.one(X) * 0.5
    assert torch.equal(once(X), module.head(module.two(hidden)))
    assert torch.equal(twice(X), module.head(module.two(hidden + 1)))
    assert torch.equal(other(X), module.head(module.two(hidden * hidden)))
    once.clear_edits()
    assert torch.equal(once(X), module(X))
    assert torch.equal(twice(X), module.head(module.two(hidden + 1)))


def test_envoys_of_the_original_serve_and_so_do_those_of_the_copy(model: NNsight, module: Any) -> None:
    first = model.one
    with model.edit() as edited:
        first.output[:, 0] = 0
        edited.two.output[:, 1] = 0
        model.head.output[:, 2] = 0
    with edited.trace(X):
        hidden = first.output.save()
        result = edited.output.save()
    assert hidden[0, 0] == 0
    middle = module.two(hidden.value)
    middle[:, 1] = 0
    expected = module.head(middle)
    expected[:, 2] = 0
    assert torch.equal(result, expected)


def test_modules_called_out_of_place(model: NNsight, module: Any) -> None:
    with model.edit() as edited:
        early = model.head(model.one.output)
        edited.head.output += early
    with edited.trace(Y):
        result = edited.head.output.save()
    assert torch.equal(result, module(Y) + module.head(module.one(Y)))


def test_inputs_and_skips(model: NNsight, module: Any) -> None:
    with model.edit() as edited:
        edited.one.input = edited.one.input * 2
        edited.two.skip(edited.two.input + 1)
    expected = module.head(module.one(X * 2) + 1)
    assert torch.equal(edited(X), expected)
    with edited.trace(X):
        skipped = edited.two.output.save()
    assert torch.equal(skipped, module.one(X * 2) + 1)


def test_gradients_go_through_and_reach_what_is_trained(model: NNsight, module: Any) -> None:
    vector = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    with model.edit() as edited:
        edited.one.output += vector
    optimizer = torch.optim.SGD([vector], lr=0.1)
    for _ in range(2):
        before = vector.detach().clone()
        with edited.trace(X):
            hidden = edited.one.output
            loss = edited.output.sum()
            with loss.backward():
                gradient = hidden.grad.save()
        assert vector.grad is not None and torch.equal(vector.grad, gradient[0])
        optimizer.step()
        optimizer.zero_grad()
        assert not torch.equal(vector, before)
        with edited.trace(X):
            moved = edited.one.output.save()
        assert torch.equal(moved, module.one(X) + vector)


def test_a_backward_pass_in_an_edit(model: NNsight, module: Any) -> None:
    with model.edit() as edited:
        hidden = edited.one.output
        loss = edited.head(edited.two(hidden)).sum()
        with loss.backward():
            gradient = hidden.grad.save()
        edited.two.output[:] = 1
    for x in (X, Y):
        with edited.trace(x):
            result = edited.output.save()
        plain_hidden = module.one(x).detach().requires_grad_()
        module.head(module.two(plain_hidden)).sum().backward()
        assert torch.equal(gradient, plain_hidden.grad)
        assert torch.equal(result, module.head(torch.ones_like(x)))


def test_what_the_block_switches_holds_and_all_else_is_as_the_trace_has_it(model: NNsight) -> None:
    with model.edit() as edited:
        with torch.no_grad():
            edited.one.output = edited.one.output * 2
        edited.two.output = edited.two.output * 2
    with edited.trace(X):
        cut = edited.one.output.save()
        kept = edited.two.output.save()
    assert not cut.requires_grad and kept.requires_grad
    with torch.no_grad(), edited.trace(X):
        kept = edited.two.output.save()
    assert not kept.requires_grad


def test_threads_share_an_edit(model: NNsight, module: Any) -> None:
    with model.edit() as edited:
        hidden = edited.one.output
        edited.two.output += hidden.relu()
    wrong: list[str] = []

    def work(seed: int) -> None:
        x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        expected = module.head(module.two(module.one(x)) + module.one(x).relu())
        for _ in range(10):
            with edited.trace(x):
                result = edited.output.save()
            if not torch.equal(result, expected):
                wrong.append(f"thread {seed}")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong


# Constants.


def test_an_edit_keeps_tensors_as_they_were(model: NNsight, module: Any) -> None:
    vector = torch.ones(3, dtype=torch.float64)
    with model.edit() as edited:
        edited.one.output[:] += vector
        edited.two.output = vector.expand(1, 3)
    vector.zero_()
    with edited.trace(X):
        hidden, middle = edited.one.output.save(), edited.two.output.save()
    assert torch.equal(hidden, module.one(X) + 1)
    assert torch.equal(middle.value, torch.ones(1, 3, dtype=torch.float64))


class InPlace(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.one(x)
        return hidden.mul_(2)


def test_a_model_that_works_in_place_does_not_change_the_edit() -> None:
    model = NNsight(InPlace())
    with model.edit() as edited:
        edited.one.output = torch.ones(1, 3)
    for _ in range(3):
        assert torch.equal(edited(torch.zeros(1, 3)), torch.full((1, 3), 2.0))


# Values.


def test_a_saved_value_is_that_of_the_last_trace(model: NNsight, module: Any) -> None:
    with model.edit() as edited:
        hidden = edited.one.output.save()
        norm = hidden.norm().save()
    with pytest.raises(ReleasedValueError, match="no trace has given it"):
        hidden.sum()
    for x in (X, Y):
        edited(x)
        assert torch.equal(hidden.value, module.one(x))
        assert torch.equal(hidden * 2, module.one(x) * 2)
        assert type(hidden * 2) is torch.Tensor
        assert torch.equal(norm, module.one(x).norm())
        assert hidden.shape == x.shape
    with edited.trace(X) as tracer:
        edited.two.output.save()
        tracer.stop()
    assert torch.equal(hidden, module.one(X))


def test_a_trace_that_stops_before_it_leaves_no_value_of_the_trace_before(model: NNsight) -> None:
    with model.edit() as edited:
        late = edited.two.output.save()
    edited(X)
    with edited.trace(X) as tracer:
        edited.one.output.save()
        tracer.stop()
    with pytest.raises(ReleasedValueError, match="ended before it came"):
        late.sum()


def test_in_a_trace_it_is_that_of_the_trace(model: NNsight, module: Any) -> None:
    with model.edit() as edited:
        doubled = edited.one.output * 2
    with pytest.raises(ReleasedValueError, match=r"Write \.save\(\) in the edit"):
        doubled.sum()
    kept = []
    for x in (X, Y):
        with edited.trace(x):
            with pytest.raises(RecordingError, match="before the model had come to it"):
                doubled + 1
            kept.append(doubled.save())
            edited.two.output[:] += doubled
            result = edited.output.save()
        assert torch.equal(kept[-1], module.one(x) * 2)
        assert torch.equal(result, module.head(module.two(module.one(x)) + module.one(x) * 2))
    assert torch.equal(kept[0], module.one(X) * 2)
    with edited.trace() as tracer:
        with tracer.invoke(X):
            whole = doubled.save()
            edited.two.output[:] += doubled[:1]
            one = edited.output.save()
        with tracer.invoke(Y):
            two = edited.output.save()
    torch.testing.assert_close(whole.value, module.one(torch.cat([X, Y])) * 2)
    torch.testing.assert_close(one.value, module.head(module.two(module.one(X)) + module.one(X) * 2))
    torch.testing.assert_close(two.value, module(Y))


def test_a_later_edit_uses_a_value_of_an_earlier_one(model: NNsight, module: Any) -> None:
    with model.edit() as once:
        hidden = once.one.output * 3
    with once.edit() as twice:
        twice.two.output += hidden
    for x in (X, Y):
        assert torch.equal(twice(x), module.head(module.two(module.one(x)) + module.one(x) * 3))
    twice.clear_edits()
    with pytest.raises(RecordingError, match="does not have"):
        with model.edit() as alone:
            alone.two.output += hidden
        alone(X)


def test_a_module_of_ones_own_takes_the_value_of_an_edit(model: NNsight, module: Any) -> None:
    probe = torch.nn.Linear(3, 2).double()
    with model.edit() as edited:
        hidden = edited.one.output.save()
    with edited.trace(X):
        edited.two.output.save()
        scores = probe(hidden).save()
        more = (scores * 2).sum().save()
    assert torch.equal(scores, probe(module.one(X))) and torch.equal(more, (probe(module.one(X)) * 2).sum())
    assert torch.equal(probe(hidden), probe(module.one(X)))


def test_invokes_that_take_two_passes_have_the_edit_in_both(model: NNsight, module: Any) -> None:
    with model.edit() as edited:
        edited.one.output[:] *= 0.5
        hidden = edited.one.output.save()
    with edited.trace() as tracer:
        with tracer.invoke(X):
            late = edited.output.save()
        with tracer.invoke(X):
            edited.one.output[:, :] += late[:, :3]
            result = edited.output.save()
    assert tracer.forward_passes == 2
    torch.testing.assert_close(late.value, plain(module, X))
    torch.testing.assert_close(result.value, module.head(module.two(module.one(X) * 0.5 + plain(module, X)[:, :3])))
    torch.testing.assert_close(hidden.value, (module.one(X) * 0.5).expand(2, 3))


# Mistakes.


def test_looking_at_a_value_is_an_error_that_says_how_to_mend_it(model: NNsight, module: Any) -> None:
    for look in (lambda h: bool(h.sum() > 0), lambda h: h.shape, lambda h: h.item(), str):
        with (
            pytest.raises(RecordingError, match=r"looked at in an edit[\s\S]*test_edits.py[\s\S]*nnsight_core.apply"),
            model.edit() as edited,
        ):
            look(edited.one.output)
        assert not edited.edits

    def clipped(hidden: torch.Tensor) -> torch.Tensor:
        return hidden * 2 if hidden.sum() > 0 else hidden * 0

    with model.edit() as edited:
        edited.one.output = apply(clipped, edited.one.output)
    assert torch.equal(edited(X), module.head(module.two(clipped(module.one(X)))))


def test_a_module_that_does_not_run_is_an_error_at_the_end_that_names_the_line(model: NNsight, module: Any) -> None:
    with model.edit("broken") as edited:
        edited.one.output[:] = 0
        edited.unused.output[:] = 0
    with pytest.raises(ModuleNotRunError, match=r"unused\.output[\s\S]*test_edits.py[\s\S]*Edit 'broken'"):
        edited(X)
    with pytest.raises(ModuleNotRunError), edited.trace(X):
        edited.two.output.save()
    with edited.trace(X) as tracer:
        hidden = edited.one.output.save()
        tracer.stop()
    assert torch.equal(hidden.value, torch.zeros(1, 3, dtype=torch.float64))
    assert hooks_on([module]) == {}


def test_steps_of_an_edit_in_the_wrong_order(model: NNsight) -> None:
    with model.edit() as edited:
        late = edited.two.output
        edited.one.output += late
    with pytest.raises(OutOfOrderError, match=r"one\.output was asked for after[\s\S]*part of an edit"):
        edited(X)


def test_a_module_that_is_not_there_is_an_error_at_once(model: NNsight) -> None:
    with pytest.raises(NoSuchModuleError, match="one"), model.edit() as edited:
        edited.ome.output[:] = 0


def test_a_step_that_fails_says_where_it_was_written(model: NNsight) -> None:
    with model.edit() as edited:
        edited.one.output[:, 17] = 0
    with pytest.raises(IndexError) as caught:
        edited(X)
    assert any("test_edits.py" in note for note in getattr(caught.value, "__notes__", [str(caught.value)]))


def test_an_edit_that_fails_changes_nothing(model: NNsight, module: Any) -> None:
    with pytest.raises(ZeroDivisionError), model.edit(inplace=True):
        model.one.output[:] = 0
        1 / 0  # noqa: B018 - to fail
    assert not model.edits
    assert torch.equal(model(X), module(X))


def test_an_edit_of_a_copy_that_nobody_keeps(model: NNsight) -> None:
    with pytest.raises(EditError, match="inplace=True"):
        with model.edit("lost"):
            model.one.output[:] = 0
    with contextlib.ExitStack() as stack:
        edited = stack.enter_context(model.edit())
        edited.one.output[:] = 0
    assert len(edited.edits) == 1


def test_the_edited_model_does_not_run_before_its_edit_is_written(model: NNsight, module: Any) -> None:
    with model.edit() as edited:
        edited.one.output[:] = 0
        with pytest.raises(EditError, match="being edited"), edited.trace(X):
            pass
        with model.trace(X):
            vector = model.two.output.save()
        edited.two.output[:] = vector
    assert torch.equal(edited(X), module.head(module.two(module.one(X))))


def test_values_of_a_trace_that_have_yet_to_arrive_are_none_of_an_edit(model: NNsight) -> None:
    with model.trace() as tracer, tracer.invoke(X):
        pending = model.one.output
        with pytest.raises(RecordingError, match="has yet to arrive"), model.edit() as edited:
            edited.two.output += pending
        model.two.output.save()


def test_there_is_no_next_run(model: NNsight) -> None:
    with pytest.raises(EditError, match=r"editor\.iter"), model.edit() as edited:
        edited.one.next().output[:] = 0


def test_it_takes_a_name_and_no_input(model: NNsight) -> None:
    with pytest.raises(TypeError, match="takes a name"):
        model.edit(X)  # type: ignore[arg-type]


# What it looks like, and what is left.


def test_edits_are_listed_with_the_lines_they_were_written_in(model: NNsight) -> None:
    assert repr(model.edits) == "no edits"
    with model.edit("halve") as edited:
        edited.one.output[:] *= 0.5
        kept = edited.two.output.save()
    assert kept is not None and len(edited.edits) == 1 and edited.edits[0].name == "halve"
    lines = repr(edited.edits).splitlines()
    assert lines[0].startswith("Edit 'halve' at test_edits.py:")
    assert lines[1].endswith("edited.one.output[:] *= 0.5")
    assert lines[2].endswith("kept = edited.two.output.save()")


def test_older_ways_to_get_the_editor(model: NNsight) -> None:
    with model.edit() as (editor, edited):
        edited.one.output[:] = 0
    assert type(edited) is NNsight and type(editor).__name__ == "Editor"
    assert len(edited.edits) == 1
    with model.edit(return_context=True, inplace=True) as editor:
        assert type(editor).__name__ == "Editor"
    with model.edit(return_context=True) as both:
        assert [type(each).__name__ for each in both] == ["Editor", "NNsight"]


def test_nothing_is_kept(model: NNsight, module: Any) -> None:
    gc.collect()
    gc.disable()
    try:
        edited = halved(model)
        with edited.edit() as twice:
            hidden = twice.one.output.save()
        held = weakref.ref(twice.edits[1])
        with twice.trace(X):
            value = twice.one.output.save()
        tensor = weakref.ref(hidden.value)
        del hidden, value
        assert tensor() is None
        del twice
        assert held() is None
        assert hooks_on([module]) == {}
    finally:
        gc.enable()


def test_a_model_of_ones_own_class(module: Any) -> None:
    class Mine(NNsight):
        extra: str

        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__(module)
            self.extra = "mine"

    model = Mine(module)
    with model.edit() as edited:
        edited.one.output[:] = 0
    assert type(edited) is Mine and edited.extra == "mine"
