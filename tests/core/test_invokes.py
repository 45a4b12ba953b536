"""Several inputs in one forward pass: rows, values that cross, looks at values that have yet to come, mistakes."""

from __future__ import annotations

import traceback
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import nnsight_core
from nnsight_core import NNsight, OutOfOrderError, RecordingError
from nnsight_core.errors import NoTraceError, ReleasedValueError
from nnsight_core.input_errors import InputError, MissingInputError
from tests.core.test_gradients import Straight

A = torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.float64)
B = torch.tensor([[0.5, 0.25, -1.0], [2.0, 0.0, 1.0]], dtype=torch.float64)


class Boom(Exception):
    """What a body raises."""


@pytest.fixture
def net() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(3, 3) for _ in range(4))).double()


@pytest.fixture
def model(net: nn.Sequential) -> NNsight:
    return NNsight(net)


def close(one: Any, other: torch.Tensor) -> None:
    torch.testing.assert_close(getattr(one, "value", one), other, rtol=1e-10, atol=1e-12)


# Rows.


def test_each_invoke_sees_its_own_rows_and_an_invoke_without_input_all(net: nn.Sequential, model: NNsight) -> None:
    with model.trace() as tracer:
        with tracer.invoke(A):
            a = model[1].output.save()
        with tracer.invoke():
            whole = model[1].output.save()
        with tracer.invoke(B):
            b = tracer.output.save()
    assert tracer.forward_passes == 1
    close(a, net[:2](A))
    close(b, net(B))
    close(whole, net[:2](torch.cat([A, B])))


def test_a_change_in_one_invoke_leaves_every_bit_of_the_others(model: NNsight) -> None:
    def others(change: bool) -> list[torch.Tensor]:
        with model.trace() as tracer:
            with tracer.invoke(A):
                first = model.output.save()
            with tracer.invoke(B):
                if change:
                    model[0].input = 7
                    model[1].output[0] *= -3
                    model[2].output = model[2].output.relu()
            with tracer.invoke(A * 2):
                last = model.output.save()
        return [first.value, last.value]

    for plain, beside in zip(others(False), others(True), strict=True):
        assert torch.equal(plain, beside)


def test_a_saved_value_does_not_hold_the_rows_of_the_others(model: NNsight) -> None:
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(A):
            a = model[0].output.save()
        with tracer.invoke(B.repeat(50, 1)):
            pass
    assert a.value.untyped_storage().nbytes() == A.numel() * A.element_size()


# Values that cross.


def test_a_value_crosses_in_one_pass_where_the_order_permits(net: nn.Sequential, model: NNsight) -> None:
    with model.trace() as tracer:
        with tracer.invoke(A):
            early = model[0].output
        with tracer.invoke(A * 2):
            model[0].output = early
            model[2].output += early * 2
            result = model.output.save()
        mean = ((early + result) / 2).save()
    assert tracer.forward_passes == 1
    expected = net[3](net[:3](A) + net[0](A) * 2)
    close(result, expected)
    close(mean, (net[0](A) + expected) / 2)


def test_a_late_value_crosses_to_an_early_place_in_a_further_pass(net: nn.Sequential, model: NNsight) -> None:
    with model.trace() as tracer:
        with tracer.invoke(A):
            late = model[3].output
        with tracer.invoke(A * 2):
            model[0].output = late
            later = model.output
        with tracer.invoke(A * 3):
            model[0].output = later
            tracer.barrier(3)()
            result = model.output.save()
    assert tracer.forward_passes == 3
    close(result, net[1:](net[1:](net(A))))


def test_a_body_done_again_in_a_further_pass_makes_its_changes_once(net: nn.Sequential, model: NNsight) -> None:
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(A):
            total = torch.zeros_like(model[0].output).save()
            late = model[3].output
        with tracer.invoke(A * 2):
            total.add_(model[0].output)
            model[2].output = late
    close(total, net[0](A * 2))


def test_a_further_pass_keeps_the_changes_of_all_bodies_in_the_whole_batch(model: NNsight) -> None:
    with model.trace() as tracer:
        with tracer.invoke(A):
            late = model[3].output
        with tracer.invoke(B):
            model[0].output[:] = 0
            own = model.output.save()
        with tracer.invoke():
            model[2].output[0] = late[0]
            whole = model.output.save()
    close(whole.value[1:], own.value)


def test_what_was_written_into_a_crossing_value_is_there_for_the_next_body(net: nn.Sequential, model: NNsight) -> None:
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(A):
            total = model[0].output * 0
        with tracer.invoke(A * 2):
            total.add_(model[2].output)
        with tracer.invoke(A):
            model[0].output = total
            after = model[0].output.save()
    close(after, net[:3](A * 2))


# What is recorded is what was meant when the line ran.


