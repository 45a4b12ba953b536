"""Puts the architectures' YAML files, and their README, into the site: pages link to them as they stand."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

FOLDER = Path(__file__).resolve().parents[1] / "architectures"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Every specification becomes a file of the site."""
    for path in sorted(FOLDER.glob("*.yaml")):
        files.append(File.generated(config, f"architectures/{path.name}", content=path.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links that lead out of docs/ lead to the copies; the README of the architectures is a page of its own."""
    up = "../" * page.file.src_uri.count("/")
    if page.file.src_uri == "add_a_family.md":
        title_and_rest = (FOLDER / "README.md").read_text(encoding="utf-8").split("\n", 1)
        return markdown + title_and_rest[1].replace("](../docs/", "](")
    markdown = markdown.replace("](../architectures/README.md)", f"]({up}add_a_family.md)")
    return markdown.replace("](../architectures/", f"]({up}architectures/")
