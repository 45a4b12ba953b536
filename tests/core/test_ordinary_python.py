"""Whatever Python allows in a block, a body may do."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from nnsight_core import NNsight, OutOfOrderError

X = torch.linspace(-1, 1, 6).reshape(2, 3)
counted = 0


@pytest.fixture
def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))


@pytest.fixture
def model(net: nn.Sequential) -> NNsight:
    return NNsight(net)


def test_other_blocks_in_the_same_with(net: nn.Sequential, model: NNsight, tmp_path: Path) -> None:
    with model.trace(X), torch.no_grad():
        doubled = (model[0].output * 2).save()
        output = model.output.save()
    assert not doubled.value.requires_grad and output.value.requires_grad
    with torch.no_grad(), model.trace(X):
        output = model.output.save()
    assert not output.value.requires_grad
    file = tmp_path / "norms.txt"
    with model.trace(X), open(file, "w", encoding="utf-8") as out:
        out.write(f"{model[0].output.norm().item():.4f}\n")
    assert file.read_text(encoding="utf-8") == f"{net[0](X).norm().item():.4f}\n"
    with model.trace(X), contextlib.suppress(ZeroDivisionError):
        assert model[0].output is not None
        assert 1 / 0
    with model.trace(X), pytest.raises(OutOfOrderError):
        assert model[1].output is not None
        assert model[0].output is not None


def test_on_one_line(net: nn.Sequential, model: NNsight) -> None:
    with model.trace(X): hidden = model[0].output.save(); output = model.output.save()  # noqa: E701, E702  # fmt: skip
    assert torch.equal(hidden.value, net[0](X)) and torch.equal(output.value, net(X))


def test_beginning_with_try(net: nn.Sequential, model: NNsight) -> None:
    with model.trace(X):
        try:
            hidden = model[0].output.save()
            raise KeyError
        except KeyError:
            after = model[1].output.save()
        else:
            after = None
        finally:
            last = model.output.save()
    for one, other in zip((hidden, after, last), (net[0](X), net[:2](X), net(X)), strict=True):
        assert torch.equal(one.value, other)


def test_beginning_with_a_loop_a_branch_a_function_a_class_or_a_match(net: nn.Sequential, model: NNsight) -> None:
    kept: list[Any] = []
    with model.trace(X):
        for layer in model:
            kept.append(layer.output.save())
    with model.trace(X):
        if X.sum() > -100:
            kept.append(model[0].output.save())
    with model.trace(X):

        def get(index: int) -> Any:
            return model[index].output.save()

        kept.append(get(0))
    with model.trace(X):

        class Kept:
            hidden = model[0].output.save()

        kept.append(Kept.hidden)
    with model.trace(X):
        while len(kept) < 7:
            kept.append(model[0].output.save())
    for each in kept[3:]:
        assert torch.equal(each.value, net[0](X))


def test_leaving_by_return_break_and_continue(net: nn.Sequential, model: NNsight) -> None:
    def returned() -> Any:
        with model.trace(X):
            return model[0].output.save(), model.output.save()

    hidden, output = returned()
    kept = []
    for number in range(4):
        with model.trace(X * number):
            if number == 1:
                continue
            kept.append(model.output.save())
            if number == 2:
                break
    assert torch.equal(hidden.value, net[0](X)) and torch.equal(output.value, net(X))
    assert len(kept) == 2 and torch.equal(kept[1].value, net(X * 2))
    for number in range(3):
        with model.trace() as tracer:
            with tracer.invoke(X):
                if number == 1:
                    break
                kept.append(model.output.save())
    assert torch.equal(kept[2].value, net(X))


def test_names_of_every_kind(net: nn.Sequential, model: NNsight) -> None:
    global counted
    n = 1
    with model.trace(X):
        n += 1
        counted += 1
        shape = model[0].output.shape

    def inner() -> None:
        nonlocal n
        with model.trace(X):
            n += 1
            assert model[0].output is not None

    inner()
    assert (n, counted, shape) == (3, 1, (2, 3))
    del n
    with model.trace(X):
        n = model[0].output.save()
        other = n
        del n
    assert torch.equal(other.value, net[0](X))
    with model.trace(X):
        (first, *rest), star = model[0].output, (last := model.output.save())
    assert len(rest) == 1 and star is last and first is not None


class Base:
    def __init__(self, model: NNsight) -> None:
        self.__private = model

    def hidden(self) -> Any:
        return self.__private[0].output

    def traced(self) -> Any:
        with self.__private.trace(X):
            return self.__private[0].output.save()


class Derived(Base):
    def __init__(self, model: NNsight) -> None:
        super().__init__(model)
        self.__private = "another"

    def doubled(self, model: NNsight) -> Any:
        with model.trace(X):
            assert self.__private == "another"
            return (super().hidden() * 2).save()


def test_super_and_private_names(net: nn.Sequential, model: NNsight) -> None:
    assert torch.equal(Derived(model).doubled(model).value, net[0](X) * 2)
    assert torch.equal(Derived(model).traced().value, net[0](X))


def test_a_generator_that_yields_inside(net: nn.Sequential, model: NNsight) -> None:
    def layers() -> Iterator[Any]:
        with model.trace(X):
            for layer in model:
                sent = yield layer.output.save()
                if sent is not None:
                    layer.output *= sent

    found = [each.value for each in layers()]
    assert torch.equal(found[2], net(X))
    running = layers()
    next(running)
    running.send(2.0)
    assert torch.equal(next(running).value, net[2](torch.tanh(net[0](X) * 2)))
    running.close()
    with pytest.raises(KeyError):
        running = layers()
        next(running)
        running.throw(KeyError)
    abandoned = layers()
    next(abandoned)
    del abandoned
    gc.collect()


def test_tasks_that_take_turns_at_each_await(net: nn.Sequential, model: NNsight) -> None:
    async def task(number: int) -> Any:
        x, kept = X * number, []
        with model.trace(x):
            for layer in model:
                kept.append(layer.output.save())
                await asyncio.sleep(0)
                if number % 2:
                    layer.output *= number
        return kept

    async def main() -> list[Any]:
        return await asyncio.gather(*(task(number) for number in range(1, 7)))

    for number, kept in enumerate(asyncio.run(main()), 1):
        x = X * number
        for layer, each in zip(net, kept, strict=True):
            x = layer(x)
            assert torch.equal(each.value, x)
            x = x * number if number % 2 else x


def test_eight_threads_that_do_everything_at_once(net: nn.Sequential, model: NNsight) -> None:
    net.requires_grad_(False)
    barrier, failures = threading.Barrier(8), []

    def work(number: int) -> None:
        try:
            barrier.wait()
            for _ in range(10):
                x = X * number
                with model.trace(x):
                    model[0].input *= 2
                    hidden = model[1].output.save()
                    model[1].skip(hidden) if number == 99 else None
                with model.trace() as tracer:
                    with tracer.invoke(x):
                        model[0].output *= number
                    with tracer.invoke(x + 1):
                        other = model.output.save()
                assert torch.equal(hidden.value, torch.tanh(net[0](x * 2)))
                torch.testing.assert_close(other.value, net(x + 1))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is to be seen
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 9)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not failures
    assert not any("forward" in vars(module) for module in net.modules())


@pytest.mark.parametrize("where", ["body", "model", "invoke", "after a look"])
def test_an_interrupt_from_the_keyboard(where: str, net: nn.Sequential, model: NNsight) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = net[1].register_forward_hook(interrupt) if where == "model" else None
    with pytest.raises(KeyboardInterrupt):
        if where in ("body", "model"):
            with model.trace(X):
                assert model[0].output is not None
                if where == "body":
                    interrupt()
                assert model[2].output is not None
        else:
            with model.trace() as tracer:
                with tracer.invoke(X):
                    model[0].output.save()
                with tracer.invoke(X):
                    hidden = model[0].output
                    if where == "after a look":
                        assert hidden.sum() > -1e9
                    interrupt()
    if handle is not None:
        handle.remove()
    with model.trace(X):
        output = model.output.save()
    assert torch.equal(output.value, net(X))


def test_traces_in_hooks_of_the_users(net: nn.Sequential, model: NNsight) -> None:
    guest = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    inner, kept = NNsight(guest), []

    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if len(kept) < 2:
            with inner.trace(output):
                kept.append(inner[0].output.save())
            kept.append(None)
            with model.trace(X * 2):
                kept[1] = model[2].output.save()

    handle = net[0].register_forward_hook(hook)
    with model.trace(X):
        hidden = model[1].output.save()
        output = model.output.save()
    handle.remove()
    assert torch.equal(kept[0].value, guest[0](net[0](X)))
    assert torch.equal(kept[1].value, net(X * 2))
    assert torch.equal(hidden.value, net[:2](X)) and torch.equal(output.value, net(X))


class Rows(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return X[index % 2] * index


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.filterwarnings("ignore:This process")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_batches_from_a_loader_taken_inside_a_body(workers: int, net: nn.Sequential, model: NNsight) -> None:
    batches = []
    with model.trace(X):
        hidden = model[0].output
        for batch in DataLoader(Rows(), batch_size=2, num_workers=workers):
            batches.append((hidden + batch).save())
        output = model.output.save()
    assert len(batches) == 2 and torch.equal(output.value, net(X))
    assert torch.equal(batches[1].value, net[0](X) + torch.stack([X[0] * 2, X[1] * 3]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_process_that_forks_inside_a_body(net: nn.Sequential, model: NNsight) -> None:
    with model.trace(X):
        hidden = model[0].output.save()
        child = os.fork()
        if child == 0:
            # The child goes on with the same trace, of its own copy of the model.
            right = torch.equal(model.output.value, net(X))
            os._exit(0 if right else 1)
        _, status = os.waitpid(child, 0)
        output = model.output.save()
    assert os.waitstatus_to_exitcode(status) == 0
    assert torch.equal(hidden.value, net[0](X)) and torch.equal(output.value, net(X))