def test_a_pending_value_that_goes_into_a_tensor_is_in_it(net: nn.Sequential, model: NNsight) -> None:
    mine, total = torch.zeros_like(A), torch.zeros_like(A)
    with torch.no_grad(), model.trace() as tracer:
        with tracer.invoke(A):
            hidden = model[0].output.save()
            mine[:] = hidden
            total += hidden
            model[1].output = mine * 2
            result = model[1].output.save()
    assert torch.equal(result.value, hidden.value * 2)
    close(total + 0, net[0](A))


def filled(value: torch.Tensor, given: np.ndarray[Any, Any]) -> torch.Tensor:
    return value * 0 + torch.from_numpy(given)


def test_what_is_changed_after_its_use_was_used_as_it_was(model: NNsight) -> None:
    vector, results = torch.zeros_like(A), []
    with model.trace() as tracer:
        for number in (1, 2):
            vector.fill_(number)
            with tracer.invoke(A):
                model[0].output = model[0].output * 0 + vector
                results.append(model[0].output.save())
    assert [each.value.unique().tolist() for each in results] == [[1.0], [2.0]]
    array, results = np.zeros(3), []
    with model.trace() as tracer:
        for number in (1, 2):
            array[:] = number
            with tracer.invoke(A):
                model[0].output = nnsight_core.apply(filled, model[0].output, array)
                results.append(model[0].output.save())
    assert [each.value.unique().tolist() for each in results] == [[1.0], [2.0]]
    columns = [0]
    with model.trace() as tracer, tracer.invoke(A):
        model[0].output[:, columns] = 0
        columns[0] = 1
        result = model[0].output.save()
    assert (result.value == 0).tolist() == [[True, False, False]]


def test_the_grad_mode_and_autocast_of_a_line_hold_for_it(model: NNsight) -> None:
    with model.trace() as tracer, tracer.invoke(A):
        with torch.no_grad():
            alone = (model[0].output * 2).save()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            product = (model[0].output.float() @ torch.ones(3, 3)).save()
        joined = (model[0].output * 2).save()
    assert joined.value.requires_grad
    assert product.value.dtype == torch.bfloat16
    assert not alone.value.requires_grad


def test_a_function_with_its_own_gradient_keeps_it_once_the_value_is_there(model: NNsight) -> None:
    x = A.clone().requires_grad_()
    with pytest.raises(RecordingError, match=r"Look at the value first"):
        with model.trace() as tracer, tracer.invoke(x):
            Straight.apply(model[0].input)
    with model.trace() as tracer, tracer.invoke(x):
        hidden = model[0].input
        assert hidden.shape == A.shape  # a look
        rounded = nnsight_core.save(Straight.apply(hidden))
    (grad,) = torch.autograd.grad(rounded.sum(), x)
    close(grad, torch.ones_like(A))


# Looking at values that have yet to come.

