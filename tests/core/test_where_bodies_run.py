"""The body of a trace is ordinary Python wherever Python runs."""

from __future__ import annotations

import asyncio
import operator
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nnsight_core
from nnsight_core import NNsight, OutOfOrderError

SCRIPT = textwrap.dedent(
    """
    import torch
    from nnsight_core import NNsight, OutOfOrderError
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model = NNsight(net)
    x = torch.ones(1, 3)
    with model.trace(x):
        hidden = model[0].output.save()
        print(tuple(hidden.shape), bool(torch.equal(hidden, net[0](x))))
    try:
        with model.trace(x):
            late = model[1].output
            early = model[0].output
    except OutOfOrderError as error:
        print(error)
    """
)


def check_output(printed: str, file: str) -> None:
    """The value is right, and the error names the two lines of the script."""
    lines = printed.splitlines()
    assert lines[0] == "(1, 3) True"
    assert lines[1] == "0.output was asked for after the forward pass had gone by it."
    assert lines[2].split() == ["already", "read", "1.output", f"{file}:13"]
    assert lines[3].split() == ["asked", "for", "0.output", f"{file}:14"]
    assert lines[4].endswith("Move line 14 above line 13.")


def test_as_a_script_on_the_command_line_and_from_stdin(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    ways = {"script.py": [str(script)], "<string>": ["-c", SCRIPT], "<stdin>": ["-"]}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Importing torch takes most of the time, so all of them run at once.
    started = {file: subprocess.Popen([sys.executable, *arguments], **pipes) for file, arguments in ways.items()}
    for file, process in started.items():
        printed, complaints = process.communicate(SCRIPT if file == "<stdin>" else None)
        assert process.returncode == 0, complaints
        check_output(printed, file)


def test_in_a_cell(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(SCRIPT, "<cell>", "exec"), {"__name__": "__main__"})
    check_output(capsys.readouterr().out, "<cell>")


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))


X = torch.linspace(-1, 1, 6).reshape(2, 3)


def test_in_an_execd_string_here() -> None:
    plain = net()
    names: dict[str, Any] = {"model": NNsight(plain), "X": X}
    exec("with model.trace(X):\n    hidden = model[0].output.save()\n    out = model.output.save()", names)
    assert torch.equal(names["hidden"].value, plain[0](X))
    assert torch.equal(names["out"].value, plain(X))
    with pytest.raises(OutOfOrderError, match=r"0\.output +<string>:3"):
        exec("with model.trace(X):\n    model[1].output\n    model[0].output", names)


def test_in_an_async_function_and_an_async_generator() -> None:
    plain = net()
    model = NNsight(plain)

    async def function() -> Any:
        with model.trace(X):
            await asyncio.sleep(0)
            hidden = model[0].output.save()
            await asyncio.sleep(0)
            return hidden, model.output.save()

    async def generator() -> AsyncIterator[Any]:
        with model.trace(X):
            for layer in model:
                yield layer.output.save()
                await asyncio.sleep(0)

    async def main() -> None:
        hidden, output = await function()
        assert torch.equal(hidden.value, plain[0](X))
        assert torch.equal(output.value, plain(X))
        found = [each.value async for each in generator()]
        assert torch.equal(found[1], plain[1](found[0]))

    asyncio.run(main())


def test_in_a_nested_function_a_comprehension_and_a_lambda() -> None:
    plain = net()
    model = NNsight(plain)
    kept: list[Any] = []

    def outer() -> None:
        def inner(layer: Any) -> None:
            kept.append(layer.output.save())

        for layer in model:
            inner(layer)

    with model.trace(X):
        outer()
    with model.trace(X):
        kept += [layer.output.save() for layer in model]
    with model.trace(X):
        kept += [nnsight_core.save(each) for each in map(operator.attrgetter("output"), model)]
    for first, second in zip(kept[::2], kept[1::2], strict=True):
        assert torch.equal(first.value, plain[0](X))
        assert torch.equal(second.value, plain(X))


def test_in_a_method_and_a_class_body() -> None:
    plain = net()

    class Probe:
        model = NNsight(plain)
        with model.trace(X):
            hidden = model[0].output.save()

        def output(self) -> Any:
            with self.model.trace(X):
                return self.model.output.save()

    assert torch.equal(Probe.hidden.value, plain[0](X))
    assert torch.equal(Probe().output().value, plain(X))


@contextmanager
def opened(model: NNsight) -> Iterator[Any]:
    with model.trace(X) as tracer:
        yield tracer


def test_opened_by_somebody_elses_context_manager() -> None:
    plain = net()
    model = NNsight(plain)
    with opened(model):
        hidden = model[0].output.save()
    with ExitStack() as stack:
        stack.enter_context(model.trace(X))
        again = model[0].output.save()
    assert torch.equal(hidden.value, plain[0](X))
    assert torch.equal(again.value, plain[0](X))


def test_two_opened_by_somebody_elses_context_manager() -> None:
    one, other = net(), net()
    model, guest = NNsight(one), NNsight(other)
    with opened(model), opened(guest):
        kept = [model[0].output.save(), guest[0].output.save()]
    assert torch.equal(kept[0].value, one[0](X))
    assert torch.equal(kept[1].value, other[0](X))


def test_python_sees_the_values_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    plain = net().requires_grad_(False)
    model = NNsight(plain)
    total = 0.0
    with torch.no_grad(), model.trace(X):
        for row in model[0].output:
            total += row.sum().item() if row[0] > 0 else -float(row.sum())
        sys.stdout.write(f"{model[0].output}\n")
    expected = sum(row.sum().item() if row[0] > 0 else -float(row.sum()) for row in plain[0](X))
    assert total == pytest.approx(expected)
    with torch.no_grad():
        assert capsys.readouterr().out == f"{plain[0](X)}\n"
