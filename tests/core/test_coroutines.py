"""A coroutine in which a pass has run serves the next one of its thread, and holds nothing meanwhile."""

from __future__ import annotations

import collections
import contextvars
import ctypes
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
from greenlet import getcurrent, greenlet

from nnsight_core import NNsight
from nnsight_core.forward_pass import is_idle

X = torch.ones(2, 3)


class Seen(torch.nn.Module):
    """Notes the coroutine in which it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.coroutines: list[weakref.ref[greenlet]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.coroutines.append(weakref.ref(getcurrent()))
        return x + 1


def two_modules() -> NNsight:
    return NNsight(torch.nn.Sequential(Seen(), Seen()))


@pytest.fixture
def model() -> NNsight:
    return two_modules()


def coroutine_of(model: NNsight) -> greenlet | None:
    with model.trace(X):
        model[0].output.save()
    return model._module[0].coroutines[-1]()


def test_a_coroutine_serves_one_pass_after_the_other(model: NNsight) -> None:
    first = coroutine_of(model)
    assert first is not None and is_idle(first)
    assert coroutine_of(model) is first


def test_an_idle_coroutine_holds_nothing() -> None:
    variable: contextvars.ContextVar[torch.nn.Module | None] = contextvars.ContextVar("variable", default=None)
    model, held = two_modules(), torch.nn.Linear(1, 1)
    variable.set(held)
    coroutine = coroutine_of(model)
    assert coroutine is not None and is_idle(coroutine) and coroutine.gr_context is None
    variable.set(None)
    gone = [weakref.ref(held), weakref.ref(model._module)]
    del held, model, variable
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_a_trace_inside_a_trace_has_one_of_its_own(model: NNsight) -> None:
    other = NNsight(torch.nn.Sequential(Seen()))
    with model.trace(X):
        model[0].output.save()
        inner = coroutine_of(other)
        after = model[1].output.save()
    outer = {each() for each in model._module[0].coroutines}
    assert inner not in outer and torch.equal(after, X + 2)
    assert inner is not None and is_idle(inner) and inner.parent.parent is None


def test_a_pass_that_fails_leaves_its_coroutine_as_good_as_new(model: NNsight) -> None:
    class Broken(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ArithmeticError("broken")

    before = coroutine_of(model)
    broken = NNsight(torch.nn.Sequential(Seen(), Broken()))
    with pytest.raises(ArithmeticError, match="broken") as caught, broken.trace(X):
        broken[0].output.save()
        broken[1].output.save()
    assert [each.name for each in caught.traceback][-1] == "forward" and caught.value.__context__ is None
    assert broken._module[0].coroutines[-1]() is before and before is not None and is_idle(before)
    assert torch.equal(plain(model), X + 2)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own look at the stack is asked")
def test_the_calls_that_an_error_of_torch_notes_end_inside_the_coroutine() -> None:
    noted = (ctypes.c_void_p * 64)()

    class Looks(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert ctypes.CDLL(None).backtrace(noted, len(noted)) == len(noted)
            return x

    looks = NNsight(torch.nn.Sequential(Looks()))
    with looks.trace(X):
        looks[0].output.save()
    # The calls that the coroutine stands in come back to the same place; what torch calls itself has some room, too.
    assert collections.Counter(noted).most_common(1)[0][1] > 16
    assert len(set(noted[-8:])) == 1


def plain(model: NNsight) -> torch.Tensor:
    with model.trace(X):
        result: torch.Tensor = model[1].output.save()
    return result


def test_stopping_ends_the_pass_and_not_the_coroutine(model: NNsight) -> None:
    before = coroutine_of(model)
    with model.trace(X) as tracer:
        model[0].output.save()
        tracer.stop()
    assert before is not None and is_idle(before)
    assert coroutine_of(model) is before


def test_a_pass_runs_in_the_context_of_its_own_trace(model: NNsight) -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)
    seen: list[int] = []
    hook = model._module[0].register_forward_hook(lambda *call: seen.append(variable.get()))
    for number in (1, 2):
        variable.set(number)
        coroutine_of(model)
    hook.remove()
    assert seen == [1, 2]


def test_a_body_far_deeper_on_the_stack_gets_a_nearer_one(model: NNsight) -> None:
    class Deep:
        """Calls by way of C, which takes room on the stack of the machine."""

        def __init__(self, depth: int) -> None:
            self.found = coroutine_of(model) if depth == 0 else next(map(Deep, [depth - 1])).found

    shallow = coroutine_of(model)
    assert shallow is not None and is_idle(shallow)
    assert Deep(150).found in (shallow, None)
    # It has served this pass, and is no more.
    assert shallow.dead and not is_idle(shallow)
    assert torch.equal(plain(model), X + 2)


def test_a_tracing_function_follows_the_model(model: NNsight) -> None:
    coroutine_of(model)
    lines: list[str] = []

    def follow(frame: object, event: str, arg: object) -> object:
        if event == "call":
            lines.append(frame.f_code.co_name)  # type: ignore[attr-defined]
        return follow

    before = sys.gettrace()
    sys.settrace(follow)  # type: ignore[arg-type]
    try:
        coroutine_of(model)
    finally:
        sys.settrace(before)
    assert lines.count("forward") >= 2


def test_threads_that_end_take_theirs_along(model: NNsight) -> None:
    found: list[weakref.ref[greenlet]] = []

    def work() -> None:
        coroutine = coroutine_of(model)
        assert coroutine is not None and is_idle(coroutine)
        found.append(weakref.ref(coroutine))

    for _ in range(8):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    gc.collect()
    # The last ones go when greenlet next looks after what ended threads have left.
    greenlet(lambda: None).switch()
    gc.collect()
    assert len(found) == 8 and [each() for each in found] == [None] * 8


PROGRAM = """
import threading, torch
from nnsight_core import NNsight
model = NNsight(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)))
def work():
    with model.trace(torch.ones(1, 3)):
        model[0].output.save()
work()
threads = [threading.Thread(target=work) for _ in range(4)]
for each in threads: each.start()
for each in threads: each.join()
ready = threading.Event()
daemon = threading.Thread(target=lambda: (work(), ready.set(), threading.Event().wait()), daemon=True)
daemon.start()
ready.wait()
work()
print("done")
"""


def test_python_ends_quietly_with_idle_coroutines() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()
