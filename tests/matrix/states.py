"""What is promised of states, held against what the unwrapped model itself keeps for its next token."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from nnterp.errors import MissingPartError
from tests.matrix.models import Case

GENERATE = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
State = tuple[torch.Tensor, ...]


def kept(case: Case, output: Any, index: int) -> State | None:
    """The state of a layer, the model's own tensors, in what it has given; None where the layer keeps none."""
    if case.model_type == "recurrent_gemma":
        block: Any = case.module.get_submodule(f"model.layers.{index}.temporal_block")
        return (block.rg_lru.recurrent_states,) if hasattr(block, "rg_lru") else None
    cache = next(
        output[key] for key in ("cache", "past_key_values", "cache_params", "state") if output.get(key) is not None
    )
    if case.model_type == "rwkv":
        return tuple(each[:, :, index] for each in cache[2:])
    if case.model_type == "xlstm":
        return tuple(cache.rnn_state[index])
    for name in ("ssm_states", "recurrent_states", "linear_cache"):
        states = getattr(cache, name, None)
        if states is not None:
            has = index in states if isinstance(states, dict) else index < len(states)
            is_there = has and isinstance(states[index], torch.Tensor) and states[index].numel()
            return (states[index],) if is_there else None
    if hasattr(cache, "conv_cache"):
        return (cache.conv_cache[index],) if case.module.config.layer_types[index] == "conv" else None
    found = None
    if hasattr(cache, "get_recurrent_state") and hasattr(cache.layers[index], "recurrent_states"):
        found = cache.get_recurrent_state(index)
        found = cache.get_conv_state(index) if found is None else found
    return None if found is None else (found,)


def has_state(case: Case) -> list[int]:
    """The layers that keep a state, as the specification says."""
    return [index for index in range(case.num_layers) if case.model.mixers_state.has(index)]


@contextlib.contextmanager
def _after_each_run(case: Case, see: Callable[[Any], None]) -> Iterator[None]:
    handle = case.module.register_forward_hook(lambda _, args, output: see(output))
    try:
        yield
    finally:
        handle.remove()


def _tuple(value: Any) -> State:
    value = getattr(value, "value", value)
    return value if isinstance(value, tuple) else (value,)


def _same(seen: Any, expected: State, what: str, close: bool = False) -> None:
    assert len(_tuple(seen)) == len(expected), what
    for one, other in zip(_tuple(seen), expected, strict=True):
        assert one.shape == other.shape, f"{what}: {tuple(one.shape)} where {tuple(other.shape)} is right"
        apart = float((one - other).abs().max() / other.abs().max().clamp(min=1e-6))
        assert apart < 1e-4 if close else torch.equal(one, other), f"{what}: off by {apart:.3g} of its size"


def mixers_state(case: Case) -> None:
    """The state after the last position: in one pass, at each step of a generation, of each input, and set."""
    layers = has_state(case)
    if not layers:
        return
    _at_each_step(case, layers)
    _set(case, layers[-1])
    _of_each_input(case, layers[-1])


def _at_each_step(case: Case, layers: list[int]) -> None:
    ids, steps, seen = case.ids, list[dict[int, State]](), list[dict[int, Any]]()

    def see(output: Any) -> None:
        found = {index: kept(case, output, index) for index in range(case.num_layers)}
        steps.append({index: tuple(map(torch.clone, each)) for index, each in found.items() if each is not None})

    with _after_each_run(case, see):
        case.module.generate(ids, attention_mask=torch.ones_like(ids), **GENERATE)  # type: ignore[operator]
    assert list(steps[0]) == layers, f"layers {list(steps[0])} keep a state, and {layers} are said to"
    with case.model.generate(ids, **GENERATE) as tracer:
        for _ in tracer.iter[:]:
            seen.append({index: case.model.mixers_state[index].save() for index in layers})
        logits = case.model.generator.output.save()
    assert len(seen) == len(steps) == 3 and logits.shape[1] == ids.shape[1] + 3
    for step, (one, other) in enumerate(zip(seen, steps, strict=True)):
        for index in layers:
            _same(one[index], other[index], f"mixers_state[{index}] after step {step}")
    missing = set(range(case.num_layers)) - set(layers)
    for index in missing:
        try:
            case.model.mixers_state.place(index)
        except MissingPartError as error:
            assert f"mixers_state[{index}]" in str(error)
        else:
            raise AssertionError(f"mixers_state[{index}] is there, though the layer keeps none")


def _set(case: Case, index: int) -> None:
    """The next step goes on from what was set."""
    ids, plain, truth, seen = case.ids, list[torch.Tensor](), list[torch.Tensor](), list[Any]()

    def change(output: Any) -> None:
        for each in (kept(case, output, index) or ()) if not truth else ():
            each.mul_(0.5).add_(0.1)
        truth.append(output.logits[:, -1].clone())

    for see in (lambda output: plain.append(output.logits[:, -1].clone()), change):
        with _after_each_run(case, see):
            case.module.generate(ids, attention_mask=torch.ones_like(ids), **GENERATE)  # type: ignore[operator]
    with case.model.generate(ids, **GENERATE) as tracer:
        for step in tracer.iter[:]:
            if step == 0:
                state = case.model.mixers_state[index]
                case.model.mixers_state[index] = (
                    tuple(each * 0.5 + 0.1 for each in state) if isinstance(state.value, tuple) else state * 0.5 + 0.1
                )
            seen.append(case.model.logits[:, -1].save())
    for step, (one, other) in enumerate(zip(seen, truth, strict=True)):
        assert torch.equal(one, other), f"logits of step {step} once mixers_state[{index}] is set"
    assert torch.equal(truth[0], plain[0]) and not torch.equal(truth[1], plain[1]), "nothing came of it"


def _of_each_input(case: Case, index: int) -> None:
    """Of prompts of several lengths, and of several invokes, each has the state that it has alone."""
    once = GENERATE | {"max_new_tokens": 1, "min_new_tokens": 1}
    prompts = [case.ids[0].tolist(), case.ids[1, :7].tolist()]
    if "padding" not in {*case.spec.cannot, *case.cannot}:
        alone = [_alone(case, index, prompt, once) for prompt in prompts]
        with case.model.generate(prompts, **once):
            together = case.model.mixers_state[index].save()
        for row, expected in enumerate(alone):
            _same(tuple(each[row : row + 1] for each in _tuple(together)), expected, f"state of prompt {row}", True)
    if "invokes" in case.spec.cannot:
        return
    with case.model.generate(**once) as tracer:
        with tracer.invoke(case.ids[:1]):
            first = case.model.mixers_state[index].save()
        with tracer.invoke(case.ids[1:]):
            case.model.mixers_state[index] = 0
            second = case.model.mixers_state[index].save()
    assert tracer.forward_passes == 1
    _same(first, _alone(case, index, prompts[0], once), "the state in an invoke", True)
    assert all(not each.any() for each in _tuple(second))


def _alone(case: Case, index: int, prompt: list[int], options: dict[str, Any]) -> State:
    with case.model.generate([prompt], **options):
        seen = case.model.mixers_state[index].save()
    return _tuple(seen)


PROMISES: dict[str, Callable[[Case], None]] = {"mixers_state": mixers_state}
PRESENT: dict[str, Callable[[Case], bool]] = {"mixers_state": lambda case: bool(has_state(case))}
