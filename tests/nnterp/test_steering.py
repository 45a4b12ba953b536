"""Steering vectors against plain hooks on the plain model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from nnterp import StandardizedTransformer
from nnterp.errors import LayerIndexError, PositionError, SteeringVectorError, UsageError
from nnterp.interventions import SteeringVector
from tests.families import tiny_model
from tests.small_tokenizers import byte_tokenizer

LAYERS = {
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "gemma2": "model.layers",
    "opt": "model.decoder.layers",
    "jamba": "model.layers",
}
POSITIVE = ["I love it", "What a wonderful day", "Yes"]
NEGATIVE = ["I hate it", "What an awful day", "No"]


class Pair:
    """A standardised model, and the layers of the plain one under it."""

    def __init__(self, family: str) -> None:
        self.plain = tiny_model(family)
        self.model = StandardizedTransformer(self.plain, tokenizer=byte_tokenizer())
        self.layers = list(self.plain.get_submodule(LAYERS[family]))

    def ids(self, prompt: str) -> torch.Tensor:
        return self.model.tokenizer(prompt, return_tensors="pt").input_ids

    def hidden(self, prompt: str, token: int = -1) -> torch.Tensor:
        """The layers' outputs at one token of a prompt that runs alone, (layer, hidden)."""
        found: list[torch.Tensor] = []
        handles = [
            layer.register_forward_hook(lambda _, __, output: found.append(_tensor(output)[0, token].clone()))
            for layer in self.layers
        ]
        with torch.no_grad():
            self.plain(self.ids(prompt))
        for handle in handles:
            handle.remove()
        return torch.stack(found)

    @contextmanager
    def changed(self, layer: int, change: Any) -> Iterator[None]:
        """Every output of one layer goes through ``change``."""

        def hook(_: Any, __: Any, output: Any) -> Any:
            new = change(_tensor(output))
            return new if isinstance(output, torch.Tensor) else (new, *output[1:])

        handle = self.layers[layer].register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()


def _tensor(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.fixture(scope="module", params=LAYERS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)


@pytest.fixture(scope="module")
def gpt2() -> Pair:
    return Pair("gpt2")


@pytest.mark.parametrize("token", [-1, 0])
def test_the_mean_is_the_difference_of_the_means_of_prompts_that_run_alone(pair: Pair, token: int) -> None:
    vector = SteeringVector.train(pair.model, POSITIVE, NEGATIVE, token=token, batch_size=2)
    means = [torch.stack([pair.hidden(prompt, token) for prompt in each]).mean(0) for each in (POSITIVE, NEGATIVE)]
    assert vector.layers == tuple(range(pair.model.num_layers))
    assert torch.allclose(vector.directions, means[0] - means[1], atol=1e-4)


def test_the_principal_direction_is_the_first_of_an_eigendecomposition(pair: Pair) -> None:
    vector = SteeringVector.train(pair.model, POSITIVE, NEGATIVE, layers=[-1, 0], method="principal")
    last = pair.model.num_layers - 1
    assert vector.layers == (0, last)
    differences = torch.stack([pair.hidden(a) - pair.hidden(b) for a, b in zip(POSITIVE, NEGATIVE, strict=True)])
    for layer in vector.layers:
        rows = differences[:, layer].double()
        main = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -1]
        expected = main * (main @ rows.mean(0))
        assert torch.allclose(vector[layer].double(), expected, atol=1e-4)
        assert vector[layer].double() @ rows.mean(0) >= 0


def test_applied_it_gives_the_logits_of_a_hook_that_adds_it(pair: Pair) -> None:
    vector = SteeringVector(torch.randn(2, pair.model.hidden_size), (0, 2))
    with pair.model.trace("some text"):
        vector.apply(pair.model, factor=-1.5)
        logits = pair.model.logits.save()
    with (
        torch.no_grad(),
        pair.changed(0, lambda hidden: hidden - 1.5 * vector[0]),
        pair.changed(2, lambda hidden: hidden - 1.5 * vector[2]),
    ):
        expected = pair.plain(pair.ids("some text")).logits
    assert torch.allclose(logits, expected, atol=1e-5)


