"""A session: values of one trace live on in the next, and are let go at its end."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from nnsight_core import NNsight, NoTraceError, ReleasedValueError, SessionError

X = torch.linspace(-1, 1, 6).reshape(2, 3)
Y = torch.linspace(0, 2, 6).reshape(2, 3)


def layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).requires_grad_(False)


def test_a_value_of_one_trace_is_used_in_the_next_without_being_saved() -> None:
    net = layers()
    model = NNsight(net)
    with model.session():
        with model.trace(X):
            hidden = model[0].output
            doubled = hidden * 2
        assert torch.equal(hidden.value, net[0](X))
        with model.trace(Y):
            model[1].input = hidden + doubled
            kept = model.output.save()
    assert torch.equal(kept.value, net[2](net[1](net[0](X) * 3)))


def test_what_was_not_saved_is_let_go_at_the_end() -> None:
    model = NNsight(layers())
    with model.session():
        with model.trace(X):
            hidden, kept = model[0].output, model[1].output.save()
        held = weakref.ref(hidden.value)
        assert hidden.shape == (2, 3)
    assert held() is None
    assert kept.shape == (2, 3)
    with pytest.raises(ReleasedValueError, match="released when its trace or session ended"):
        hidden.sum()


def test_a_value_of_an_edit_that_was_not_saved_lives_as_long_as_the_session() -> None:
    net = layers()
    model = NNsight(net)
    with model.edit() as edited:
        doubled = edited[0].output * 2
    with model.session():
        for x in (X, Y):
            with edited.trace(x):
                assert edited.output is not None
            assert torch.equal(doubled.value, net[0](x) * 2)
        with model.trace(X):
            model[1].input = doubled
            kept = model.output.save()
        held = weakref.ref(doubled.value)
    assert torch.equal(kept.value, net[2](net[1](net[0](Y) * 2)))
    assert held() is None
    with pytest.raises(ReleasedValueError, match="released when its trace or session ended"):
        doubled.sum()
    # Without a session it has to be saved, as ever.
    with edited.trace(X):
        assert edited.output is not None
    with pytest.raises(ReleasedValueError):
        doubled.sum()


def test_what_no_variable_holds_is_let_go_at_once() -> None:
    model = NNsight(layers())
    with model.session() as session:
        held = []
        for _ in range(300):
            with model.trace(X):
                hidden = model[0].output
            held.append(weakref.ref(hidden.value))
        assert sum(each() is not None for each in held) == 1
        assert len(session._scopes) < 200
    del hidden


def test_values_cross_between_invokes_of_different_traces() -> None:
    net = layers()
    model = NNsight(net)
    with model.session():
        with model.trace() as tracer:
            with tracer.invoke(X):
                first = model[0].output
            with tracer.invoke(Y):
                second = model[0].output
        with model.trace() as tracer:
            with tracer.invoke(Y):
                model[0].output = first
                one = model.output.save()
            with tracer.invoke(X):
                model[0].output = second
                two = model.output.save()
    assert first._scope._made == []
    torch.testing.assert_close(one.value, net(X))
    torch.testing.assert_close(two.value, net(Y))


def test_traces_of_other_models_and_scans_belong_to_it() -> None:
    model, guest = NNsight(layers()), NNsight(layers())
    with model.session():
        with guest.trace(X):
            hidden = guest[0].output
        with model.scan(torch.ones(7, 3)):
            fake = model[0].output
        with model.scan(torch.ones(7, 3)):
            model[2].input = fake * 2
            shape = model.output.shape
        with model.trace(X):
            model[0].output = hidden
            kept = model.output.save()
    assert shape == (7, 3)
    assert torch.equal(kept.value, model[2](model[1](guest[0](X))))


def test_a_session_inside_a_session() -> None:
    model, other = NNsight(layers()), NNsight(layers())
    for inner in (model, other):
        with model.session():
            with pytest.raises(SessionError, match="open here already"), inner.session():
                pytest.fail("the block was entered")
            with model.trace(X):
                hidden = model[0].output
            assert hidden.shape == (2, 3)
    with model.session() as session:
        pass
    with pytest.raises(SessionError, match="is over"), session:
        pytest.fail("the block was entered")


@pytest.mark.parametrize("where", ["trace", "session"])
def test_an_exception_leaves_all_clean(where: str) -> None:
    model = NNsight(layers())
    with pytest.raises(ZeroDivisionError), model.session():
        with model.trace(X):
            hidden = model[0].output
            if where == "trace":
                raise ZeroDivisionError
        raise ZeroDivisionError
    with pytest.raises(ReleasedValueError):
        hidden.sum()
    with model.session(), model.trace(X):
        assert model[0].output is not None
    with model.trace(X):
        after = model[0].output
    with pytest.raises(ReleasedValueError):
        after.sum()


def test_a_trace_that_failed_inside_leaves_the_session_going() -> None:
    net = layers()
    model = NNsight(net)
    with model.session():
        with pytest.raises(ZeroDivisionError), model.trace(X):
            hidden = model[0].output
            raise ZeroDivisionError
        assert torch.equal(hidden.value, net[0](X))
        with model.trace() as tracer:
            with tracer.invoke(X):
                pending = model[0].output
                with pytest.raises(ZeroDivisionError):
                    raise ZeroDivisionError
        assert torch.equal(pending.value, net[0](X))


def test_it_belongs_to_its_thread_its_task_and_its_generator() -> None:
    model = NNsight(layers())

    def unsaved() -> torch.Tensor:
        with model.trace(X):
            return model[0].output

    def suspended() -> Iterator[torch.Tensor]:
        with model.session():
            yield unsaved()
            yield unsaved()

    with model.session(), ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(unsaved).result()
        with pytest.raises(ReleasedValueError):
            elsewhere.sum()
    values = suspended()
    inside = next(values)
    with pytest.raises(ReleasedValueError):
        unsaved().sum()
    with model.session():
        assert unsaved().shape == (2, 3)
    assert inside.shape == (2, 3)
    values.close()
    with pytest.raises(ReleasedValueError):
        inside.sum()

    async def task() -> bool:
        with model.session():
            value = unsaved()
            await asyncio.sleep(0)
            return value.shape == (2, 3)

    async def both() -> list[bool]:
        return await asyncio.gather(task(), task())

    assert asyncio.run(both()) == [True, True]


def test_generation_of_sessions_past() -> None:
    model = NNsight(layers())
    with model.session(remote=False) as session:
        with model.trace(X):
            hidden = model[0].output
        assert session.apply(torch.add, hidden, 1).shape == (2, 3)
        assert list(session.iter([1, 2])) == [1, 2]
        with pytest.raises(SessionError, match="for each in values"), session.iter([1, 2]):
            pass
    with pytest.raises(SessionError, match="not available"):
        model.session(remote=True)


def test_a_session_that_is_dropped() -> None:
    model = NNsight(layers())
    session = model.session()
    session.__enter__()
    del session
    gc.collect()
    with model.session(), model.trace(X):
        assert model[0].output is not None
    with pytest.raises(NoTraceError):
        assert model[0].output is not None
