"""The blocks of document 002, the walkthrough: each runs, and finds what plain hooks find.

The blocks lie word for word in tests/seed_documents/002_walkthrough.txt; what is changed before they run, and what is
left out, is said in tests/test_seed_documents.py.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from nnsight_core import LanguageModel, NNsight, NoTraceError, OutOfOrderError, ReleasedValueError
from tests.notebook import Notebook, Outcome
from tests.oracle import logits_with_hook, seen_by_hook
from tests.test_seed_documents import BEFORE, CHANGES, EVERYWHERE, WALKTHROUGH


@pytest.fixture(scope="module")
def walkthrough(tmp_path_factory: pytest.TempPathFactory) -> Notebook:
    folder = tmp_path_factory.mktemp("002")
    (folder / "myfile.txt").write_text("what the file holds", encoding="utf-8")
    return Notebook(WALKTHROUGH, folder, EVERYWHERE, CHANGES, BEFORE)


def without_attention(kept: slice | int) -> Any:
    def hook(module: Any, args: Any, output: Any) -> Any:
        changed = output[0].clone()
        changed[:, kept] = 0
        return (changed, *output[1:])

    return hook


def close(found: Any, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found.value if hasattr(found, "value") else found, expected)


def check_small(title: str, done: Outcome) -> None:
    net, given = done["net"], done["input"]
    first, whole = net.layer1(given), net(given)
    if title == "In [2]":
        assert given.shape == (1, 5) and isinstance(net, torch.nn.Sequential)
    elif title in ("In [3]", "In [14]"):
        assert isinstance(done["model"], NNsight) and done["model"]._module is net
        assert all(each.requires_grad == (title == "In [14]") for each in net.parameters())
    elif title in ("In [4]", "In [8]"):
        assert done.shown == f"{net}\n"
    elif title == "with open":
        assert done["text"] == "what the file holds"
    elif title == "In [5]":
        assert done["tracer"].forward_passes == 1
    elif title == "In [7]":
        assert done.shown == f"{whole}\n"
    elif title == "In [9]":
        assert done.shown == f"{first}\n"
    elif title == "In [10]":
        assert done.shown == f"{((first,), {})}\n"
    elif title == "In [11]":
        assert done.shown == f"{first.argmax(dim=1)[0]!r}\n"
    elif title == "In [12]":
        assert done.shown == f"{first.sum() + whole.sum()!r}\n"
    elif title == "In [13]":
        after = first.clone()
        after[:, 0] = 0
        assert done.shown == f"{first}\n{after}\n"
    elif title == "In [15]":
        close(done["l1_output"], first)
        close(done["l1_gradients"], net.layer2.weight.sum(0)[None])
    else:
        raise AssertionError(f"{title} has no check")


def check_language(title: str, done: Outcome) -> None:
    model = done["model"]
    module, tokenizer = model._module, model.tokenizer
    prompt = "John and Mary went to the store. John handed the milk to"
    toks = tokenizer(prompt, return_tensors="pt")["input_ids"]
    if title == "In [16]":
        assert type(model) is LanguageModel and type(module).__name__ == "GPT2LMHeadModel"
    elif title == "In [28]":
        assert done["decoded"] == prompt and torch.equal(done["token_tensor"], toks)
        assert done["tokens"] == toks[0].tolist() and len(done["str_tokens"]) == toks.numel()
    elif title == "In [29]":
        assert torch.equal(done["output"].logits, logits_with_hook(module, toks))
        assert done.shown == "Next token prediction:  Mary\n"
    elif title == "In [34]":
        short = tokenizer("John handed the milk to")["input_ids"]
        padded = [tokenizer.pad_token_id] * (toks.numel() - len(short)) + short
        assert done["prepared_input"].tolist() == [toks[0].tolist(), padded]
    elif title == "In [35]":
        assert done.shown == f"Traced token: {toks[:, 0]}\nOriginal token: {toks[:, 0]}\n"
    elif title in ("In [20]", "Notes 7"):
        assert done.shown == f"{module}\n"
    elif title == "In [21]":
        close(done["logits"], logits_with_hook(module, toks, module.transformer.h[-3].attn, without_attention(0)))
    elif title == "Batching 1":
        close(done["output_one"], logits_with_hook(module, toks))
        close(
            done["output_two"],
            logits_with_hook(module, toks, module.transformer.h[-3].attn, without_attention(slice(None))),
        )
    elif title == "Batching 2":
        (last,) = seen_by_hook(module.transformer.h[-1], lambda: module(toks))
        put = logits_with_hook(module, toks, module.transformer.h[0].attn, lambda m, args, output: (last, *output[1:]))
        close(done["output"], put)
        assert done["tracer"].forward_passes == 2
    elif title == "Logit lens 1":
        assert done["prompt"] == prompt
    elif title in ("Logit lens 2", "Logit lens 3"):
        check_lens(title, done, module, toks)
    elif title == "Notes 8":
        close(done["logits"], logits_with_hook(module, tokenizer("Hello World!", return_tensors="pt")["input_ids"]))
    else:
        check_generation(title, done, module, toks)


def check_lens(title: str, done: Outcome, module: Any, toks: torch.Tensor) -> None:
    probabilities = []
    for block in module.transformer.h:
        (hidden,) = seen_by_hook(block, lambda: module(toks))
        probabilities.append(module.lm_head(module.transformer.ln_f(hidden))[0, -1].softmax(-1))
    if title == "Logit lens 2":
        for found, expected in zip(done["all_probs"], probabilities, strict=True):
            close(found, expected)
        return
    figure, mary = done.value, done["mary_token"]
    assert list(figure.data[0].y) == pytest.approx([each[mary].item() for each in probabilities], rel=1e-5)
    assert figure.layout.title.text == "Probability of Mary after each layer, according to logit lens"
    assert (figure.layout.xaxis.title.text, figure.layout.yaxis.title.text) == ("Layer", "Probability")


def check_generation(title: str, done: Outcome, module: Any, toks: torch.Tensor) -> None:
    if title == "Notes 9":
        toks = done["model"].tokenizer("The Eiffel Tower is in the city of", return_tensors="pt")["input_ids"]
    mask = torch.ones_like(toks)
    generated = module.generate(toks, attention_mask=mask, max_new_tokens=3)

    def steps(at: Any) -> list[torch.Tensor]:
        return list(seen_by_hook(at, lambda: module.generate(toks, attention_mask=mask, max_new_tokens=3)))

    if title == "next 1":
        assert torch.equal(done["output"].value, generated)
        assert f"Original + Generated Tokens: {generated.shape}" in done.shown
    elif title == "next 2":
        # A block gives a tensor, so that [0] is the first prompt: (position, hidden).
        assert done.shown == f"{torch.Size([toks.numel(), module.config.n_embd])}\n"
    elif title == "next 3":
        for index, hidden in enumerate(steps(module.transformer.h[-1]), start=1):
            close(done[f"hidden_states{index}"], hidden[0])
        assert torch.equal(done["out"].value, generated)
    elif title == "Notes 9":
        for index, logits in enumerate(steps(module.lm_head), start=1):
            close(done[f"logits_{index}"], logits)
    else:
        raise AssertionError(f"{title} has no check")


def check_notes(title: str, done: Outcome) -> None:
    net, one, two = done["net"], done["input1"], done["input2"]
    if title == "Notes 1":
        # To everything but an index and unpacking an input is its first argument; `.value` is the whole call.
        assert done.shown == f"{net.layer1(one)}\n{net(one)}\n"
        assert str(done["l2_input"].value) == str(((net.layer1(one),), {}))
    elif title == "Notes 2":
        lines = done.shown.splitlines()
        assert "Proxy" in lines[0] and lines[1] == f"{net(one)}"
        # After the trace an operation gives a plain result.
        assert type(done["output"]) is torch.Tensor and lines[2:] == ["<class 'torch.Tensor'>", f"{net(one) * 2}"]
    elif title in ("Notes 3", "Notes 5"):
        assert done.shown == f"{net(one)}\n"
    elif title == "Notes 4":
        close(done["output"], net.layer2(net.layer1(two)))
    elif title == "Notes 6":
        assert done["LanguageModel"] is LanguageModel
    else:
        raise AssertionError(f"{title} has no check")


FAILING: dict[str, tuple[type[Exception], str]] = {
    # The names alone, in a block of their own: there is no trace that could have values for them.
    "the attributes": (NoTraceError, r"model.input was asked for outside a trace"),
    "In [6]": (ReleasedValueError, r"^Accessing Proxy value before it's been set"),
    # The document shows that a change comes too late to have any effect. Here it is an error, at that line.
    "In [22]": (OutOfOrderError, r"transformer.h.3.attn.output was asked for after the forward pass had gone by it"),
}


@pytest.mark.parametrize("title", WALKTHROUGH)
def test_walkthrough(title: str, walkthrough: Notebook) -> None:
    done = walkthrough.outcome(title)
    if title in FAILING:
        kind, message = FAILING[title]
        assert isinstance(done.error, kind) and re.search(message, str(done.error))
        return
    assert done.error is None, walkthrough.text(title)
    with torch.set_grad_enabled(True):
        if title.startswith("Notes") and title < "Notes 7":
            check_notes(title, done)
        elif list(WALKTHROUGH).index(title) < list(WALKTHROUGH).index("In [16]"):
            check_small(title, done)
        else:
            check_language(title, done)
