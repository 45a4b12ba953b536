"""What users install holds all that it needs: both packages, their types, the specifications and the demo models."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.house.rules import repository_files

ROOT = Path(__file__).resolve().parents[1]

# The installed copy goes first on the path, in an interpreter that ignores its environment and working directory: an
# editable installation of the checkout comes later and loses. What is opened is watched, to see who wins.
PREAMBLE = """
import sys
TARGET = sys.argv[1]
sys.path.insert(0, TARGET)
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
import nnsight_core, nnterp
for package in (nnsight_core, nnterp):
    assert package.__file__.startswith(TARGET), package.__file__
"""


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    run(sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", out, cwd=source)
    (built,) = out.iterdir()
    return built


def in_the_installed(target: Path, code: str) -> str:
    return run(sys.executable, "-I", "-c", PREAMBLE + code, target, cwd=target.parent)


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout without what git ignores, so that nothing is packed that a fresh clone would not have."""
    folder = tmp_path_factory.mktemp("clone")
    for path in repository_files(ROOT):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, folder / path)
    return folder


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wheel", clone, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def target(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed") / "site"
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--target",
        folder,
        wheel,
        cwd=ROOT,
    )
    return folder


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_everything_is_packed_and_nothing_else(wheel: Path) -> None:
    files = {path.as_posix() for path in repository_files(ROOT)}
    expected = {name for name in files if name.startswith(("nnsight_core/", "nnterp/"))}
    expected |= {
        name.replace("architectures/", "nnterp/architecture_specs/", 1)
        for name in files
        if name.startswith("architectures/")
    }
    packed = {name for name in contents(wheel) if ".dist-info/" not in name}
    assert packed == expected
    assert {"nnsight_core/py.typed", "nnterp/py.typed", "nnterp/architecture_specs/README.md"} <= packed


def test_the_licence_and_the_command_come_along(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        info = {name.partition(".dist-info/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
        assert "licenses/LICENSE" in info
        assert "nnterp = nnterp.command_line:main" in archive.read(info["entry_points.txt"]).decode()


def test_the_source_distribution_builds_the_same_wheel(clone: Path, wheel: Path, tmp_path: Path) -> None:
    sdist = build("sdist", clone, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        # The extraction filter came to Python 3.10 and 3.11 with a security release only.
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(tmp_path / "unpacked", **safe)
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert contents(build("wheel", unpacked, tmp_path / "again")) == contents(wheel)


def test_the_specifications_are_found(target: Path) -> None:
    code = """
from nnterp.architectures import load_specs
assert load_specs()
read = [name for name in opened if name.endswith(".yaml")]
assert read, "no YAML file was opened"
assert all(name.startswith(TARGET) for name in read), read
sys.stdout.write(str(len(set(read))))
"""
    assert int(in_the_installed(target, code)) == len(list((ROOT / "architectures").glob("*.yaml")))


@pytest.mark.parametrize("model", ["demo-gpt2", "demo-llama"])
def test_a_demo_model_runs_by_name(target: Path, model: str) -> None:
    code = f"""
model = nnterp.StandardizedTransformer({model!r})
with model.trace("The Eiffel Tower is in the city of"):
    hidden = model.layers_output[0].save()
    logits = model.logits.save()
assert hidden.shape[-1] == model.hidden_size and logits.shape[-1] == model.vocab_size
"""
    in_the_installed(target, code)


def test_the_command_line_starts(target: Path) -> None:
    usage = in_the_installed(
        target, "import runpy\nsys.argv = ['nnterp', '--help']\nrunpy.run_module('nnterp', run_name='__main__')"
    )
    assert "lens" in usage


def test_an_import_of_the_checkout_would_be_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        in_the_installed(tmp_path / "empty", "")
