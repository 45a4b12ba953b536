"""Threads, tasks, generators and nested traces on one model: each sees its own forward pass and no other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_core import NNsight, NoTraceError, WrongThreadError

DEPTH = 4


def deep() -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(DEPTH)))


def inputs(number: int) -> torch.Tensor:
    return torch.linspace(-1, 1 + number, 6).reshape(2, 3)


def body(model: NNsight, number: int) -> torch.Tensor:
    """A different program for each number."""
    with model.trace(inputs(number)):
        layer = model[number % DEPTH]
        if number % 3 == 0:
            layer[0].output[:, 0] = number
        elif number % 3 == 1:
            layer.input *= number
        kept = layer.output.save()
        result = (model.output + kept.sum()).save()
    return result.value


def test_eight_threads_at_once_give_what_they_give_one_after_the_other() -> None:
    net = deep().requires_grad_(False)
    model = NNsight(net)
    serial = [body(model, number) for number in range(8)]
    start = threading.Barrier(8)

    def work(number: int) -> list[torch.Tensor]:
        start.wait()
        return [body(model, number) for _ in range(20)]

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(work, range(8)))
    for expected, found in zip(serial, results, strict=True):
        assert all(torch.equal(expected, each) for each in found)


def test_threads_that_run_the_plain_model_see_no_trace() -> None:
    net = deep().requires_grad_(False)
    model = NNsight(net)
    plain = net(inputs(0))
    done = threading.Event()
    wrong: list[int] = []

    def run_plainly() -> None:
        while not done.is_set():
            if not torch.equal(net(inputs(0)), plain):
                wrong.append(1)

    thread = threading.Thread(target=run_plainly)
    thread.start()
    for number in range(60):
        body(model, number)
    done.set()
    thread.join()
    assert not wrong


def test_a_hook_of_another_thread_that_goes_while_a_module_runs_its_hooks() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).requires_grad_(False)
    model = NNsight(net)
    traced, plainly, seen = threading.Event(), threading.Event(), threading.Event()
    main = threading.get_ident()

    def first(module: nn.Module, args: Any) -> None:
        if threading.get_ident() == main:
            # The hook of the trace is registered by now; the other thread's call is to have listed it too.
            traced.set()
            assert plainly.wait(5)

    def second(module: nn.Module, args: Any) -> None:
        if threading.get_ident() != main:
            plainly.set()
            assert seen.wait(5)

    handles = [net[0].register_forward_pre_hook(first), net[1].register_forward_pre_hook(second)]

    def run_plainly() -> torch.Tensor:
        assert traced.wait(5)
        return net(inputs(0))

    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(run_plainly)
        with model.trace(inputs(1)):
            assert model[1].input is not None
            seen.set()
            assert torch.equal(result.result(), net(inputs(0)))
    for handle in handles:
        handle.remove()


def test_a_trace_belongs_to_its_thread() -> None:
    model = NNsight(deep())
    with ThreadPoolExecutor(1) as pool, model.trace(inputs(0)):
        with pytest.raises(NoTraceError):
            pool.submit(lambda: model[0].output).result()
        assert model[0].output is not None


def test_after_a_question_from_the_wrong_thread_the_trace_goes_on_rightly() -> None:
    net = deep()
    model = NNsight(net)

    async def ask() -> None:
        with model.trace(inputs(0)):
            with pytest.raises(WrongThreadError, match="another thread"):
                await asyncio.to_thread(lambda: model[0].output)
            second = model[1].output.save()
        assert torch.equal(second.value, net[1](net[0](inputs(0))))

    asyncio.run(ask())


def test_tasks_that_wait_inside_their_blocks() -> None:
    net = deep()
    model = NNsight(net)

    async def task(number: int) -> list[torch.Tensor]:
        kept = []
        with model.trace(inputs(number)):
            for layer in model:
                await asyncio.sleep(0)
                if number == 2:
                    layer.output[:, 0] = number
                kept.append(layer.output.save())
                await asyncio.sleep(0.001 * (number % 2))
            kept.append(model.output.save())
        return [each.value for each in kept]

    async def together() -> list[list[torch.Tensor]]:
        return await asyncio.gather(*(task(number) for number in range(5)))

    alone = [asyncio.run(task(number)) for number in range(5)]
    for expected, found in zip(alone, asyncio.run(together()), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_a_task_that_is_cancelled_inside_its_block() -> None:
    net = deep()
    model = NNsight(net)

    async def waits() -> None:
        with model.trace(inputs(0)):
            assert model[0].output is not None
            await asyncio.sleep(60)

    async def main() -> None:
        task = asyncio.create_task(waits())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert body(model, 1) is not None


def steps(model: NNsight, x: torch.Tensor) -> Iterator[torch.Tensor]:
    with model.trace(x):
        for layer in model:
            yield layer.output.save()


def test_generators_that_take_turns() -> None:
    net = deep()
    model = NNsight(net)
    for ones, twos in zip(steps(model, inputs(1)), steps(model, inputs(2)), strict=True):
        del ones, twos
    expected = [[each.value for each in steps(model, inputs(number))] for number in (1, 2)]
    first, second = steps(model, inputs(1)), steps(model, inputs(2))
    found: list[list[torch.Tensor]] = [[], []]
    for _ in range(DEPTH):
        found[0].append(next(first).value)
        found[1].append(next(second).value)
    first.close()
    second.close()
    for one, other in zip(expected, found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_suspended_generators_trace_is_not_open_outside_it() -> None:
    net = deep()
    model = NNsight(net)
    values = steps(model, inputs(1))
    next(values)
    with model.trace(inputs(2)):
        mine = model[0].output.save()
        theirs = next(values)
        after = model[1].output.save()
    values.close()
    assert torch.equal(mine.value, net[0](inputs(2)))
    assert torch.equal(theirs.value, net[1](net[0](inputs(1))))
    assert torch.equal(after.value, net[1](mine.value))


def test_a_trace_of_the_same_model_inside_a_trace() -> None:
    net = deep()
    model = NNsight(net)
    with model.trace(inputs(1)):
        first = model[0].output.save()
        with model.trace(inputs(2)):
            inner = model[1].output.save()
            model[2].output = first
            inner_result = model.output.save()
        second = model[1].output.save()
        model[2].output = inner
        result = model.output.save()
    assert torch.equal(first.value, net[0](inputs(1)))
    assert torch.equal(second.value, net[1](first.value))
    assert torch.equal(inner.value, net[1](net[0](inputs(2))))
    assert torch.equal(inner_result.value, net[3](first.value))
    assert torch.equal(result.value, net[3](inner.value))


def test_traces_of_two_models_one_inside_the_other() -> None:
    one, other = deep(), deep()
    model, guest = NNsight(one), NNsight(other)
    with model.trace(inputs(1)):
        hidden = model[0].output
        with guest.trace(inputs(2)):
            guest[0].output = hidden
            result = guest.output.save()
            assert model[1].output is not None
        model[2].output = result
        final = model.output.save()
    with_guest = other[3](other[2](other[1](one[0](inputs(1)))))
    assert torch.equal(result.value, with_guest)
    assert torch.equal(final.value, one[3](with_guest))


def test_two_traces_in_one_with() -> None:
    one, other = deep(), deep()
    model, guest = NNsight(one), NNsight(other)
    with model.trace(inputs(1)), guest.trace(inputs(1)):
        difference = (model.output - guest.output).save()
    assert torch.equal(difference.value, one(inputs(1)) - other(inputs(1)))