LOOKS = {
    "if": lambda value: not value.sum() < -1e9,
    "item": lambda value: int(value.sum().item() * 1e6),
    "float": lambda value: float(value.detach().sum()),
    "numpy": lambda value: np.asarray(value.detach()).tolist(),
    "loop": lambda value: [float(each) for each in value.detach()[0]],
    "len": len,
    "str": lambda value: str(value)[:20],
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_look_runs_what_is_gathered_and_the_body_goes_on_live(look: Any, net: nn.Sequential, model: NNsight) -> None:
    with model.trace() as tracer:
        with tracer.invoke(B):
            before = model.output.save()
        with tracer.invoke(A):
            assert look(model[0].output) == look(net[0](A))
            # What was gathered before goes first, so that nothing of it can come too late for this body.
            assert tracer.forward_passes == 2
            model[2].output[:] = 2
            result = model.output.save()
        with tracer.invoke(A):
            after = model.output.save()
    assert tracer.forward_passes == 3
    close(before, net(B))
    close(result, net[3](torch.full_like(A, 2)))
    close(after, net(A))


def test_the_class_of_a_value_is_a_look_at_it() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
            return x, 1

    model = NNsight(Two())
    with model.trace() as tracer, tracer.invoke(A):
        output = model.output
        hidden = (output[0] if isinstance(output, tuple) else output).save()
    close(hidden, A)


def test_the_fields_of_a_result_are_found_under_their_names(net: nn.Sequential, model: NNsight) -> None:
    with model.trace() as tracer, tracer.invoke(A):
        top = model.output.topk(2)
        values, indices = top.values.save(), top.indices.save()
    close(values, net(A).topk(2).values)
    assert torch.equal(indices.value, net(A).topk(2).indices)


def test_dtype_device_and_shape_are_real(model: NNsight) -> None:
    with model.trace() as tracer, tracer.invoke(A):
        hidden = model[0].output
        made = torch.zeros(hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
        model[0].output = made.expand(hidden.shape)
        result = model[0].output.save()
    assert result.value.dtype == torch.float64 and not result.value.any()


@pytest.mark.parametrize("looks_again", [False, True])
def test_a_late_value_is_used_after_a_look_at_an_early_one(
    looks_again: bool, net: nn.Sequential, model: NNsight
) -> None:
    with model.trace() as tracer:
        with tracer.invoke(A):
            late = model[3].output
        with tracer.invoke(A * 2):
            assert model[0].output.sum() > -1e9
            if not looks_again or late.sum() > -1e9:
                model[2].output = late
            result = model.output.save()
    close(result, net[3:](net(A)))


# stop().


def test_stop_in_an_invoke_ends_the_pass_for_those_gathered(net: nn.Sequential, model: NNsight) -> None:
    with model.trace() as tracer:
        with tracer.invoke(A):
            first = model[0].output.save()
        with tracer.invoke(B):
            second = model[1].output.save()
            tracer.stop()
    assert tracer.forward_passes == 1
    close(first, net[0](A))
    close(second, net[:2](B))


# Mistakes.


def line_of(text: str) -> str:
    """``file:line`` of the line of this file that ends in the comment ``# text``."""
    with open(__file__, encoding="utf-8") as source:
        number = next(number for number, line in enumerate(source, 1) if line.endswith(f"# {text}\n"))
    return f"test_invokes.py:{number}"


def test_a_value_asked_for_too_late_is_an_error_that_names_the_lines(model: NNsight) -> None:
    with pytest.raises(OutOfOrderError) as caught, model.trace() as tracer:
        with tracer.invoke(A):
            model.output.save()
        with tracer.invoke(B):
            model[2].output.save()  # the later one
            model[1].output.save()  # the earlier one
    assert line_of("the later one") in str(caught.value)
    assert line_of("the earlier one") in str(caught.value)


def test_what_a_recorded_step_raises_names_the_line_where_it_was_written(model: NNsight) -> None:
    with pytest.raises(RuntimeError) as caught, model.trace() as tracer:
        with tracer.invoke(A):
            hidden = model[2].output
            wrong = hidden + torch.ones(7)  # does not fit
        with tracer.invoke(B):
            wrong.save()
    assert line_of("does not fit") in "".join(traceback.format_exception(caught.value))


MISFITS = {
    "widths": ((A,), (torch.zeros(1, 4, dtype=torch.float64),), "shapes"),
    "kinds": ((A,), ([1.0],), "one form"),
    "numbers of arguments": ((A,), (A, A), "differ in number"),
    "no tensor at all": (("text",), ("more text",), "tensor|batch"),
}


@pytest.mark.parametrize("first, second, says", MISFITS.values(), ids=MISFITS)
def test_inputs_that_do_not_fit_together(first: Any, second: Any, says: str, model: NNsight) -> None:
    with pytest.raises(InputError, match=says), model.trace() as tracer:
        for inputs in (first, second):
            with tracer.invoke(*inputs):
                model.output.save()


def test_a_trace_needs_an_input_somewhere(model: NNsight) -> None:
    with pytest.raises(MissingInputError), model.trace():
        pass
    with pytest.raises(MissingInputError), model.trace() as tracer, tracer.invoke():
        model.output.save()


def test_invokes_stand_side_by_side_in_a_trace_without_an_input(model: NNsight) -> None:
    with pytest.raises(RuntimeError, match="inside another"), model.trace() as tracer, tracer.invoke(A):
        with tracer.invoke(B):
            pass
    with pytest.raises(RuntimeError, match="has an input already"), model.trace(A) as tracer, tracer.invoke(B):
        pass
    with pytest.raises(NoTraceError, match=r"0\.output"), model.trace() as tracer:
        with tracer.invoke(A):
            model[1].output.save()
        model[0].output.save()


@pytest.mark.parametrize("looks", [False, True])
def test_an_exception_in_one_body_leaves_the_model_as_it_was(looks: bool, net: nn.Sequential, model: NNsight) -> None:
    with pytest.raises(Boom), model.trace() as tracer:
        with tracer.invoke(A):
            first = model[0].output.save()
            unsaved = model[0].output
        with tracer.invoke(B):
            second = model[2].output.save()
            if looks:
                assert first.sum() > -1e9
            raise Boom
    assert tracer.forward_passes == 2 * int(looks)
    if looks:
        close(first, net[0](A))
        close(second, net[:3](B))
    else:
        with pytest.raises(ReleasedValueError, match=r"^((?!it was not saved)(.|\n))*$"):
            assert first.value
    for lost in (unsaved,) if looks else (unsaved, second):
        with pytest.raises(ReleasedValueError):
            assert lost.value is None
