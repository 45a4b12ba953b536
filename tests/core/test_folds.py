"""The batch folded with another axis, or beside one as long: numbers decide whose rows are whose, not lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nnsight_core import LanguageModel, NNsight, RowsError, fold_order
from tests.families import tiny_model

WIDTH, POSITIONS = 6, 4


class Folds(nn.Module):
    """A language model with a module that works on the whole batch in one axis, folded as ``fold`` says."""

    def __init__(self, fold: Callable[[torch.Tensor], torch.Tensor], back: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, WIDTH)
        self.router = nn.Linear(WIDTH, WIDTH)
        self.per_head = nn.Tanh()
        self.fold, self.back = fold, back

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
        x = self.embedding(input_ids)
        folded = self.fold(self.router(x))
        return self.back(self.per_head(folded), x)


def heads_of(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (3, 2)).transpose(1, 2)


def of_heads(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(-2)


RIGHT: dict[str, tuple[Any, Any]] = {
    "batch, position": (lambda x: x.flatten(0, 1), lambda f, x: f.view_as(x)),
    "batch, head": (lambda x: heads_of(x).flatten(0, 1), lambda f, x: of_heads(f.unflatten(0, (-1, 3)))),
    "one, batch, position": (lambda x: x.flatten(0, 1)[None], lambda f, x: f.view_as(x)),
}
ACROSS: dict[str, tuple[Any, Any]] = {
    "position, batch": (
        lambda x: x.transpose(0, 1).flatten(0, 1),
        lambda f, x: f.unflatten(0, (-1, len(x))).transpose(0, 1),
    ),
    "head, batch": (
        lambda x: heads_of(x).transpose(0, 1).flatten(0, 1),
        lambda f, x: of_heads(f.unflatten(0, (3, -1)).transpose(0, 1)),
    ),
    "one, position, batch": (
        lambda x: x.transpose(0, 1).flatten(0, 1)[None],
        lambda f, x: f[0].unflatten(0, (-1, len(x))).transpose(0, 1),
    ),
    "backwards": (lambda x: x.flatten(0, 1).flip(0), lambda f, x: f.flip(0).view_as(x)),
}

#: A language model, whose prompts' length is known, and any other module.
WRAPPED = {"language model": LanguageModel, "module": NNsight}


def prompts(count: int, wrapper: Any) -> list[Any]:
    made = [[1 + 4 * number + each for each in range(POSITIONS)] for number in range(count)]
    return [torch.tensor([ids]) for ids in made] if wrapper is NNsight else made


@torch.no_grad()
@pytest.mark.parametrize("wrapper", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("fold, back", RIGHT.values(), ids=RIGHT)
def test_rows_that_stand_side_by_side(fold: Any, back: Any, count: int, wrapper: Any) -> None:
    module = Folds(fold, back)
    model, seen, outputs = wrapper(module), [], []
    given = prompts(count, wrapper)
    with model.trace() as tracer:
        for number, prompt in enumerate(given):
            with tracer.invoke(prompt):
                seen.append(model.per_head.output.clone().save())
                if number == 1:
                    model.per_head.output *= 2
                outputs.append(model.output.save())
    assert tracer.forward_passes == 1
    for number, prompt in enumerate(given):
        ids = torch.as_tensor(prompt).view(1, -1)
        alone = torch.tanh(fold(module.router(module.embedding(ids))))
        torch.testing.assert_close(seen[number].value, alone)
        torch.testing.assert_close(outputs[number].value, module(ids) * (2 if number == 1 else 1))


@torch.no_grad()
@pytest.mark.parametrize("wrapper", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("fold, back", ACROSS.values(), ids=ACROSS)
@pytest.mark.parametrize("sets", [False, True])
def test_rows_that_do_not_are_an_error_and_no_one_elses(
    fold: Any, back: Any, count: int, wrapper: Any, sets: bool
) -> None:
    module = Folds(fold, back)
    model = wrapper(module)
    with pytest.raises(RowsError, match=r"model\.per_head\.output"), model.trace() as tracer:
        for prompt in prompts(count, wrapper):
            with tracer.invoke(prompt):
                if sets:
                    model.per_head.output = 0
                else:
                    model.per_head.output.save()
    # Alone there is nothing to divide.
    with model.trace(prompts(1, wrapper)[0]):
        model.per_head.output.save()


class Shared(nn.Module):
    """Has modules whose values are the same for every input, however many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, WIDTH)
        self.positions = nn.Embedding(8, WIDTH)
        self.distances = nn.ReLU()
        self.slopes = nn.Tanh()

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
        numbers = torch.arange(input_ids.shape[1])
        x = self.embedding(input_ids) + self.positions(numbers)
        bias = self.distances((numbers[:, None] - numbers[None]).double())
        slopes = self.slopes(torch.arange(1.0, 5.0))
        return torch.einsum("qk,bkd->bqd", bias, x.double()) * slopes.sum()


