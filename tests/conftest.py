"""What every test stands on: no network, one thread, the same seed, and nothing left behind."""

from __future__ import annotations

import os

# Read by the libraries when they are imported, so set before anything else is.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests import leaks

if TYPE_CHECKING:
    from nnterp import StandardizedTransformer

# The workers share the cores; torch would start as many threads in each of them as there are.
torch.set_num_threads(1)

_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    report = yield
    if report.when == "call":
        item.stash[_FAILED] = report.failed
    return report


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """After the test, and after its own fixtures, all is as it was."""
    with leaks.watching() as watch:
        yield
    # The traceback of a test that failed keeps its frames, and they keep what they held.
    if not request.node.stash.get(_FAILED, False):
        complaints = watch.complaints()
        assert not complaints, "the test left behind:\n" + "\n".join(complaints)


@pytest.fixture(autouse=True)
def same_seed(nothing_left_behind: None) -> None:
    """A test that uses chance gets the same each time, alone or among others."""
    random.seed(0)
    torch.manual_seed(0)


def _demo_model(name: str) -> StandardizedTransformer:
    # Imported here so that the tests of the core run without nnterp, and start sooner.
    from nnterp import StandardizedTransformer

    model = StandardizedTransformer(name)
    modules = [value for value in vars(model).values() if isinstance(value, torch.nn.Module)]
    assert modules, f"no module to watch in {name}"
    leaks.WATCHED.update(modules)
    return model


@pytest.fixture(scope="session")
def demo_gpt2() -> StandardizedTransformer:
    """The shipped GPT-2; shared, so a test leaves it as it was."""
    return _demo_model("demo-gpt2")


@pytest.fixture(scope="session")
def demo_llama() -> StandardizedTransformer:
    """The shipped Llama; shared, so a test leaves it as it was."""
    return _demo_model("demo-llama")


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, int]]:
    """The progress bars of the interventions as they come: title, unit and length, 0 for one that is not shown."""
    shown: list[tuple[str, str, int]] = []

    def bar(parts: Any, *, desc: str, unit: str, disable: bool, delay: float, leave: bool) -> Any:
        shown.append((desc, unit, 0 if disable else len(parts)))
        return parts

    monkeypatch.setattr("nnterp.interventions.batching.tqdm", bar)
    return shown
