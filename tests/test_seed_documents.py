"""The examples of the documents that this project takes for its specification, run as they stand.

Each test names its document and block. The blocks lie word for word in tests/seed_documents/; what is changed before
they run, and what is left out, is said here and nowhere else. Everything that they find is compared with plain hooks
or the plain model.

Everywhere: ``gpt2`` is the GPT-2 that comes along, with its prompts and numbers of layers, and ``nnsight`` is
``nnsight_core``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nnsight_core import OutOfOrderError, ReleasedValueError, RemoteError
from nnterp import StandardizedTransformer
from nnterp.demo_models import demo_model_path
from tests.notebook import Notebook, titled_blocks, with_indentation_of
from tests.oracle import logits_with_hook, seen_by_hook

HERE = Path(__file__).parent / "seed_documents"
BEST_PRACTICES = titled_blocks(HERE / "000_best_practices.txt")
MANGLED = titled_blocks(HERE / "001_mangled.txt")
WALKTHROUGH = titled_blocks(HERE / "002_walkthrough.txt")
ABOUT = titled_blocks(HERE / "003_about.txt")

#: What does not run, and why.
LEFT_OUT = {
    ("002", "In [1]"): "installs nnsight with pip, and clears a notebook's output: every line of it is a comment",
    ("002", "LanguageModel(<CUSTOM_MODEL>, tokenizer=<TOKENIZER>)"): "placeholders in prose, which are no Python",
    ("002", 'model.trace(<TEXT>, invoker_args={"key","value"}):'): "placeholders in prose, which are no Python",
    ("002", "outputs, and device='cuda:0' in them"): "they show what another model printed on another machine",
}

#: What is changed in single blocks, and why.
CHANGES = {
    "In [2]": [("from rich import print as rprint\n", "")],  # imported and never used; rich is not asked for here
    "In [6]": [("# ", "")],  # it is there as a comment because it fails; it is to fail here
    # In transformers 5 a block of GPT-2 gives a tensor and no tuple, so `.output[0]` is the first prompt of the batch:
    # (position, hidden). The lens then takes `logits[0, -1, :]`, which needs the batch.
    "Logit lens 2": [("layer.output[0]", "layer.output")],
    # The last line of the document prints names that it has not made.
    "Notes 9": [("logits1", "logits_1"), ("logits2", "logits_2"), ("logits3", "logits_3")],
}

#: The notes at the end of document 002 speak of the small model again, and of two inputs that they do not make.
BEFORE = {"Notes 1": "model = NNsight(net)\ninput1, input2 = torch.rand((1, input_size)), torch.rand((1, input_size))"}

GPT2 = repr(str(demo_model_path("demo-gpt2")))
EVERYWHERE = [
    ("from nnsight import", "from nnsight_core import"),
    ("'openai-community/gpt2'", GPT2),
    ("'gpt2'", GPT2),
]


# Documents 000 and 001: best practices.


def best_practices(model: str, texts: dict[str, str], folder: Path) -> Notebook:
    changes = [('StandardizedTransformer("gpt2")', f'StandardizedTransformer("{model}")')]
    return Notebook(texts, folder, changes, goes_on=["the execution order of gradients"])


@pytest.fixture(scope="module", params=["000 demo-gpt2", "000 demo-llama", "001 demo-gpt2"])
def practices(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Notebook:
    document, model = request.param.split()
    texts = BEST_PRACTICES
    if document == "001":
        texts = {title: with_indentation_of(MANGLED[title], text) for title, text in BEST_PRACTICES.items()}
    return best_practices(model, texts, tmp_path_factory.mktemp(document))


def test_document_001_is_document_000_without_indentation() -> None:
    """It is that page copied from a browser: the same lines, with the indentation and the empty lines lost."""

    def bare(text: str) -> list[str]:
        lines = [re.sub(r"\s+#", " #", line.strip()) for line in text.replace("\u2019", "'").splitlines()]
        return [line for line in lines if line]

    assert list(MANGLED) == list(BEST_PRACTICES)
    for title, text in MANGLED.items():
        assert bare(text) == bare(BEST_PRACTICES[title])
        assert not any(line.startswith(" ") for line in text.splitlines() if "modules=" not in line)


def test_best_practices_execution_order(practices: Notebook) -> None:
    done = practices.outcome("execution order")
    assert done.error is None
    assert "Error: layers_output[1] was asked for after the forward pass had gone by it" in done.shown
    assert "already read   layers_output[2]" in done.shown


def test_best_practices_all_model_components(practices: Notebook) -> None:
    done = practices.outcome("all model components")
    assert done.error is None
    # None of the four was saved, and each says so.
    for name in ("attn_0", "mlp_0", "layer_0", "attn_1"):
        with pytest.raises(ReleasedValueError):
            assert done[name].shape


def gradient_of(module: Any, layer: Any, ids: torch.Tensor, loss: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    handle = layer.register_forward_hook(
        lambda m, args, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    logits = module(ids).logits
    handle.remove()
    (gradient,) = torch.autograd.grad(loss(logits), kept)
    return gradient


def test_best_practices_gradients(practices: Notebook) -> None:
    model = practices.outcome("execution order")["model"]
    ids = torch.tensor([model.tokenizer.encode("My tailor is rich")])
    layer = model.layers[1]._module
    expected = gradient_of(model._module, layer, ids, lambda logits: logits.sum())
    squared = gradient_of(model._module, layer, ids, lambda logits: logits.sum() ** 2)
    basic = practices.outcome("basic gradient computation")
    torch.testing.assert_close(basic["l1_grad"].value, expected)
    several = practices.outcome("multiple backward passes")
    assert several.error is None
    torch.testing.assert_close(several["l1_grad_1"].value, expected)
    torch.testing.assert_close(several["l1_grad_2"].value, squared)
    order = practices.outcome("the execution order of gradients")
    assert isinstance(order.error, OutOfOrderError) and "layers_output[1]" in str(order.error)
    torch.testing.assert_close(order["l1_grad"].value, expected)


def test_best_practices_stop(practices: Notebook) -> None:
    done = practices.outcome("stop")
    model = done["model"]
    assert done.error is None and "Speedup:" in done.shown
    with model.trace("Hello world"):
        whole = model.layers_output[5].save()
    assert torch.equal(done["layer_5_out"], whole)


def test_best_practices_caching(practices: Notebook) -> None:
    done = practices.outcome("caching")
    model, cache = done["model"], done["cache"]
    assert done.error is None
    assert cache.keys() == [model.layers[index].path for index in range(0, model.num_layers, 2)]
    with model.trace("Hello world"):
        hidden = model.layers_output[2].save()
    assert torch.equal(cache["model.layers.2"].output, hidden)
    assert done.shown.endswith(f"{cache.keys()}\n{hidden.shape}\n{hidden.shape}\n")


def test_stop_leaves_the_later_layers_uncomputed(demo_gpt2: StandardizedTransformer) -> None:
    ran = []
    handles = [layer._module.register_forward_hook(lambda m, a, o: ran.append(m)) for layer in demo_gpt2.layers]
    try:
        with demo_gpt2.trace("Hello world") as tracer:
            hidden = demo_gpt2.layers_output[2].save()
            tracer.stop()
    finally:
        for handle in handles:
            handle.remove()
    assert ran == [layer._module for layer in demo_gpt2.layers][:3]
    assert hidden.shape[-1] == demo_gpt2.hidden_size


# Document 003: the front page of the oldest era.


def test_about(tmp_path: Path) -> None:
    title = "the first experiment"
    sent = Notebook(ABOUT, tmp_path, EVERYWHERE).outcome(title)
    assert isinstance(sent.error, RemoteError)
    done = Notebook(ABOUT, tmp_path, EVERYWHERE, {title: [("remote=True", "")]}).outcome(title)
    assert done.error is None
    module, tokenizer = done["model"]._module, done["model"].tokenizer
    ids = tokenizer("The Eiffel Tower is in the city of ", return_tensors="pt")["input_ids"]
    mlp = module.transformer.h[-1].mlp
    expected = logits_with_hook(module, ids, mlp, lambda m, args, output: output * 0)
    torch.testing.assert_close(done["output"].logits, expected)
    (hidden,) = seen_by_hook(module.transformer.h[0], lambda: module(ids))
    ((first, *_), _) = done["hidden_states"]
    torch.testing.assert_close(first, hidden)
    assert done["runner"].forward_passes == 1


def test_what_is_left_out_has_its_reason() -> None:
    assert all(len(reason) > 20 for reason in LEFT_OUT.values())
    assert not {title for _, title in LEFT_OUT} & set(WALKTHROUGH)
    assert set(CHANGES) | set(BEFORE) <= set(WALKTHROUGH)
