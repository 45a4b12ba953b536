"""The site is built from docs/ without a warning, and its page of errors knows every one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml

import nnsight_core
from nnterp import errors

ROOT = Path(__file__).resolve().parents[1]


def build(target: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    built = build(tmp_path)
    assert built.returncode == 0, built.stderr
    pages = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")}
    assert {
        path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in ROOT.glob("docs/**/*.md")
    } <= pages
    assert "StandardizedTransformer" in (tmp_path / "api" / "nnterp.html").read_text(encoding="utf-8")
    assert (tmp_path / "architectures" / "gpt2.yaml").is_file()
    # Code in a docstring would run together as a paragraph.
    methods = (tmp_path / "api" / "interventions.html").read_text(encoding="utf-8")
    assert re.findall(r"<p>[\w.]+(?: = [\w.]+)?\(", methods) == []
    assert methods.count("<pre") > 50
    # What the browser would have to fetch from elsewhere is not there offline.
    assert 'src="http' not in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path) -> None:
    """The twin: a site with one page, whose link is broken."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[there](nowhere.md)\n", encoding="utf-8")
    config = tmp_path / "mkdocs.yml"
    config.write_text(yaml.safe_dump({"site_name": "twin", "theme": {"name": "material"}}), encoding="utf-8")
    built = build(tmp_path / "site", "--config-file", str(config))
    assert built.returncode != 0
    assert "nowhere.md" in built.stderr


def test_every_error_stands_on_its_page() -> None:
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    names = [name for name in (*nnsight_core.__all__, *errors.__all__) if name.endswith("Error")]
    assert len(names) > 40
    assert [name for name in names if f"`{name}" not in text] == []
