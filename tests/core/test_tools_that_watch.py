"""Debuggers, coverage, notebooks and compiled files see the lines of a body, of the model, and of what comes after."""

from __future__ import annotations

import compileall
import io
import json
import pdb
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from nnsight_core import NNsight

X = torch.ones(1, 3)

NET = textwrap.dedent(
    """
    import torch
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(3, 3)
            self.b = torch.nn.Linear(3, 3)
        def forward(self, x):
            x = self.a(x)
            y = x + 1
            x = self.b(y)
            return x * 2
    """
)
BODY = textwrap.dedent(
    """
    def body(model, x):
        with model.trace(x) as tracer:
            first = model.a.output.save()
            for number in range(2):
                second = model.b.output.save()
            total = number + 1
            output = model.output.save()
        after = total + 1
        with model.trace() as tracer:
            with tracer.invoke(x):
                third = model.a.output.save()
        return after
    """
)
#: Every line that runs, counted from 1 as the texts above have them.
BODY_LINES = {3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13}
MODEL_LINES = {9, 10, 11, 12}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    made = {"net": tmp_path / "net_file.py", "body": tmp_path / "body_file.py"}
    made["net"].write_text(NET, encoding="utf-8")
    made["body"].write_text(BODY, encoding="utf-8")
    return made


def loaded(files: dict[str, Path]) -> tuple[NNsight, Callable[..., Any]]:
    names: dict[str, Any] = {"__name__": "loaded"}
    for path in files.values():
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), names)
    return NNsight(names["Net"]()), names["body"]


def test_a_tracing_function_sees_every_line(files: dict[str, Path]) -> None:
    model, body = loaded(files)
    seen: dict[str, set[int]] = {str(path): set() for path in files.values()}
    before = sys.gettrace()

    def watch(frame: Any, event: str, argument: Any) -> Any:
        lines = seen.get(frame.f_code.co_filename)
        if lines is None:
            return None
        if event == "line":
            lines.add(frame.f_lineno)
        return watch

    sys.settrace(watch)
    try:
        body(model, X)
        still = sys.gettrace()
    finally:
        sys.settrace(before)
    assert still is watch
    assert seen[str(files["body"])] == BODY_LINES
    assert seen[str(files["net"])] >= MODEL_LINES


