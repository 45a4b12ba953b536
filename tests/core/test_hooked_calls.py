"""Calls with hook=True: the values inside can be asked for and set by whoever waits, and read by who called."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from nnsight_core import ModuleNotRunError, NameTakenError, NNsight, OutOfOrderError
from tests.core.conftest import Autoencoder, WithAutoencoder

torch.manual_seed(0)


@pytest.fixture
def module() -> Any:
    return WithAutoencoder().double()


@pytest.fixture
def model(module: Any) -> NNsight:
    return NNsight(module)


X = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
Y = torch.tensor([[-1.0, 0.5, 2.0], [0.0, 1.0, -1.0]], dtype=torch.float64)


def test_the_caller_reads_what_its_call_gave(model: NNsight, module: Any) -> None:
    with model.trace(X):
        hidden = model.one.output
        rebuilt = model.sae(hidden, hook=True)
        features = model.sae.encoder.output.save()
        call = model.sae.input[0][0].save()
        model.one.output = rebuilt
        result = model.output.save()
    assert torch.equal(features, module.sae.encoder(module.one(X)))
    assert torch.equal(call, module.one(X))
    assert torch.equal(result, module.two(module.sae(module.one(X))))


def test_what_a_call_gave_cannot_be_set_afterwards(model: NNsight) -> None:
    with model.trace(X):
        model.sae(model.one.output, hook=True)
        with pytest.raises(OutOfOrderError, match="The call with hook=True is over") as caught:
            model.sae.encoder.output = 0
        features = model.sae.encoder.output
        with pytest.raises(OutOfOrderError, match=r"called +the call[\s\S]*hook=True is over"):
            features[:] = 0
        features = features * 2
    assert "sae.encoder.output was set" in str(caught.value)
    assert "test_hooked_calls.py" in str(caught.value)


def test_in_an_invoke_too(model: NNsight, module: Any) -> None:
    with model.trace() as tracer:
        with tracer.invoke(X):
            model.sae(model.one.output, hook=True)
            one = model.sae.encoder.output.save()
        with tracer.invoke(Y):
            model.one.output = model.sae(model.one.output, hook=True)
            two = model.sae.encoder.output.save()
            result = model.output.save()
    torch.testing.assert_close(one.value, module.sae.encoder(module.one(X)))
    torch.testing.assert_close(two.value, module.sae.encoder(module.one(Y)))
    torch.testing.assert_close(result.value, module.two(module.sae(module.one(Y))))


def test_setting_what_a_tape_called_is_an_error_at_its_line(model: NNsight) -> None:
    with pytest.raises(OutOfOrderError, match="The call with hook=True is over"), model.trace() as tracer:
        with tracer.invoke(X):
            model.sae(model.one.output, hook=True)
            model.sae.encoder.output = 0


def test_a_body_of_the_whole_batch_reads_and_sets_inside_the_call_of_another(model: NNsight, module: Any) -> None:
    with model.trace() as tracer:
        with tracer.invoke():
            features = model.sae.encoder.output.clone().save()
            model.sae.encoder.output[:, 0] = 0
        with tracer.invoke(X):
            model.one.output = model.sae(model.one.output, hook=True)
            result = model.output.save()
    expected = module.sae.encoder(module.one(X))
    torch.testing.assert_close(features.value, expected)
    expected = expected.clone()
    expected[:, 0] = 0
    torch.testing.assert_close(result.value, module.two(module.sae.decoder(expected.relu())))


def test_a_call_on_ones_own_rows_is_nobody_elses(model: NNsight) -> None:
    with pytest.raises(ModuleNotRunError, match=r"sae\.encoder\.output"), model.trace() as tracer:
        with tracer.invoke(X):
            model.sae(model.one.output, hook=True)
        with tracer.invoke(Y):
            model.sae.encoder.output.save()


def test_a_call_on_the_whole_batch_is_cut_for_each(model: NNsight, module: Any) -> None:
    with model.trace() as tracer:
        with tracer.invoke(X):
            one = model.sae.encoder.output.save()
        with tracer.invoke(Y):
            model.sae.encoder.output[0] = 0
            two = model.sae.encoder.output.save()
        with tracer.invoke():
            model.one.output = model.sae(model.one.output, hook=True)
            result = model.output.save()
    torch.testing.assert_close(one.value, module.sae.encoder(module.one(X)))
    expected = module.sae.encoder(module.one(torch.cat([X, Y]))).clone()
    expected[1] = 0
    torch.testing.assert_close(two.value, expected[1:])
    torch.testing.assert_close(result.value, module.two(module.sae.decoder(expected.relu())))


@pytest.mark.parametrize("live", [True, False])
def test_a_cache_sees_the_call(model: NNsight, module: Any, live: bool) -> None:
    if live:
        with model.trace(X) as tracer:
            cache = tracer.cache(modules=["sae.encoder", "sae"])
            model.sae(model.one.output, hook=True)
    else:
        with model.trace() as tracer:
            with tracer.invoke(Y):
                pass
            with tracer.invoke(X):
                cache = tracer.cache(modules=["sae.encoder", "sae"])
                model.sae(model.one.output, hook=True)
    torch.testing.assert_close(cache["sae.encoder"].output, module.sae.encoder(module.one(X)))
    torch.testing.assert_close(cache["sae"].output, module.sae(module.one(X)))


def test_without_hook_nobody_sees_it(model: NNsight) -> None:
    with pytest.raises(ModuleNotRunError), model.trace(X):
        model.sae(model.one.output)
        model.sae.encoder.output.save()
    with pytest.raises(ModuleNotRunError, match="cache"), model.trace(X) as tracer:
        tracer.cache(modules=["sae.encoder"])
        model.sae(model.one.output)


def test_outside_a_trace_it_is_a_plain_call(model: NNsight, module: Any) -> None:
    assert torch.equal(model.sae(X, hook=True), module.sae(X))


def test_a_live_body_and_the_tape_of_another_meet_inside_a_call(model: NNsight, module: Any) -> None:
    with model.trace() as tracer:
        with tracer.invoke(X):
            wanted = model.sae.encoder.output.save()
        with tracer.invoke():
            hidden = model.one.output
            assert hidden.shape == (1, 3)
            model.sae(hidden, hook=True)
            after = model.sae.encoder.output.save()
    assert torch.equal(wanted, module.sae.encoder(module.one(X)))
    assert torch.equal(after, wanted)


def test_a_mistake_inside_a_call_comes_out_where_it_belongs(model: NNsight) -> None:
    with pytest.raises(RuntimeError, match="shape"), model.trace() as tracer:
        with tracer.invoke(X):
            model.sae.encoder.output.reshape(17)
        with tracer.invoke():
            hidden = model.one.output
            assert hidden.shape == (1, 3)
            model.sae(hidden, hook=True)


def test_gradients_go_through_a_hooked_call(model: NNsight, module: Any) -> None:
    with model.trace(X):
        hidden = model.one.output
        model.one.output = model.sae(hidden, hook=True)
        features = model.sae.encoder.output
        loss = model.output.sum()
        with loss.backward():
            gradient = features.grad.save()
    plain = module.sae.encoder(module.one(X)).detach().requires_grad_()
    module.two(module.sae.decoder(plain.relu())).sum().backward()
    torch.testing.assert_close(gradient.value, plain.grad)


def test_asking_too_late_says_that_it_has_gone_by(model: NNsight) -> None:
    with pytest.raises(OutOfOrderError, match=r"sae\.encoder\.output was asked for after"), model.trace() as tracer:
        with tracer.invoke():
            model.two.output.save()
            model.sae.encoder.output.save()
        with tracer.invoke(X):
            model.sae(model.one.output, hook=True)


# Added modules.


def test_an_added_module_is_part_of_the_model_until_it_is_taken_away(model: NNsight, module: Any) -> None:
    adapter = torch.nn.Linear(3, 3)
    model.one.adapter = adapter
    assert module.one.adapter is adapter
    assert any(each is adapter.weight for each in module.parameters())
    module.double()
    assert adapter.weight.dtype == torch.float64
    with model.trace(X):
        model.one.output = model.one.output + model.one.adapter(model.one.output)
        result = model.output.save()
    assert torch.equal(result, module.two(module.one(X) + adapter(module.one(X))))
    model.one.adapter = torch.nn.Identity()
    assert isinstance(module.one.adapter, torch.nn.Identity)
    del model.one.adapter
    assert not hasattr(module.one, "adapter")
    with pytest.raises(AttributeError):
        _ = model.one.adapter
    with pytest.raises(AttributeError):
        del model.one.adapter


@pytest.mark.parametrize("name", ["output", "next", "path", "in_features", "forward", "weight"])
def test_a_name_that_means_something_else_is_an_error_at_once(model: NNsight, name: str) -> None:
    with pytest.raises(NameTakenError, match=f"as '{name}'"):
        setattr(model.one, name, torch.nn.Identity())
    assert dict(model._module.one.named_children()) == {}


def test_an_alias_is_taken_too(module: Any) -> None:
    model = NNsight(module, rename={"one": "first"})
    with pytest.raises(NameTakenError, match="stands for the module one"):
        model.first = torch.nn.Identity()


def test_the_call_of_an_added_module_in_an_edit_is_asked_for_and_set(model: NNsight, module: Any) -> None:
    model.one.sae = Autoencoder().double()
    with model.edit() as edited:
        edited.one.output[:] = edited.one.sae(edited.one.output, hook=True)
    with edited.trace(X) as tracer:
        cache = tracer.cache(modules=[edited.one.sae.encoder])
        features = model.one.sae.encoder.output.clone().save()
        model.one.sae.encoder.output[:, 0] = 0
        model.one.sae.output *= 2
        hidden = edited.one.output.clone().save()
        edited.one.output += 1
        result = edited.output.save()
    sae = module.one.sae
    expected = sae.encoder(module.one(X))
    assert torch.equal(features, expected)
    expected = expected.clone()
    expected[:, 0] = 0
    assert torch.equal(cache["one.sae.encoder"].output, expected)
    assert torch.equal(hidden, sae.decoder(expected.relu()) * 2)
    assert torch.equal(result, module.two(hidden + 1))


def test_invokes_ask_inside_the_call_of_an_edit_each_on_its_own_rows(model: NNsight, module: Any) -> None:
    model.one.sae = Autoencoder().double()
    with model.edit() as edited:
        edited.one.output[:] = edited.one.sae(edited.one.output, hook=True)
        inner = edited.one.sae.encoder.output.save()
    with edited.trace() as tracer:
        with tracer.invoke(X):
            model.one.sae.encoder.output[:] = 0
            one = model.one.output.save()
        with tracer.invoke(Y):
            features = model.one.sae.encoder.output.save()
            two = model.one.output.save()
    sae = module.one.sae
    torch.testing.assert_close(one[0].detach(), sae.decoder.bias.detach())
    torch.testing.assert_close(features.value, sae.encoder(module.one(Y)))
    torch.testing.assert_close(two.value, sae(module.one(Y)))
    assert inner.shape == (3, 5) and bool((inner[0] == 0).all())


def test_a_stop_inside_the_call_of_an_edit(model: NNsight, module: Any) -> None:
    with model.edit() as edited:
        edited.one.output[:] = edited.sae(edited.one.output, hook=True)
    with edited.trace(X) as tracer:
        features = edited.sae.encoder.output.save()
        tracer.stop()
    assert torch.equal(features, module.sae.encoder(module.one(X)))
    with pytest.raises(ZeroDivisionError), edited.trace(X):
        edited.sae.encoder.output.save()
        1 / 0  # noqa: B018 - to fail
    assert torch.equal(edited(X), module.two(module.sae(module.one(X))))


def test_the_lines_of_a_body_inside_the_call_of_an_edit_are_its_own(model: NNsight) -> None:
    with model.edit() as edited:
        edited.one.output[:] = edited.sae(edited.one.output, hook=True)
    with pytest.raises(OutOfOrderError) as caught, edited.trace(X):
        edited.sae.encoder.output.save()
        model.sae.encoder.input.save()  # too late
    line = int(re.findall(r"test_hooked_calls\.py:(\d+)", str(caught.value))[-1])
    assert "# too late" in Path(__file__).read_text(encoding="utf-8").splitlines()[line - 1]
