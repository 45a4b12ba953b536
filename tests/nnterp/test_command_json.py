"""What commands write for machines is JSON, whatever the terminal's encoding and whatever the numbers are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from nnterp.commands.terminal import write_json
from nnterp.spec import parse_spec
from tests.families import tiny_model
from tests.nnterp.test_command_line import ROOT
from tests.small_tokenizers import byte_tokenizer

# One interpreter for all commands: starting one takes seconds.
_RUN = """
import json, sys
from nnterp.command_line import main
for words in json.loads(sys.argv[1]):
    assert main(words) == 0, words
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of every command, by its name, from a terminal that knows ASCII alone."""
    folder = str(tmp_path_factory.mktemp("models") / "modèle")
    tiny_model("gpt2").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    commands = [
        ["lens", "é"],
        ["patch", "é one", "é two", "--answers", "a", "b"],
        ["attention", "é"],
        ["heads", "--length", "4", "--sequences", "1"],
        ["steer", "é", "--toward", "é", "--away", "a", "--tokens", "2"],
    ]
    words = [[*command, "--model", folder] for command in commands] + [["spec", folder], ["check", folder]]
    asked = json.dumps([[*each, "--json"] for each in words])
    done = subprocess.run(
        [sys.executable, "-c", _RUN, asked],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        capture_output=True,
        encoding="ascii",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {each[0]: json.loads(line) for each, line in zip(words, done.stdout.splitlines(), strict=True)}


def test_every_command_gives_json_to_a_terminal_without_unicode(found: dict[str, Any]) -> None:
    assert found["lens"]["prompts"][0]["prompt"] == "é"
    assert len(found["attention"]["tokens"]) == len("é".encode())
    assert found["patch"]["tokens"]["clean"][2:] == [" ", "o", "n", "e"]
    assert found["steer"]["prompt"] == "é" and isinstance(found["steer"]["steered"], str)
    assert {each["model"] for name, each in found.items() if name != "spec"} == {"modèle"}
    assert found["check"]["kept"]


def test_the_specification_as_json_is_one_that_can_be_given_back(found: dict[str, Any]) -> None:
    text = (ROOT / "architectures" / "gpt2.yaml").read_text(encoding="utf-8")
    given, own = (parse_spec(each, "gpt2") for each in (json.dumps(found["spec"]), text))
    assert [each.when for each in given.variants] == [each.when for each in own.variants] != []
    assert replace(given, variants=()) == replace(own, variants=())


def test_what_is_no_number_is_null(capsys: pytest.CaptureFixture[str]) -> None:
    nothing, endless = float("nan"), float("inf")
    write_json({"recovered": [[nothing, 1.0], (endless, -endless)], "token": "é", "layers": (0, 1), "on": True})
    line = capsys.readouterr().out
    expected = {"recovered": [[None, 1.0], [None, None]], "token": "é", "layers": [0, 1], "on": True}
    assert json.loads(line) == expected and line.isascii() and line.count("\n") == 1