def test_coverage_sees_every_line(files: dict[str, Path], tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(
        "from nnsight_core import NNsight\nimport torch\nimport sys\nsys.path.insert(0, sys.argv[1])\n"
        "from net_file import Net\nfrom body_file import body\nprint(body(NNsight(Net()), torch.ones(1, 3)))\n",
        encoding="utf-8",
    )
    report = tmp_path / "report.json"
    data = f"--data-file={tmp_path / 'data'}"
    include = f"--include={tmp_path}/*"
    coverage = [sys.executable, "-m", "coverage"]
    ran = subprocess.run(
        [*coverage, "run", data, include, str(script), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0 and ran.stdout.strip() == "3", ran.stderr
    subprocess.run([*coverage, "json", data, "-o", str(report)], capture_output=True, check=True)
    found = json.loads(report.read_text(encoding="utf-8"))["files"]
    missing = {Path(name).name: each["missing_lines"] for name, each in found.items()}
    assert missing == {"run.py": [], "net_file.py": [], "body_file.py": []}


def debugged(commands: list[str], model: NNsight, body: Callable[..., Any]) -> str:
    """What the debugger prints when it is given these commands."""
    told = io.StringIO()
    before = sys.gettrace()
    debugger = pdb.Pdb(stdin=io.StringIO("\n".join([*commands, "continue"]) + "\n"), stdout=told, nosigint=True)
    debugger.use_rawinput = False
    debugger.rcLines = []
    try:
        debugger.runcall(body, model, X)
    finally:
        sys.settrace(before)
    return told.getvalue()


def test_a_debugger_stops_in_the_body_in_the_model_and_after_the_block(files: dict[str, Path]) -> None:
    model, body = loaded(files)
    net, here = files["net"], files["body"]
    told = debugged(
        [
            f"break {here}:6",
            f"break {net}:12",
            f"break {here}:9",
            "continue",
            "p tuple(first.shape), number",
            "continue",
            "p number",
            "continue",
            "p 'in the model', tuple(y.shape)",
            "continue",
            "p 'after', total",
            "next",
            "next",
            "p 'stepped', after",
            "clear 1 2 3",
        ],
        model,
        body,
    )
    for expected in ("((1, 3), 0)", "('in the model', (1, 3))", "('after', 2)", "('stepped', 3)"):
        assert expected in told, told


def test_a_debugger_steps_from_line_to_line_across_the_models_turns(files: dict[str, Path]) -> None:
    model, body = loaded(files)
    told = debugged(["next"] * 5, model, body)
    lines = [int(number) for number in re.findall(r"> \S+\((\d+)\)body", told)]
    assert lines == [3, 4, 5, 6, 5, 6], told


def test_a_script_that_is_there_as_compiled_code_alone(files: dict[str, Path], tmp_path: Path) -> None:
    script = tmp_path / "gone.py"
    script.write_text(
        NET + "from nnsight_core import NNsight, OutOfOrderError\nmodel = NNsight(Net())\nx = torch.ones(1, 3)\n"
        "with model.trace(x):\n    hidden = model.a.output.save()\nprint(tuple(hidden.shape))\n"
        "with model.trace(x):\n    loss = model.output.sum()\n    with loss.backward():\n        pass\n"
        "try:\n    with model.trace(x):\n        late = model.b.output\n        early = model.a.output\n"
        "except OutOfOrderError as error:\n    print(error)\n",
        encoding="utf-8",
    )
    lines = script.read_text(encoding="utf-8").splitlines()
    compileall.compile_file(script, quiet=1, legacy=True)
    script.unlink()
    ran = subprocess.run([sys.executable, str(script.with_suffix(".pyc"))], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    printed = ran.stdout.splitlines()
    assert printed[0] == "(1, 3)"
    late, early = (
        lines.index(f"        {name} = model.{module}.output") + 1 for name, module in (("late", "b"), ("early", "a"))
    )
    assert printed[2].split() == ["already", "read", "b.output", f"gone.py:{late}"]
    assert printed[3].split() == ["asked", "for", "a.output", f"gone.py:{early}"]


CELLS = [
    NET + "from nnsight_core import NNsight, OutOfOrderError\nmodel, x = NNsight(Net()), torch.ones(1, 3)",
    "%%time\nwith model.trace(x):\n    hidden = model.a.output.save()\n    output = model.output.save()",
    "print(tuple(hidden.shape), bool(torch.equal(output.value, model._module(x))))",
    "with model.trace() as tracer:\n    with tracer.invoke(x):\n        late = model.b.output\n"
    "        early = model.a.output",
    "%%timeit -n 1 -r 1\nwith model.trace(x):\n    assert model.a.output is not None",
    "import asyncio\nwith model.trace(x):\n    await asyncio.sleep(0)\n    hidden = model.a.output.save()\n"
    "hidden.shape",
    "model.a.output",
]


@pytest.mark.filterwarnings("ignore")
def test_in_a_notebook(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(each) for each in CELLS])
    client = NotebookClient(
        notebook, timeout=240, kernel_name="python3", allow_errors=True, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()

    def told(number: int) -> str:
        outputs = notebook.cells[number]["outputs"]
        return "".join(
            str(each.get("text", "")) + str(each.get("data", "")) + str(each.get("evalue", "")) for each in outputs
        )

    assert "Wall time" in told(1)
    assert "(1, 3) True" in told(2)
    assert "a.output was asked for after" in told(3) and "Move line 4 above line 3" in told(3)
    assert "loop" in told(4)
    assert "torch.Size([1, 3])" in told(5)
    assert "outside a trace" in told(6)
