"""Generation: values of every step are read and set, and equal what plain hooks see in the model's own ``generate``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from nnsight_core import LanguageModel, OutOfOrderError, StepNotRunError, TraceStoppedError
from tests.families import tiny_model

PROMPT, SHORT = [5, 6, 7, 8, 9], [3, 4]
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(scope="module", params=["gpt2", "llama", "opt", "gemma2"])
def module(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


def layer_of(module: Any, index: int) -> Any:
    for path in ("transformer.h", "model.layers", "model.decoder.layers"):
        try:
            return module.get_submodule(f"{path}.{index}"), f"{path}.{index}"
        except AttributeError:
            continue
    raise AssertionError("no layers")


@contextmanager
def hooked(layer: Any, hook: Callable[..., Any]) -> Iterator[None]:
    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def generated(module: Any, ids: list[int], **options: Any) -> torch.Tensor:
    tokens: torch.Tensor = module.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **{**GREEDY, **options}
    )
    return tokens


def test_every_step_gives_what_a_hook_sees(module: Any) -> None:
    model = LanguageModel(module)
    layer, path = layer_of(module, 1)
    seen: list[torch.Tensor] = []
    with hooked(layer, lambda m, args, output: seen.append(output)):
        expected = generated(module, PROMPT)
    with model.generate(PROMPT, **GREEDY) as tracer:
        hidden = [model.get(path).output.save() for _ in tracer.iter[:]]
        tokens = model.generator.output.save()
    assert torch.equal(tokens, expected)
    assert len(hidden) == len(seen) == 4
    for ours, theirs in zip(hidden, seen, strict=True):
        assert torch.equal(ours, theirs)


def test_a_change_in_chosen_steps_equals_a_hooks_change_there(module: Any) -> None:
    model = LanguageModel(module)
    layer, path = layer_of(module, 0)
    runs = iter(range(9))

    def hook(m: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * -1 if next(runs) in (1, 2) else output

    with hooked(layer, hook):
        expected = generated(module, PROMPT)
    with model.generate(PROMPT, **GREEDY) as tracer:
        for _ in tracer.iter[1:3]:
            model.get(path).output *= -1
        tokens = tracer.result.save()
    assert torch.equal(tokens, expected)
    assert not torch.equal(tokens, generated(module, PROMPT))


def test_the_three_ways_to_the_next_step() -> None:
    module = tiny_model("gpt2")
    model = LanguageModel(module)
    with model.generate(PROMPT, **GREEDY) as tracer:
        by_number = [model.lm_head.output.save() for _ in tracer.iter[0:3]]
    with model.generate(PROMPT, **GREEDY) as tracer:
        by_tracer = [model.lm_head.output.save()]
        tracer.next()
        by_tracer.append(model.lm_head.output.save())
        tracer.next()
        by_tracer.append(model.lm_head.output.save())
    with model.generate(PROMPT, **GREEDY):
        by_module = [model.lm_head.output.save()]
        by_module.append(model.lm_head.next().output.save())
        by_module.append(model.lm_head.next().output.save())
    with model.generate(PROMPT, **GREEDY) as tracer, tracer.iter[2]:
        single = model.lm_head.output.save()
    for one, two, three in zip(by_number, by_tracer, by_module, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    assert torch.equal(single, by_number[2])


def test_code_after_an_open_loop_runs_and_the_end_of_the_sequence_ends_it() -> None:
    module = tiny_model("gpt2")
    model = LanguageModel(module)
    first = int(generated(module, PROMPT)[0, len(PROMPT)])
    with model.generate(PROMPT, max_new_tokens=4, do_sample=False, eos_token_id=first) as tracer:
        steps = [step for step in tracer.all() if model.lm_head.output is not None]
        tokens = model.generator.output.save()
    assert steps == [0]
    assert tokens.shape == (1, len(PROMPT) + 1)


def test_a_step_asked_for_by_number_that_does_not_come() -> None:
    model = LanguageModel(tiny_model("gpt2"))
    with pytest.raises(StepNotRunError, match="the model ran 4 times"), model.generate(PROMPT, **GREEDY) as tracer:
        for _ in tracer.iter[3:6]:
            assert model.lm_head.output is not None
    with pytest.raises(TypeError, match="Write a loop"), model.generate(PROMPT, **GREEDY) as tracer, tracer.iter[0:2]:
        pass
    with pytest.raises(ValueError, match="counted from 0"), model.generate(PROMPT, **GREEDY) as tracer:
        assert tracer.iter[-1]


def test_order_holds_within_a_step() -> None:
    model = LanguageModel(tiny_model("gpt2"))
    with pytest.raises(OutOfOrderError, match=r"h\.0\.output"), model.generate(PROMPT, **GREEDY) as tracer:
        tracer.next()
        assert model.transformer.h[1].output is not None
        assert model.transformer.h[0].output is not None
    # The value of a passed module is not taken from the next step in silence.
    with model.generate(PROMPT, **GREEDY) as tracer:
        later = [model.transformer.h[1].output.shape[1] for _ in tracer.iter[:]]
    assert later == [len(PROMPT), 1, 1, 1]


def test_several_invokes_in_one_generation() -> None:
    module = tiny_model("llama")
    model = LanguageModel(module)
    layer, path = layer_of(module, 1)
    with hooked(layer, lambda m, args, output: output * 0):
        changed = generated(module, SHORT)
    with model.generate(**GREEDY) as tracer:
        with tracer.invoke(PROMPT):
            chosen = [model.lm_head.output[0, -1].argmax().save() for _ in tracer.iter[0:4]]
            tokens = model.generator.output.save()
        with tracer.invoke(SHORT):
            for _ in tracer.iter[0:4]:
                model.get(path).output = 0
            short = model.generator.output.save()
    assert tracer.forward_passes == 1
    assert tokens[0, -4:].tolist() == [int(each) for each in chosen] == generated(module, PROMPT)[0, -4:].tolist()
    assert short[0, -4:].tolist() == changed[0, -4:].tolist()


def test_stopping_in_the_middle_of_a_generation() -> None:
    module = tiny_model("gpt2")
    model = LanguageModel(module)
    ran: list[int] = []
    with hooked(module, lambda *each: ran.append(1)), model.generate(PROMPT, **GREEDY) as tracer:
        for step in tracer.iter[:]:
            hidden = model.transformer.h[0].output.save()
            if step == 1:
                tracer.stop()
                break
    assert len(ran) == 1
    assert hidden.shape[1] == 1
    assert torch.is_grad_enabled()


def test_a_stop_ends_an_open_loop_and_is_an_error_where_steps_are_numbered() -> None:
    model = LanguageModel(tiny_model("gpt2"))
    seen: list[int] = []
    with model.generate(PROMPT, **GREEDY) as tracer:
        for step in tracer.iter[:]:
            seen.append(step)
            hidden = model.transformer.h[1].output.save()
            if step == 1:
                tracer.stop()
    assert seen == [0, 1] and hidden.shape == (1, 1, 64)
    with pytest.raises(TraceStoppedError, match=r"tracer\.iter\[1\]"), model.generate(PROMPT, **GREEDY) as tracer:
        for _ in tracer.iter[0:3]:
            hidden = model.transformer.h[1].output.save()
            tracer.stop()
