"""Importing the packages gives their names, all listed and in order, and changes nothing else in the process."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

from tests.house.face import changed_by_importing, face_complaints

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("nnsight_core", "nnterp")


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_sorted_and_complete(package: str) -> None:
    complaints = face_complaints(importlib.import_module(package))
    assert not complaints, "\n".join(complaints)


def test_a_face_out_of_order_or_incomplete_is_caught() -> None:
    module = ModuleType("house")
    module.__dict__.update(
        __all__=["beta", "Alpha", "gone"], Alpha=1, beta=2, secret=3, _own=4, spec=ModuleType("spec")
    )
    complaints = face_complaints(module)
    assert complaints == [
        "house.__all__ is not sorted: ['Alpha', 'beta', 'gone']",
        "house.gone is listed and missing",
        "house.secret is public and not listed",
    ]


def test_importing_changes_nothing() -> None:
    # The face of nnterp alone loads nothing.
    assert changed_by_importing(*PACKAGES, "nnterp.standardized_transformer", path=str(ROOT)) == []


def test_a_package_that_changes_the_process_is_caught(tmp_path: Path) -> None:
    changes = {
        "sys.excepthook = print": "sys.excepthook",
        "torch.Tensor.save = print": "torch.Tensor.save",
        "torch.nn.Module.__call__ = print": "torch.nn.modules.module.Module.__call__",
        "torch.nn.modules.module.register_module_forward_hook(print)": "_global_forward_hooks",
        "torch.manual_seed(0)": "seed",
    }
    (tmp_path / "offender.py").write_text("\n".join(["import sys, torch", *changes]), encoding="utf-8")
    assert set(changes.values()) <= set(changed_by_importing("offender", path=str(tmp_path)))
