"""The rows of an invoke, wherever a model keeps its batch: each sees and changes its own, or is told that it cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nnsight_core import LanguageModel, NNsight, RowsError
from tests.families import tiny_model

PROMPT, OTHER = [5, 6, 7, 8], [9, 10, 11, 12]


def close(one: Any, other: torch.Tensor) -> None:
    torch.testing.assert_close(getattr(one, "value", one), other)


class Recurrent(nn.Module):
    def __init__(self, layers: int, batch_first: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, num_layers=layers, batch_first=batch_first)
        self.head = nn.Linear(4, 2)
        self.batch_first = batch_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, (hidden, _) = self.lstm(x if self.batch_first else x.transpose(0, 1))
        return self.head(hidden[-1])


@torch.no_grad()
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_the_states_of_a_recurrent_layer(layers: int, batch_first: bool) -> None:
    module = Recurrent(layers, batch_first)
    model = NNsight(module)
    # As many inputs as layers, as directions, or as positions: the shapes alone say nothing.
    x, y = torch.randn(1, 3, 3), torch.randn(2, 3, 3)
    with model.trace() as tracer:
        with tracer.invoke(x):
            state = model.lstm.output[1][0].save()
            model.lstm.output[1][0][:] = 0
            zeroed = model.output.save()
        with tracer.invoke(y):
            hidden, (other, cell) = model.lstm.output
            kept = [each.save() for each in (hidden, other, cell)]
            output = model.output.save()
    assert tracer.forward_passes == 2  # the second body unpacks, which looks
    expected = module.lstm(y if batch_first else y.transpose(0, 1))
    close(state, module.lstm(x if batch_first else x.transpose(0, 1))[1][0])
    close(zeroed, module.head(torch.zeros(1, 4)))
    for one, right in zip(kept, (expected[0], *expected[1]), strict=True):
        close(one, right)
    close(output, module(y))


@torch.no_grad()
@pytest.mark.parametrize("positions", [2, 3, 4, 6])
def test_positions_before_the_batch(positions: int) -> None:
    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(x.transpose(0, 1)).transpose(0, 1).mean(1)

    module = First()
    model, x, y = NNsight(module), torch.randn(1, positions, 4), torch.randn(1, positions, 4)
    with model.trace() as tracer:
        with tracer.invoke(x):
            mine = model.block.output.save()
            model.block.output[:] = 1
            ones = model.output.save()
        with tracer.invoke(y):
            theirs = model.block.output.save()
            output = model.output.save()
    assert tracer.forward_passes == 1
    close(mine, module.block(x).transpose(0, 1))
    close(theirs, module.block(y).transpose(0, 1))
    close(ones, torch.ones(1, 4))
    close(output, module(y))


@torch.no_grad()
def test_as_many_channels_as_inputs() -> None:
    module = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Flatten())
    model, images = NNsight(module), torch.randn(3, 3, 5, 5)
    with model.trace() as tracer:
        for image in images.split(1):
            with tracer.invoke(image):
                last = model[0].output.save()
    close(last, module[0](images[2:]))


class Small(nn.Module):
    """Adds a vector for each position, (position, hidden), which is no row of anybody's."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe, self.head = nn.Embedding(16, 4), nn.Embedding(8, 4), nn.Linear(4, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.wte(ids) + self.wpe(torch.arange(ids.shape[1])))


@torch.no_grad()
@pytest.mark.parametrize("inputs", [2, 4])
def test_positions_that_are_one_for_all(inputs: int) -> None:
    module = Small()
    model = NNsight(module)
    with model.trace() as tracer:
        for number in range(inputs):
            with tracer.invoke(torch.tensor([[1, 2, 3, number]])):
                positions = model.wpe.output.save()
                output = model.output.save()
    close(positions, module.wpe(torch.arange(4)))
    close(output, module(torch.tensor([[1, 2, 3, inputs - 1]])))
    with pytest.raises(RowsError, match="one for all inputs"), model.trace() as tracer:
        with tracer.invoke(torch.tensor([[1, 2, 3, 4]])):
            model.wpe.output[0] = 0
        with tracer.invoke(torch.tensor([[1, 2, 3, 5]])):
            pass


