"""docs/families.md is what the specifications and the matrix's results make, and says the truth about both."""

from __future__ import annotations

from nnterp.architectures import load_specs
from tests.matrix import table
from tests.matrix.models import MODEL_TYPES

#: Types that transformers turns into others when it opens them as causal language models.
BELOW = {"emu3_text_model", "mllama_text_model"}


def test_the_document_is_fresh() -> None:
    assert table.DOCUMENT.read_text(encoding="utf-8") == table.render(table.results()), (
        "docs/families.md is stale: python -m tests.matrix.table"
    )


def test_every_model_type_is_in_the_matrix() -> None:
    assert tuple(table.results()) == MODEL_TYPES
    assert set(load_specs()) == {*MODEL_TYPES, *BELOW}


def test_every_promise_is_in_the_document() -> None:
    for row in table.results().values():
        assert list(row) == list(table.HEADINGS)
