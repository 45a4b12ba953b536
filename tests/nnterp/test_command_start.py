"""The command line starts at once: what loads torch, which takes seconds, waits until a model is wanted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from nnterp.commands import parsers
from tests.nnterp.test_command_line import ROOT


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8", check=False)


def test_help_and_mistakes_load_no_torch() -> None:
    commands = [["--help"], ["--version"], [], ["lens"], ["steer", "text"], ["lens", "text", "--all-positions"]]
    commands += [[each.__name__.removeprefix("add_"), "--help"] for each in parsers.COMMANDS]
    done = python(
        "import sys\n"
        "from nnterp.command_line import main\n"
        f"assert {{main(words) for words in {commands!r}}} == {{0, 2}}\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    assert done.returncode == 0, done.stderr
    assert all(f"nnterp {words[0]}" in done.stdout for words in commands[6:])


def test_the_face_of_the_package_is_there_when_it_is_asked_for() -> None:
    done = python(
        "import sys, nnterp\n"
        "assert {'RenameConfig', 'StandardizedTransformer'} <= set(dir(nnterp)) and 'torch' not in sys.modules\n"
        "assert nnterp.errors.ShapeError and 'RenameConfig' in vars(nnterp)\n"
        "from nnterp import *\n"
        "from nnterp import files, prompt_utils\n"
        "assert StandardizedTransformer is nnterp.StandardizedTransformer\n"
        "try:\n    nnterp.StandardisedTransformer\n"
        "except AttributeError as error:\n    sys.stdout.write(str(error))\n"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("module 'nnterp' has no attribute 'StandardisedTransformer'")


def test_an_error_shows_the_users_line_however_the_package_was_imported() -> None:
    done = python(
        "import sys\n"
        "from nnterp.nnsight_utils import get_layer_output\n"
        "from nnterp.standardized_transformer import StandardizedTransformer\n"
        "model = StandardizedTransformer('demo-gpt2')\n"
        "try:\n"
        "    with model.trace('text'):\n"
        "        get_layer_output(model, 3)\n"
        "        get_layer_output(model, 1)\n"
        "except Exception as error:\n    sys.stdout.write(str(error))\n"
    )
    assert "<string>:8" in done.stdout and "nnsight_utils.py" not in done.stdout, done.stderr


@pytest.mark.skipif(os.name == "nt", reason="an interrupt is sent in another way there")
def test_ctrl_c_while_torch_is_loaded_leaves_no_traceback() -> None:
    # A stand-in for torch that never gets loaded, and says when it is at it.
    code = (
        "import sys, time\n"
        "class Slow:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            print('loading', flush=True)\n"
        "            time.sleep(60)\n"
        "sys.meta_path.insert(0, Slow())\n"
        # A job in the background is begun with the interrupt ignored.
        "import signal\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from nnterp.command_line import main\n"
        "sys.exit(main(['lens', 'text']))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
    ) as running:
        assert running.stdout is not None and running.stdout.readline() == "loading\n"
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (130, "")