@torch.no_grad()
def test_a_change_of_positions_that_are_added_to_all_is_the_changers_own() -> None:
    module = tiny_model("gpt2")
    model = LanguageModel(module)

    def run(edit: bool) -> tuple[torch.Tensor, torch.Tensor]:
        with model.trace() as tracer:
            with tracer.invoke(PROMPT):
                if edit:
                    model.transformer.wpe.output[:, 1:] *= -2
                mine = model.output.logits.save()
            with tracer.invoke(OTHER):
                theirs = model.output.logits.save()
        assert tracer.forward_passes == 1
        return mine.value, theirs.value

    with model.trace(PROMPT):
        model.transformer.wpe.output[:, 1:] *= -2
        alone = model.output.logits.save()
    (_, plain), (edited, beside) = run(False), run(True)
    close(edited, alone.value)
    assert torch.equal(plain, beside)


class Expert(nn.Module):
    """Runs for the tokens that are sent to it, and for them alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(x)


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expert = Expert()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(0, 1)
        chosen = (tokens[:, 0] > 0).nonzero()[:, 0]
        return tokens.index_copy(0, chosen, self.expert(tokens[chosen])).view_as(x)


def tokens(*signs: int) -> torch.Tensor:
    made = torch.randn(1, len(signs), 4)
    made[0, :, 0] = torch.tensor(signs).float()
    return made


@torch.no_grad()
def test_an_expert_that_sees_some_tokens_only() -> None:
    module = Routed()
    model = NNsight(module)
    # One token of each: the rows are those of the inputs.
    x, y = tokens(1, -1, -1), tokens(-1, -1, 1)
    with model.trace() as tracer:
        with tracer.invoke(x):
            mine = model.expert.output.save()
        with tracer.invoke(y):
            model.expert.output[:] = 0
            theirs = model.output.save()
    close(mine, module.expert(x[0, :1]))
    assert not theirs.value[0, 2].any() and torch.equal(theirs.value[0, :2], y[0, :2])
    # Two of one and none of the other, and the like: two rows for two inputs, and not one for each.
    for first, second in [((1, 1, -1), (-1, -1, -1)), ((1, 1, -1), (1, 1, 1)), ((1, -1, 1), (1, 1, 1))]:
        with pytest.raises(RowsError, match=r"is not clear(.|\n)*model\.expert\.output\.save"), model.trace() as tracer:
            with tracer.invoke(tokens(*first)):
                model.expert.output.save()
            with tracer.invoke(tokens(*second)):
                pass


@torch.no_grad()
def test_another_kind_of_value_is_not_put_in_among_the_others() -> None:
    module = tiny_model("gpt2")
    model = LanguageModel(module)
    with pytest.raises(RowsError, match="Tensor in the place of a tuple"), model.trace() as tracer:
        with tracer.invoke(PROMPT):
            model.transformer.h[0].attn.output = torch.zeros(2, 4, 64)
        with tracer.invoke(OTHER):
            pass


# Generation: several rows for each prompt.


@torch.no_grad()
@pytest.mark.parametrize("path", ["model.decoder.layers.0.fc1", "model.decoder.layers.1", "lm_head"])
def test_beams_belong_to_their_prompt(path: str) -> None:
    module = tiny_model("opt")
    model = LanguageModel(module)
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    prompts = (PROMPT, [13, 14])

    def body(edit: bool) -> tuple[list[Any], Any]:
        kept = []
        for _ in model.steps[0:4]:
            kept.append(model.get(path).output.save())
            if edit:
                model.get(path).output *= 0.5
        return kept, model.generator.output.save()

    alone = []
    for prompt, edit in zip(prompts, (False, True), strict=True):
        with model.generate(prompt, **options) as tracer:
            model.__dict__["steps"] = tracer.iter
            alone.append(body(edit))
    with model.generate(**options) as tracer:
        together = []
        for prompt, edit in zip(prompts, (False, True), strict=True):
            with tracer.invoke(prompt):
                model.__dict__["steps"] = tracer.iter
                together.append(body(edit))
    assert tracer.forward_passes == 1
    for (steps, found), (plain_steps, plain) in zip(together, alone, strict=True):
        assert torch.equal(found.value[:, -4:], plain.value[:, -4:])
        for one, other in zip(steps[1:], plain_steps[1:], strict=True):
            torch.testing.assert_close(one.value, other.value, rtol=1e-4, atol=1e-5)


class HeadsFirst(nn.Module):
    """Gives (head, batch, position, 2) in one of its modules."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, heads * 2)
        self.heads = heads
        self.block = nn.Tanh()

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
        x = self.embedding(input_ids)
        return self.block(x.unflatten(-1, (self.heads, 2)).permute(2, 0, 1, 3)).permute(1, 2, 0, 3).flatten(2)


