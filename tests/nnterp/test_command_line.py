"""The command line: what it prints, and how it says what went wrong."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.utils import logging as transformers_logging

from nnterp import StandardizedTransformer, naming
from nnterp.command_line import main
from nnterp.commands import lens
from nnterp.interventions import lens_tokens
from tests.families import tiny_model
from tests.small_tokenizers import byte_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_model("gpt2").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


def test_the_table(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lens", "The Tower", "--model", model, "--top", "2"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == 'tiny after "The Tower"'
    assert [line[:7] for line in lines[1:4]] == ["layer 0", "layer 1", "layer 2"]
    assert all(line.count(" | ") == 2 for line in lines[1:4])
    assert lines[4].startswith("␣ is a space")
    # Nothing from the libraries underneath, and no progress bar where nobody sits at a terminal.
    assert err == ""


def test_the_heat_map(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "lens.html"
    assert main(["lens", "<b>", "--model", model, "--html", str(page), "--top", "1"]) == 0
    text = page.read_text(encoding="utf-8")
    # A page of its own, which fetches nothing, of all positions; a prompt is no HTML.
    assert "plotly.js v" in text and re.search(r"<script[^>]+src=", text) is None
    figure = text.split("Plotly.newPlot(")[-1]
    assert '\\"&lt;b\\u003e\\"' in figure and "\\u003cb\\u003e" not in figure
    assert [text.count(f"(position {position})") for position in range(4)] == [3, 3, 3, 0]
    assert capsys.readouterr().out.endswith(f"heat map: {page}\n")
    # Nor is it a formula.
    assert main(["lens", "$x$", "--model", model, "--html", str(page), "--top", "1"]) == 0
    assert "$x$" not in page.read_text(encoding="utf-8").split("Plotly.newPlot(")[-1]


def test_several_prompts_number_their_heat_maps(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lens", "one", "two", "--model", model, "--html", str(tmp_path / "lens.html")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lens-1.html", "lens-2.html"]
    assert "two" in (tmp_path / "lens-2.html").read_text(encoding="utf-8")
    out = capsys.readouterr().out
    assert 'tiny after "one"' in out and '\n\ntiny after "two"' in out


def test_json(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    read = StandardizedTransformer(model)
    assert main(["lens", "one", "é", "--model", model, "--json", "--top", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["heat_maps"]) == ("tiny", [])
    assert main(["lens", "one", "é", "--model", model, "--json", "--top", "2", "--all-positions"]) == 0
    every = json.loads(capsys.readouterr().out)
    for prompt, last, whole in zip(["one", "é"], found["prompts"], every["prompts"], strict=True):
        lens = lens_tokens(read, prompt, 2)
        assert whole["prompt"] == last["prompt"] == prompt
        assert (whole["ids"], tuple(whole["tokens"])) == (lens.ids.tolist(), lens.tokens)
        assert (last["positions"], last["tokens"]) == ([lens.positions[-1]], [lens.tokens[-1]])
        assert torch.equal(torch.tensor(whole["top_ids"]), lens.top_ids)
        torch.testing.assert_close(torch.tensor(whole["top_probs"]), lens.top_probs)
        torch.testing.assert_close(torch.tensor(last["top_probs"]), lens.top_probs[:, -1:])
        texts = [[list(position) for position in layer] for layer in lens.top_tokens]
        assert whole["top_tokens"] == texts and last["top_tokens"] == [layer[-1:] for layer in texts]


def test_json_and_a_heat_map(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "lens.html"
    assert main(["lens", "one", "--model", model, "--json", "--top", "1", "--html", str(page)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["heat_maps"] == [str(page)] and page.is_file()
    (prompt,) = found["prompts"]
    assert prompt["positions"] == [2] and np.shape(prompt["top_probs"]) == np.shape(prompt["top_tokens"]) == (3, 1, 1)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "lens" in capsys.readouterr().out
    assert main(["lens", "--help"]) == 0
    out = capsys.readouterr().out
    assert "demo-llama" in out and 'nnterp lens "The Eiffel Tower is in the city of" --html lens.html' in out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("nnterp ")


def test_the_default_model_is_the_demo_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def opened(name: str) -> None:
        asked.append(name)
        raise KeyboardInterrupt

    monkeypatch.setattr(lens, "StandardizedTransformer", opened)
    assert main(["lens", "text"]) == 130
    assert asked == ["demo-llama"]


def test_a_long_prompt_has_its_end_in_the_heading(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lens", "a" * 100 + "\nthe end", "--model", model]) == 0
    heading = capsys.readouterr().out.splitlines()[0]
    assert len(heading) == 100 and heading.startswith('tiny after "…aaa') and heading.endswith('a\\nthe end"')


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["lens", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "required: PROMPT"),
        (("",), "the prompt is empty: give at least one character"),
        (("text", ""), "the prompt is empty"),
        (("a \udce9",), "'a \\udce9' is no text in the encoding of this terminal"),
        (("text", "--top", "0"), "--top: 0 is too few: give 1 or more"),
        (("text", "--top", "-3"), "-3 is too few"),
        (("text", "--top", "many"), "'many' is no whole number: give 1 or more"),
        (("text", "--no-such-option"), "unrecognized arguments"),
        (("text", "--all-positions"), "--all-positions is for --json"),
    ],
)
def test_arguments_that_cannot_be(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    assert message in failure(capsys, *arguments)


def test_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().err


def test_an_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    err = failure(capsys, "text", "--model", "no-such-model")
    assert err.startswith("nnterp: ModelNotFoundError: No model could be loaded from 'no-such-model'")
    assert "Give a folder that holds config.json and weights" in err


def test_a_folder_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    err = failure(capsys, "text", "--model", str(tmp_path))
    assert err.startswith("nnterp: ModelNotFoundError:") and "no config.json" in err


def test_a_folder_without_weights(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text((Path(model) / "config.json").read_text(encoding="utf-8"), encoding="utf-8")
    assert failure(capsys, "text", "--model", str(tmp_path)).startswith("nnterp: ModelNotFoundError:")


def test_an_architecture_that_no_specification_serves(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lens", "text", "--model", model]) == 0
    served = capsys.readouterr().out
    monkeypatch.setattr(naming, "load_specs", dict)
    assert main(["lens", "text", "--model", model]) == 0
    assert capsys.readouterr().out == served


def test_a_model_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path)
    capsys.readouterr()
    err = failure(capsys, "text", "--model", str(tmp_path))
    assert err.startswith("nnterp: InputError:") and "without a tokenizer" in err


def test_a_prompt_beyond_the_context(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    err = failure(capsys, "a" * 130, "--model", model)
    assert err.startswith("nnterp: PromptTooLongError:") and "130 tokens" in err and "Shorten it by 2" in err


def test_more_tokens_than_there_are(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Give a number from 1 to 320" in failure(capsys, "text", "--model", model, "--top", "321")


def test_a_heat_map_that_cannot_be_written(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mend = "Give the name of a file, in a folder that exists"
    for file, fact in (
        (tmp_path / "none" / "lens.html", "there is no folder"),
        (tmp_path, "that is a folder"),
        (tmp_path / "lens.doc", "its name ends in '.doc'"),
    ):
        # Before the model is loaded, which there is none.
        err = failure(capsys, "text", "--model", "no-such-model", "--html", str(file))
        assert err.startswith("nnterp: FigureFileError:") and fact in err and mend in err

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    err = failure(capsys, "text", "--model", model, "--html", str(tmp_path / "lens.html"))
    assert "No space left on device" in err and mend in err


def test_nothing_is_left_changed(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    def state() -> tuple[object, ...]:
        level = logging.getLogger("transformers").level
        return level, transformers_logging.is_progress_bar_enabled(), list(warnings.filters)

    before = state()
    main(["lens", "text", "--model", model])
    main(["lens", "text", "--model", "no-such-model"])
    assert state() == before


def test_a_terminal_without_unicode(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stream, encoding="ascii"))
    assert main(["lens", "é 日本", "--model", model]) == 0
    text = stream.getvalue().decode("ascii")
    assert 'tiny after "\\xe9 \\u65e5\\u672c"' in text and "_ is a space" in text


def test_a_reader_that_goes_away(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["lens", "one", "two", "--model", model]) == 141
        monkeypatch.undo()
    assert capsys.readouterr() == ("", "")


def test_a_program_without_any_output_writes_its_files_all_the_same(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "lens.html"
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["lens", "text", "--model", model, "--html", str(page)]) == 0
    assert main(["--help"]) == 0
    assert page.is_file() and sys.stdout is None


def test_a_model_that_loads_at_once_leaves_no_progress_bar(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["lens", "text", "--model", model]) == 0
    assert terminal.getvalue().strip() == ""


def test_as_a_program(model: str) -> None:
    command = [sys.executable, "-m", "nnterp", "lens", "text", "--model", model]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith('tiny after "text"\n')