@torch.no_grad()
@pytest.mark.parametrize("wrapper", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_what_is_one_for_all_inputs_is_whole_where_it_is_as_long_as_they_are_many(count: int, wrapper: Any) -> None:
    module = Shared()
    model = wrapper(module)
    for _ in range(2):
        with model.trace() as tracer:
            for prompt in prompts(count, wrapper):
                with tracer.invoke(prompt):
                    asked = model.positions.input[0][0].save()
                    positions = model.positions.output.save()
                    distances = model.distances.output.save()
                    slopes = model.slopes.output.save()
                    output = model.output.save()
        assert tracer.forward_passes == 1
        numbers = torch.arange(POSITIONS)
        assert torch.equal(asked.value, numbers)
        assert torch.equal(positions.value, module.positions(numbers))
        assert torch.equal(distances.value, (numbers[:, None] - numbers[None]).clamp(0).double())
        assert torch.equal(slopes.value, torch.arange(1.0, 5.0).tanh())
        torch.testing.assert_close(output.value, module(torch.as_tensor(prompt).view(1, -1)))


def routers(module: Any) -> list[str]:
    return [name for name, _ in module.named_modules() if name.endswith("mlp.gate")]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routers_take_no_dry_runs_of_their_own(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny_model("mixtral").to(dtype)
    model, runs, honest = LanguageModel(module), list[str](), fold_order.run_dry

    def counted(*asked: Any) -> None:
        runs.append("run")
        honest(*asked)

    monkeypatch.setattr(fold_order, "run_dry", counted)
    given, logits = prompts(3, LanguageModel), []
    for _ in range(2):
        with model.trace() as tracer:
            for prompt in given:
                with tracer.invoke(prompt):
                    logits += [model.get(path).output[0].save() for path in routers(module)]
    # One of all inputs and one of each, for all layers, and none for prompts of the same length.
    assert len(runs) == 4
    for number, path in enumerate(routers(module)):
        with model.trace(given[2]):
            alone = model.get(path).output[0].save()
        close = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
        torch.testing.assert_close(logits[len(logits) - len(routers(module)) + number].value, alone.value, **close)


@torch.no_grad()
@pytest.mark.parametrize("sets", [False, True])
def test_tokens_that_are_sorted_by_expert_are_an_error(sets: bool) -> None:
    model = LanguageModel(tiny_model("mixtral"))
    activation = model.model.layers[1].mlp.experts.act_fn
    with pytest.raises(RowsError, match=r"activation\.output"), model.trace() as tracer:
        for prompt in prompts(2, LanguageModel):
            with tracer.invoke(prompt):
                if sets:
                    activation.output *= 0
                else:
                    activation.output.save()


class OneExpert(nn.Module):
    """Sends every token to the same expert, by a router that gives its logits as well."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, torch.full((len(x), 1), 3)


@torch.no_grad()
@pytest.mark.parametrize("fold", ["batch, position", "position, batch"])
def test_what_is_alike_for_all_tokens_is_told_by_what_the_module_gives_beside_it(fold: str) -> None:
    class Routed(Folds):
        def __init__(self) -> None:
            super().__init__(*{**RIGHT, **ACROSS}[fold])
            self.per_head = OneExpert()

        def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
            x = self.embedding(input_ids)
            values, experts = self.per_head(self.fold(self.router(x)))
            return self.back(values * experts, x)

    model, seen = LanguageModel(Routed()), []
    try:
        with model.trace() as tracer:
            for number, prompt in enumerate(prompts(2, LanguageModel)):
                with tracer.invoke(prompt):
                    seen.append(model.per_head.output[1].save())
                    if number:
                        model.per_head.output[1][:] = 5
                    seen.append(model.output.save())
    except RowsError:
        assert fold in ACROSS
        return
    assert fold in RIGHT and [each.shape for each in seen[::2]] == [(POSITIONS, 1)] * 2
    for number, prompt in enumerate(prompts(2, LanguageModel)):
        plain = model._module(torch.tensor([prompt]))
        torch.testing.assert_close(seen[2 * number + 1].value, plain * (5 / 3 if number else 1))
