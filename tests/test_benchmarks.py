"""The benchmark runs, shows every case, and does not time sides that disagree. How fast they are is not tested."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import overhead

TOY = [
    "empty trace",
    "save one layer",
    "save all layers",
    "save all layers, nnterp",
    "save layers, attentions, MLPs",
    "save layers, attentions, MLPs, nnterp",
    "steer one layer",
    "steer one layer, nnterp",
    "gradients at all layers",
    "generate 20 tokens, save one layer at each",
    "stop after layer 0",
    "four invokes in one pass",
]
CHAIN = ["empty trace", "1 access", "10 accesses", "100 accesses", "1000 accesses"]


def test_the_tables_have_all_rows_and_every_row_was_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    check = overhead.check

    def noted(case: overhead.Case) -> int:
        checked.append(case.name)
        return check(case)

    monkeypatch.setattr(overhead, "check", noted)
    file = tmp_path / "tables.json"
    assert overhead.main(["--quick", "--seconds", "0.2", "--model", "toy", "chain", "--json", str(file)]) == 0

    printed = capsys.readouterr().out
    shown = re.findall(r"^\| (.+?) +\| +\d", printed, re.MULTILINE)
    assert shown == checked == [*TOY, *CHAIN]
    # One value for each layer, attention, MLP, step and prompt, and one for each access.
    assert re.findall(r"^(\d+) values were compared", printed, re.MULTILINE) == ["48", "1112"]

    tables = json.loads(file.read_text(encoding="utf-8"))["tables"]
    assert [row["case"] for row in tables["toy"]] == TOY
    assert [row["case"] for row in tables["chain"]] == CHAIN
    assert all(row["values_checked"] > 0 for rows in tables.values() for row in rows)
    assert all("ours_us_per_access" in row for row in tables["chain"][1:])


@pytest.mark.parametrize("close", [False, True])
def test_sides_that_do_not_agree_are_not_timed(close: bool) -> None:
    case = replace(overhead.chain_case(3), close=close)
    assert overhead.check(case) == 3
    one, two, three = case.ours()
    nan = torch.full_like(three.value, float("nan"))
    for wrong in (
        [one, two, three + 1],
        [one, two, three.double()],
        [one, two],
        [],
        [one, two, three[0]],
        [one, nan, nan],
    ):
        with pytest.raises(overhead.NumbersDifferError, match="3 access"):
            overhead.measure(replace(case, ours=lambda given=wrong: given), 0.0, 1)


def test_one_case_can_be_profiled(capsys: pytest.CaptureFixture[str]) -> None:
    assert overhead.main(["--model", "chain", "--profile", "10 accesses", "--seconds", "0"]) == 0
    assert "tottime" in capsys.readouterr().out
    assert overhead.main(["--model", "chain", "--profile", "11 accesses"]) == 1
    assert "no case '11 accesses'" in capsys.readouterr().err
