"""The guard that runs after every test goes off when a test leaves something behind, and only then."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import greenlet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.modules import module as torch_module

from nnsight_core.hooks import HookBoard
from tests import leaks

pytest_plugins = ["pytester"]


def hook(*args: Any) -> None:
    """A hook of the tests' own."""


@contextmanager
def expected(complaint: str, *modules: torch.nn.Module) -> Iterator[None]:
    """What is left behind inside the block is found."""
    with leaks.watching(modules) as watch:
        yield
    complaints = watch.complaints()
    assert any(complaint in line for line in complaints), complaints


@pytest.fixture
def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))


@pytest.mark.parametrize("kind", ["input", "output", "skip"])
def test_a_hook_of_the_engine_is_found(model: torch.nn.Module, kind: str) -> None:
    board = HookBoard(lambda: None, lambda *_: None)
    with expected("a hook is still registered"):
        board.watch(model[0], kind, [model])
    board.clear()


@pytest.mark.parametrize(
    "register", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_a_hook_is_found(model: torch.nn.Module, register: str) -> None:
    with expected("a hook is still registered"):
        handle = getattr(model[0], f"register_{register}")(hook)
    with expected("hook", model):
        handle.remove()
        handle = getattr(model[1], f"register_{register}")(hook)
    handle.remove()


def test_a_hook_put_in_without_torch_is_found_on_a_watched_module(model: torch.nn.Module) -> None:
    with expected("Sequential at 1: _forward_hooks: 0 before, 1 after", model):
        model[1]._forward_hooks[0] = hook
    model[1]._forward_hooks.clear()


def test_a_hook_behind_a_partial_is_found(model: torch.nn.Module) -> None:
    with expected("a hook is still registered"):
        handle = model.register_forward_hook(functools.partial(hook, 1))
    handle.remove()


def test_a_hook_on_a_parameter_is_found(model: torch.nn.Module) -> None:
    with expected("a hook is still registered"):
        handle = model[0].weight.register_hook(hook)
    handle.remove()


def test_a_patched_forward_is_found(model: torch.nn.Module) -> None:
    with expected("Sequential at 0: forward in its __dict__", model):
        model[0].forward = hook
    del model[0].forward


def test_a_global_hook_is_found() -> None:
    with expected("_global_forward_pre_hooks: 0 before, 1 after"):
        handle = torch_module.register_module_forward_pre_hook(hook)
    handle.remove()


def test_a_suspended_greenlet_is_found() -> None:
    with expected("a greenlet is still suspended"):
        coroutine = greenlet.greenlet(lambda: greenlet.getcurrent().parent.switch())
        coroutine.switch()
    coroutine.switch()
    assert coroutine.dead


def test_a_mode_left_open_is_found() -> None:
    mode = torch.overrides.BaseTorchFunctionMode()
    with expected("torch function modes: 0 before, 1 after"):
        mode.__enter__()
    mode.__exit__(None, None, None)


def test_a_grad_mode_left_off_is_found() -> None:
    with expected("grad enabled: True before, False after"):
        torch.set_grad_enabled(False)
    torch.set_grad_enabled(True)


def test_what_is_tidied_up_is_not_found(model: torch.nn.Module) -> None:
    with leaks.watching([model]) as watch:
        handle = model.register_forward_hook(hook)
        coroutine = greenlet.greenlet(lambda: greenlet.getcurrent().parent.switch())
        coroutine.switch()
        with torch.no_grad():
            model(torch.ones(2))
        coroutine.switch()
        handle.remove()
    assert watch.complaints() == []


def test_what_only_a_cycle_keeps_is_not_found() -> None:
    with leaks.watching() as watch:
        model = torch.nn.Linear(2, 2)
        model.itself = [model]
        model.register_forward_hook(hook)
        del model
    assert watch.complaints() == []


def test_the_watch_is_over_when_its_block_is(model: torch.nn.Module) -> None:
    with leaks.watching() as watch:
        pass
    handle = model.register_forward_hook(hook)
    assert watch.complaints() == []
    handle.remove()


@given(st.integers())
def test_the_guard_lets_hypothesis_work(number: int) -> None:
    assert number == number


def test_the_guard_fails_the_test_that_leaks_and_no_other(pytester: pytest.Pytester) -> None:
    pytester.makeconftest("from tests.conftest import *\nfrom tests.conftest import pytest_runtest_makereport\n")
    pytester.makepyfile(
        """
        import torch
        MODEL = torch.nn.Linear(2, 2)
        HANDLES = []

        def test_leaks():
            HANDLES.append(MODEL.register_forward_hook(print))

        def test_is_tidy():
            MODEL.register_forward_hook(print).remove()

        def test_fails_for_its_own_reason():
            HANDLES.append(MODEL.register_forward_hook(print))
            assert False

        def teardown_module():
            for handle in HANDLES:
                handle.remove()
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider", "-p", "no:randomly")
    result.assert_outcomes(passed=2, failed=1, errors=1)
    result.stdout.fnmatch_lines(["*the test left behind:*", "*a hook is still registered: <built-in function print>*"])