def _without(hidden: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """By the projection's matrix, which the code does not write down."""
    outer = torch.outer(direction, direction) / direction.dot(direction)
    return hidden @ (torch.eye(len(direction)) - outer)


def test_ablated_it_gives_the_logits_of_a_hook_with_the_projection_matrix(pair: Pair) -> None:
    vector = SteeringVector(torch.randn(1, pair.model.hidden_size), (1,))
    with pair.model.trace("some text"):
        vector.ablate(pair.model)
        logits = pair.model.logits.save()
    with torch.no_grad(), pair.changed(1, lambda hidden: _without(hidden, vector[1])):
        expected = pair.plain(pair.ids("some text")).logits
    assert torch.allclose(logits, expected, atol=1e-4)


def test_tokens_and_prompts_that_are_not_chosen_stay_as_they_were(gpt2: Pair) -> None:
    direction = torch.randn(gpt2.model.hidden_size)
    with gpt2.model.trace(["a longer text", "short"]):
        before = gpt2.model.layers_output[1].clone().save()
        gpt2.model.ablate_direction(1, direction, token_positions=0, batch_index=1)
        after = gpt2.model.layers_output[1].save()
    first = len("a longer text") - len("short")
    assert torch.allclose(after[1, first], _without(before[1, first], direction), atol=1e-5)
    same = torch.ones(before.shape[:2], dtype=torch.bool)
    same[1, first] = False
    assert torch.equal(before[same], after[same])


def test_in_a_generation_every_step_is_steered(gpt2: Pair) -> None:
    vector = SteeringVector(10 * torch.randn(1, gpt2.model.hidden_size), (1,))
    ids = gpt2.ids("text")
    with gpt2.model.generate(ids, max_new_tokens=6, do_sample=False) as tracer:
        for _ in tracer.iter[:]:
            vector.apply(gpt2.model)
        tokens = gpt2.model.generator.output.save()
    with gpt2.changed(1, lambda hidden: hidden + vector[1]):
        expected = gpt2.plain.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(tokens, expected)
    assert not torch.equal(tokens, gpt2.plain.generate(ids, max_new_tokens=6, do_sample=False))


def test_each_invoke_is_steered_by_itself(gpt2: Pair) -> None:
    vector = SteeringVector(torch.randn(1, gpt2.model.hidden_size), (1,))
    logits = []
    with gpt2.model.trace() as tracer:
        for factor in (0, 1, -2):
            with tracer.invoke("text"):
                vector.apply(gpt2.model, factor)
                logits.append(gpt2.model.logits.save())
    for factor, found in zip((0, 1, -2), logits, strict=True):
        with torch.no_grad(), gpt2.changed(1, lambda hidden, factor=factor: hidden + factor * vector[1]):
            assert torch.allclose(found, gpt2.plain(gpt2.ids("text")).logits, atol=1e-5)


def test_projections_are_the_dot_products_with_the_unit_direction(pair: Pair) -> None:
    vector = SteeringVector(3 * torch.randn(2, pair.model.hidden_size), (0, 1))
    found = vector.project(pair.model, POSITIVE)
    assert found.shape == (3, 2)
    for row, prompt in enumerate(POSITIVE):
        hidden = pair.hidden(prompt)
        expected = [hidden[layer] @ vector[layer] / vector[layer].norm() for layer in (0, 1)]
        assert torch.allclose(found[row], torch.stack(expected), atol=1e-4)


def test_a_direction_from_one_country_to_another_moves_the_capital() -> None:
    model = StandardizedTransformer("demo-gpt2")
    vector = SteeringVector.train(model, ["The capital of Japan is"], ["The capital of France is"], layers=[1, 2, 3])
    tokyo = model.tokenizer.encode(" Tokyo")[0]
    probs = []
    for factor in (0, 1):
        with model.trace("The capital of France is"):
            vector.apply(model, factor, token_positions=-1)
            probs.append(model.next_token_probs[0, tokyo].save())
    assert probs[0] < 0.01
    assert probs[1] > 10 * probs[0]


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    vector = SteeringVector(torch.randn(2, 8), (1, 4), "principal")
    vector.save(tmp_path / "vector.safetensors")
    again = SteeringVector.load(tmp_path / "vector.safetensors")
    assert torch.equal(again.directions, vector.directions)
    assert (again.layers, again.method) == ((1, 4), "principal")


def test_other_files_are_refused(tmp_path: Path) -> None:
    save_file({"directions": torch.ones(1, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(UsageError, match="no steering vector"):
        SteeringVector.load(tmp_path / "other.safetensors")
    (tmp_path / "text").write_text("no tensors", encoding="utf-8")
    with pytest.raises(UsageError, match="is no safetensors file"):
        SteeringVector.load(tmp_path / "text")
    with pytest.raises(UsageError, match=r"cannot be written to .*: there is no folder"):
        SteeringVector(torch.ones(1, 2), (0,)).save(tmp_path / "none" / "vector.safetensors")
    with pytest.raises(FileNotFoundError, match="nothing here"):
        SteeringVector.load(tmp_path / "nothing here")


def test_a_bar_shows_which_prompts_are_read(gpt2: Pair, bars: list[tuple[str, str, int]]) -> None:
    vector = SteeringVector.train(gpt2.model, ["a", "b", "c"], ["d"], batch_size=2)
    vector.project(gpt2.model, "e")
    assert bars == [("positive prompts", "batch", 2), ("negative prompts", "batch", 0), ("projection", "batch", 0)]


def test_mistakes_are_named_at_once(gpt2: Pair) -> None:
    model = gpt2.model
    with pytest.raises(UsageError, match="0 negative prompts"):
        SteeringVector.train(model, ["a"], [])
    with pytest.raises(UsageError, match="as pairs"):
        SteeringVector.train(model, ["a"], ["b", "c"], method="principal")
    with pytest.raises(UsageError, match="no method 'median'"):
        SteeringVector.train(model, ["a"], ["b"], method="median")
    with pytest.raises(LayerIndexError):
        SteeringVector.train(model, ["a"], ["b"], layers=[9])
    with pytest.raises(UsageError, match="shape"):
        SteeringVector(torch.ones(2, 3), (0,))
    with pytest.raises(UsageError, match="in order"):
        SteeringVector(torch.ones(2, 3), (1, 0))
    narrow = SteeringVector(torch.ones(1, 3), (0,))
    with pytest.raises(UsageError, match="no direction for layer 1"):
        narrow[1]
    with pytest.raises(SteeringVectorError):
        narrow.project(model, ["a"])
    for wrong in (torch.ones(3), torch.ones(1, 1, model.hidden_size), None):
        with pytest.raises(SteeringVectorError), model.trace("a"):
            model.ablate_direction(0, wrong)
    with pytest.raises(UsageError, match="points nowhere"), model.trace("a"):
        model.ablate_direction(0, torch.zeros(model.hidden_size))
    with pytest.raises(PositionError, match="not both"), model.trace("a"):
        model.ablate_direction(0, torch.ones(model.hidden_size), positions=0, token_positions=0)
