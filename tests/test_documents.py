"""Every example in the documents and docstrings does what it says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import documents

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (*documents.markdown_documents(ROOT), *documents.python_documents(ROOT))


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_the_examples_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    documents.run_document(path, ROOT)


@pytest.mark.parametrize("path", DOCUMENTS, ids=_name)
def test_every_block_runs_or_says_why_not(path: Path) -> None:
    complaints = documents.fence_complaints(path, ROOT)
    assert not complaints, "\n".join(complaints)


def test_the_documents_are_found() -> None:
    assert {"README.md", "architectures/README.md"} <= {_name(path) for path in DOCUMENTS}


def test_what_does_not_run_is_listed() -> None:
    """`pytest tests/test_documents.py -k listed -rP` shows the list."""
    for place, reason in documents.not_run(ROOT).items():
        sys.stdout.write(f"{place}: {reason}\n")
        assert reason, place


# The twins: documents that fail, and say where.

GOOD = """\
# A document

```python
import dataclasses

numbers = [1, 2]
```

1. Later, indented, and in the same namespace:

   ```python
   assert numbers == [1, 2]
   @dataclasses.dataclass
   class Point:
       x: int
   ```

```python
>>> numbers
[1, ...]
>>> more = sum(numbers)
```

```pycon
>>> more
3
```

```python
print("numbers:", *numbers, id(numbers))
```

It prints

```text
numbers: 1 2 ...
```

```python
raise ValueError("no number\\nat all")
```

```text
no number
at all
```

```python no-run: it would never end
while True: pass
```

````markdown
```python
raise RuntimeError("an example of an example")
```
````

```console
$ make demo
```
"""


def run(text: str, root: Path, name: str = "docs/guide.md") -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    documents.run_document(path, root)


def test_a_good_document_runs(tmp_path: Path) -> None:
    run(GOOD, tmp_path)
    assert documents.fence_complaints(tmp_path / "docs/guide.md", tmp_path) == []
    assert documents.not_run(tmp_path) == {"docs/guide.md:48": "it would never end"}


@pytest.mark.parametrize(
    ("block", "complaint"),
    [
        ("```python\nx = 1\nassert x == 2\n```", "docs/guide.md:64: AssertionError"),
        ("```python\nx = 1\nmissing\n```", "docs/guide.md:64: NameError: name 'missing' is not defined"),
        ("```python\ndef f():\n    return 1 / 0\n\nf()\n```", "docs/guide.md:64: ZeroDivisionError"),
        ("```python\nx = (\n```", "docs/guide.md:63: '(' was never closed"),
        ("```python\n\nx = 1\n\n>>> x\n2\n```", "docs/guide.md:66: the example gives something else"),
        ("```pycon\n>>> numbers\n[2, ...]\n```", "docs/guide.md:63: the example gives something else"),
        ("~~~python\nraise ValueError('tilde')\n~~~", "docs/guide.md:63: ValueError: tilde"),
        ("```python\nprint(1)\n```\n```text\n2\n```", "docs/guide.md:66: the block before it at line 63 gives"),
        ("```python\nraise ValueError(1)\n```\n\n```text\n2\n```", "docs/guide.md:67: the block before it at line 63"),
        ("```python\nx = (\n```\n```text\n2\n```", "docs/guide.md:63: '(' was never closed"),
        ("```python\nx = 1\n", "line 62: this fence is never closed"),
    ],
)
def test_a_failing_block_is_caught_at_its_line(block: str, complaint: str, tmp_path: Path) -> None:
    assert GOOD.count("\n") == 60
    with pytest.raises(documents.DocumentError) as caught:
        run(f"{GOOD}\n{block}\n", tmp_path)
    assert str(caught.value).startswith(complaint)


def test_the_traceback_shows_the_line_of_the_document(tmp_path: Path) -> None:
    with pytest.raises(documents.DocumentError) as caught:
        run("text\n\n```python\nx = 1\nx.missing  # here\n```\n", tmp_path)
    assert "x.missing  # here" in str(caught.getrepr(chain=True))


@pytest.mark.parametrize("info", ["python no-run", "python no-run:", "python norun: slow", "py", "Python", "python3"])
def test_a_fence_that_would_go_unnoticed_is_caught(info: str, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"```{info}\nx = 1\n```\n", encoding="utf-8")
    assert "README.md:1: " in "\n".join(documents.fence_complaints(path, tmp_path))


DOCSTRINGS = '''\
"""A module.

>>> twice(2)
4
"""

def twice(x):
    """Two times.

    ```python
    assert twice(3) == 6
    ```

    ```python
    >>> twice(4)
    8
    ```

    ```python no-run: it takes for ever
    >>> twice(5)
    ```
    """
    return x * 2
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a package that can be imported from the temporary directory."""
    monkeypatch.syspath_prepend(tmp_path)
    return "documented"


def test_good_docstrings_run(package: str, tmp_path: Path) -> None:
    run(DOCSTRINGS, tmp_path, f"{package}/good.py")


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("\n4\n", "\n5\n", ":3: the example gives something else"),
        ("== 6", "== 7", ":11: AssertionError"),
        ("    8\n", "    9\n", ":15: the example gives something else"),
    ],
)
def test_a_failing_docstring_is_caught(package: str, tmp_path: Path, right: str, wrong: str, complaint: str) -> None:
    name = f"{package}/{complaint.strip(':').partition(':')[0]}.py"
    name = name.replace("/", "/line_")
    with pytest.raises(documents.DocumentError, match=name + complaint):
        run(DOCSTRINGS.replace(right, wrong), tmp_path, name)
