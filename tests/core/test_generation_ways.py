"""Every way of transformers to generate: inside a trace it gives the tokens of the model's own ``generate``, with hooks
where the trace has reads and changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from nnsight_core import LanguageModel, save
from tests.families import tiny_model

#: It repeats itself, so that looking tokens up in the prompt finds some.
PROMPT = [5, 6, 7, 8, 5, 6, 7]
LENGTH = 6


class Ban(LogitsProcessor):
    """Some tokens are never chosen."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, torch.arange(1, scores.shape[1], 2), float("-inf"))


class EnoughTokens(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= len(PROMPT) + 3)


class Streamed(BaseStreamer):
    """Notes what comes, as it comes."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value.flatten().tolist())

    def end(self) -> None:
        self.seen.append([])


def assistant() -> Any:
    torch.manual_seed(3)
    other = tiny_model("llama")
    other.generation_config.num_assistant_tokens = 3
    other.generation_config.num_assistant_tokens_schedule = "constant"
    return other


#: Makes the options of one generation; they hold state, so each gets its own.
WAYS: dict[str, Callable[[], dict[str, Any]]] = {
    "greedy": dict,
    "sampling": lambda: {"do_sample": True, "temperature": 1.3, "top_k": 50},
    "sampling from the most likely": lambda: {"do_sample": True, "top_p": 0.8, "temperature": 0.7},
    "logits processors": lambda: {"logits_processor": LogitsProcessorList([Ban()])},
    "penalties": lambda: {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2},
    "stopping criteria": lambda: {"stopping_criteria": StoppingCriteriaList([EnoughTokens()])},
    "prompt lookup": lambda: {"prompt_lookup_num_tokens": 2},
    "an assistant": lambda: {"assistant_model": assistant()},
    "an assistant, sampling": lambda: {"assistant_model": assistant(), "do_sample": True},
    "a static cache": lambda: {"cache_implementation": "static", "disable_compile": True},
    "no cache": lambda: {"use_cache": False},
    "beams": lambda: {"num_beams": 3},
    "several beams, sampling": lambda: {"num_beams": 3, "num_return_sequences": 2, "do_sample": True},
    "several sequences": lambda: {"num_return_sequences": 3, "do_sample": True},
    "scores": lambda: {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
}


def tokens_of(result: Any) -> torch.Tensor:
    tokens: torch.Tensor = result if isinstance(result, torch.Tensor) else result.sequences
    return tokens


def scaled(output: torch.Tensor) -> torch.Tensor:
    return output * -1.5


class ByHooks:
    """The model's own ``generate``, with hooks that read one layer and change another."""

    def __init__(self, module: Any, options: dict[str, Any], chosen: Callable[[int], bool]) -> None:
        self.seen: list[torch.Tensor] = []
        self.logits: list[torch.Tensor] = []
        self.run = 0
        layers = module.model.layers

        def change(m: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
            self.run += 1
            return scaled(output) if chosen(self.run - 1) else None

        handles = [
            layers[0].mlp.register_forward_hook(change),
            layers[1].register_forward_hook(lambda m, args, output: self.seen.append(output.clone())),
            module.lm_head.register_forward_hook(lambda m, args, output: self.logits.append(output.clone())),
        ]
        torch.manual_seed(11)
        ids = torch.tensor([PROMPT])
        try:
            self.result = module.generate(ids, attention_mask=torch.ones_like(ids), **options)
        finally:
            for handle in handles:
                handle.remove()


def options_of(way: str) -> dict[str, Any]:
    return {"max_new_tokens": LENGTH, "do_sample": False, "pad_token_id": 0, **WAYS[way]()}


CHOSEN: dict[str, Callable[[int], bool]] = {
    "none": lambda run: False,
    "all": lambda run: True,
    "the second": lambda run: run == 1,
}


@pytest.mark.parametrize("chosen", CHOSEN)
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_a_generation_with_reads_and_changes(way: str, chosen: str) -> None:
    module = tiny_model("llama")
    plain = ByHooks(module, options_of(way), CHOSEN[chosen])
    model, options = LanguageModel(module), options_of(way)
    torch.manual_seed(11)
    with model.generate(PROMPT, **options) as tracer:
        seen, logits = save([]), save([])
        for step in tracer.iter[:]:
            if CHOSEN[chosen](step):
                model.model.layers[0].mlp.output = scaled(model.model.layers[0].mlp.output)
            seen.append(model.model.layers[1].output)
            # When it samples with an assistant, transformers goes on to write into the logits that it gets.
            logits.append(model.lm_head.output)
        result = tracer.result.save()
    assert torch.equal(tokens_of(result.value), tokens_of(plain.result))
    # A generation with an assistant may end on tokens for which the model is not asked any more.
    assert len(seen) == len(plain.seen) > 1
    for ours, theirs in zip([*seen, *logits], [*plain.seen, *plain.logits], strict=True):
        assert torch.equal(ours.value, theirs)
    for name in ("scores", "logits") if way == "scores" else ():
        for ours, theirs in zip(result.value[name], plain.result[name], strict=True):
            assert torch.equal(ours, theirs)


@torch.no_grad()
def test_the_ways_are_ways_of_their_own() -> None:
    """If an option had no effect, its test above would show nothing."""
    module = tiny_model("llama")
    greedy = ByHooks(module, options_of("greedy"), CHOSEN["none"])
    changed = ByHooks(module, options_of("greedy"), CHOSEN["all"])
    assert not torch.equal(greedy.result, changed.result)
    for way in ("sampling", "logits processors", "stopping criteria", "penalties"):
        assert not torch.equal(ByHooks(module, options_of(way), CHOSEN["none"]).result, greedy.result)
    # Several tokens are tried in one run of the model.
    for way in ("prompt lookup", "an assistant"):
        plain = ByHooks(module, options_of(way), CHOSEN["none"])
        assert any(each.shape[1] > 1 for each in plain.seen[1:])
    assert ByHooks(module, options_of("beams"), CHOSEN["none"]).seen[1].shape[0] == 3


@torch.no_grad()
def test_tokens_are_streamed_as_they_come() -> None:
    module = tiny_model("llama")
    ours, theirs = Streamed(), Streamed()
    plain = ByHooks(module, {**options_of("greedy"), "streamer": theirs}, CHOSEN["all"])
    model, came = LanguageModel(module), []
    with model.generate(PROMPT, **options_of("greedy"), streamer=ours) as tracer:
        for _ in tracer.iter[:]:
            model.model.layers[0].mlp.output = scaled(model.model.layers[0].mlp.output)
            came.append(len(ours.seen))
        tokens = tracer.result.save()
    assert ours.seen == theirs.seen == [PROMPT, *([each] for each in tokens[0, len(PROMPT) :].tolist()), []]
    assert torch.equal(tokens.value, plain.result)
    # In each step the tokens before it have come, and no others.
    assert came == list(range(1, LENGTH + 1))


@torch.no_grad()
def test_an_assistant_is_left_alone() -> None:
    """What is changed is the model that is traced, and not the one that makes the guesses."""
    module, other = tiny_model("llama"), assistant()
    before = other(torch.tensor([PROMPT])).logits
    runs: list[int] = []
    handle = other.register_forward_hook(lambda *each: runs.append(1))
    model = LanguageModel(module)
    with model.generate(PROMPT, **{**options_of("greedy"), "assistant_model": other}) as tracer:
        steps = save([])
        for step in tracer.iter[:]:
            model.model.layers[0].mlp.output = 0
            steps.append(step)
    handle.remove()
    assert len(runs) > 1 and len(steps) > 1
    assert torch.equal(other(torch.tensor([PROMPT])).logits, before)


@pytest.mark.parametrize("way", ["sampling", "beams", "several sequences"])
@torch.no_grad()
def test_an_edit_and_a_cache_in_each_way(way: str) -> None:
    module = tiny_model("llama")
    plain = ByHooks(module, options_of(way), CHOSEN["all"])
    with LanguageModel(module).edit() as edited:
        edited.model.layers[0].mlp.output = scaled(edited.model.layers[0].mlp.output)
    torch.manual_seed(11)
    with edited.generate(PROMPT, **options_of(way)) as tracer:
        cache = tracer.cache(modules=["model.layers.1"])
        tokens = tracer.result.save()
    assert torch.equal(tokens.value, plain.result)
    for ours, theirs in zip(cache["model.layers.1"].output, plain.seen, strict=True):
        assert torch.equal(ours, theirs)