@torch.no_grad()
@pytest.mark.parametrize("heads", [2, 3, 4])
def test_as_many_heads_before_the_batch_as_prompts(heads: int) -> None:
    module = HeadsFirst(heads)
    model = LanguageModel(module)
    prompts = [[number, 5, 6] for number in range(heads)]
    with model.trace() as tracer:
        found = []
        for number, prompt in enumerate(prompts):
            with tracer.invoke(prompt):
                found.append(model.block.output.save())
                if number == 1:
                    model.block.output = 0
                output = model.output.save()
    for prompt, mine in zip(prompts, found, strict=True):
        each = module.embedding(torch.tensor([prompt])).unflatten(-1, (heads, 2)).permute(2, 0, 1, 3)
        close(mine, each.tanh())
    if heads > 2:
        close(output, module(torch.tensor([prompts[-1]])))
    else:
        assert not output.value.any()


class Keeps(nn.Module):
    """Writes what it has seen into a dict that it is given, beside what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Tanh()

    def forward(self, x: torch.Tensor, kept: dict[str, Any]) -> torch.Tensor:
        kept["now"] = self.inner(x)
        return kept["now"] + kept["before"][0]


class Fills(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.keeps = Keeps()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept: dict[str, Any] = {"before": [x * 2, None]}
        given = self.keeps(x, kept)
        return given + kept["now"]


@pytest.mark.parametrize("with_gradients", [False, True])
@pytest.mark.parametrize("sets", [False, True])
def test_an_argument_that_a_module_writes_into_stays_the_models_own(with_gradients: bool, sets: bool) -> None:
    module = Fills()
    model = NNsight(module)
    x, y = (torch.randn(1, 3, requires_grad=with_gradients) for _ in range(2))
    with torch.set_grad_enabled(with_gradients), model.trace() as tracer:
        with tracer.invoke(x):
            seen = model.keeps.input.save()
            if sets:
                model.keeps.input = model.keeps.input * 0.5
            mine = model.output.save()
        with tracer.invoke(y):
            theirs = model.output.save()
            if with_gradients:
                theirs.sum().backward()
    assert tracer.forward_passes == 1
    close(seen[0][0], x)
    half = x * 0.5 if sets else x
    close(mine, half.tanh() * 2 + x * 2)
    close(theirs, module(y))


class Counts(nn.Module):
    """Counts its calls in a parameter, and has its heads before the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.block = nn.Tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.data += 1
        return self.block(x.unflatten(-1, (2, 2)).permute(2, 0, 1, 3)).permute(1, 2, 0, 3).flatten(2)


@torch.no_grad()
def test_dry_runs_leave_what_a_forward_writes_down_alone() -> None:
    module = Counts()
    model = NNsight(module)
    with model.trace() as tracer:
        for x in torch.randn(2, 3, 4).split(1):
            with tracer.invoke(x):
                mine = model.block.output.save()
    assert mine.shape == (2, 1, 3, 2)
    assert int(module.calls) == tracer.forward_passes == 1
