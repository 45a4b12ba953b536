"""What is promised of the inside of attention, held against a kernel that is written out here and the eager weights."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from nnterp.repeated_heads import SharedHeadsError
from tests.matrix import hooks
from tests.matrix.attention_steps import order_of, stepwise
from tests.matrix.models import OLDER, Case

NAMES = ("queries", "keys", "values", "attention_scores", "attention_probabilities", "heads_output")
Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Seen:
    """What one attention computed: (batch, head, position, size), and (batch, head, query, key)."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    attention_scores: torch.Tensor
    attention_probabilities: torch.Tensor
    heads_output: torch.Tensor


def _attend(
    change: dict[str, Change],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Seen:
    """Attention in double precision, written out; ``change`` is made to what has its name."""
    assert not dropout_p

    def changed(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return change.get(name, lambda each: each)(tensor)

    query, key, value = changed("queries", query), changed("keys", key), changed("values", value)
    repeat = query.shape[1] // key.shape[1] if enable_gqa else 1
    q, k, v = (each.double() for each in (query, key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)))
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:]).tril() > 0
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = torch.where(attn_mask, scores, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask.double()
    scores = changed("attention_scores", scores)
    weights = torch.exp(scores - scores.logsumexp(-1, keepdim=True).nan_to_num(neginf=0.0))
    weights = changed("attention_probabilities", weights)
    result = changed("heads_output", torch.einsum("bhqk,bhkd->bhqd", weights, v))
    return Seen(query, key, value, scores.float(), weights.float(), result.to(query.dtype))


class _Kernel(TorchFunctionMode):
    """While it is on, the first call of torch's fused attention is the one that is written out."""

    def __init__(self, change: dict[str, Change]) -> None:
        super().__init__()
        self.change = change
        self.seen: list[Seen] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") != "scaled_dot_product_attention" or self.seen:
            return function(*args, **(kwargs or {}))
        self.seen.append(_attend(self.change, *args, **(kwargs or {})))
        return self.seen[0].heads_output


@contextlib.contextmanager
def written_out(module: torch.nn.Module, **change: Change) -> Iterator[list[Seen]]:
    """While it lasts, the module's attention is the one that is written out here."""
    kernel = _Kernel(change)
    before = module.register_forward_pre_hook(lambda *_: kernel.__enter__() and None)
    after = module.register_forward_hook(lambda *_: kernel.__exit__(None, None, None))
    try:
        yield kernel.seen
    finally:
        before.remove()
        after.remove()


def _is_fused(case: Case, layer: int) -> bool:
    """Whether the layer's attention calls torch's kernel."""
    with written_out(_module(case, layer)) as seen:
        hooks.logits(case.module, case.ids)
    return bool(seen)


@lru_cache(maxsize=16)
def _order(case: Case, layer: int) -> tuple[int, int, int] | None:
    """Which operations are the attention, where it is not the kernel."""
    if _is_fused(case, layer):
        return None
    module = _module(case, layer)
    with stepwise(module, None) as steps:
        hooks.logits(case.module, case.ids)
    return order_of(module, steps.names)


@contextlib.contextmanager
def watched(case: Case, layer: int, **change: Change) -> Iterator[Callable[[], Seen]]:
    """While it lasts, the layer's attention is changed; gives what tells what it has computed."""
    order, module = _order(case, layer), _module(case, layer)
    if order is None:
        with written_out(module, **change) as seen:
            yield lambda: seen[0]
        return
    with stepwise(module, order, **change) as steps:
        yield lambda: Seen(**steps.seen)


def layers(case: Case) -> list[int]:
    """The layers that have attention."""
    return [index for index, each in enumerate(case.facts["parts"]) if each["attn"]]


def _module(case: Case, layer: int) -> torch.nn.Module:
    module = case.module.get_submodule(case.model.attentions[layer].path)
    return module[0] if isinstance(module, torch.nn.ModuleList) else module


@lru_cache(maxsize=1)
def _truth(case: Case) -> dict[int, Seen]:
    """What each attention of the plain model computes."""
    with contextlib.ExitStack() as stack:
        seen = {layer: stack.enter_context(watched(case, layer)) for layer in layers(case)}
        hooks.logits(case.module, case.ids)
    return {layer: each() for layer, each in seen.items()}


@lru_cache(maxsize=1)
def _read(case: Case) -> dict[tuple[int, str], torch.Tensor]:
    """All that can be read, in one pass, whose logits stay as they are."""
    names = [name for name in NAMES if all(getattr(case.model, name).is_open(layer) for layer in layers(case))]
    found: dict[tuple[int, str], Any] = {}
    with torch.no_grad(), case.model.trace(case.ids):
        for layer in layers(case):
            for name in names:
                found[layer, name] = getattr(case.model, name)[layer].save()
        logits = case.model.logits.save()
    assert torch.equal(logits, case.logits), "reading what is inside attention changes the logits"
    return {place: each.value for place, each in found.items()}


def _close(seen: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert seen.shape == expected.shape, f"{what}: {tuple(seen.shape)} where {tuple(expected.shape)} is right"
    hidden = expected < -1e30
    assert torch.equal(seen < -1e30, hidden), f"{what}: other keys are masked"
    seen, expected = seen.masked_fill(hidden, 0), expected.masked_fill(hidden, 0)
    error = float((seen - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    assert error < 1e-4, f"{what}: off by {error:.3g} of its size"


def _as_shown(case: Case, layer: int, name: str, seen: torch.Tensor) -> torch.Tensor:
    """Keys and values may have been repeated for every head of queries; they are shown once."""
    if name not in ("keys", "values") or seen.shape[1] != case.model.num_heads:
        return seen
    said = getattr(_module(case, layer), "num_key_value_groups", None)
    groups = said or case.model.num_heads // case.model.num_kv_heads
    once = seen[:, ::groups]
    return once if torch.equal(once.repeat_interleave(groups, 1), seen) else seen


def _some(name: str) -> Change:
    """A change of some of the values: of one head, where each query head has its own."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        changed = tensor.clone()
        if name in ("keys", "values"):
            changed[:, :, 2:7] *= 0.5
        elif name == "attention_scores":
            changed[:, 0, 4:] += torch.linspace(0, 2, changed.shape[-1])
        else:
            changed[:, 0, 4:] *= 0.5
        return changed

    return change


def value_inside(name: str) -> Callable[[Case], None]:
    """``queries`` and their kin: what the attention written out here has; what is set counts, for its heads alone."""

    def check(case: Case) -> None:
        access = getattr(case.model, name)
        for layer in layers(case):
            access.place(layer)
        for layer in layers(case):
            seen, expected = _read(case)[layer, name], _as_shown(case, layer, name, getattr(_truth(case)[layer], name))
            if name == "attention_scores" and _order(case, layer) is not None:
                # Some subtract each row's largest first, which changes nothing.
                seen, expected = (each - each.amax(-1, keepdim=True) for each in (seen, expected))
            _close(seen, expected, f"{name}[{layer}]")
        if not layers(case):
            return
        layer, change = layers(case)[len(layers(case)) // 2], _some(name)
        if name in ("keys", "values"):
            _repeated(case, layer, name)
        with watched(case, layer, **{name: change}):
            truth = hooks.logits(case.module, case.ids)
        with torch.no_grad(), case.model.trace(case.ids):
            access[layer] = change(access[layer])
            is_open = case.model.heads_output.is_open(layer)
            heads = case.model.heads_output[layer].save() if is_open else None
            logits = case.model.logits.save()
        _close(logits, truth, f"logits after a change of {name}[{layer}]")
        assert not torch.equal(logits, case.logits), f"{name}[{layer}], set: nothing came of it"
        if heads is None:
            return
        before = _read(case)[layer, "heads_output"]
        same = torch.ones(before.shape[:3], dtype=torch.bool)
        same[:, 0] = False
        if name in ("keys", "values"):
            same = ~_read(case)[layer, "attention_probabilities"][..., 2:7].any(-1)
        assert torch.equal(heads[same], before[same]), f"{name}[{layer}], set: other heads change"

    return check


def _repeated(case: Case, layer: int, name: str) -> None:
    """Keys or values for each head of queries are each there as often as heads share it, and set together."""
    access, heads = getattr(case.model, name), case.model.num_heads
    once = _read(case)[layer, name]
    is_usual = OLDER or case.model_type in MORE_KEYS or once.shape[1] == case.model.num_kv_heads
    assert is_usual, f"{name}[{layer}] has {once.shape[1]} heads, and num_kv_heads is {case.model.num_kv_heads}"
    expected = torch.repeat_interleave(once, heads // once.shape[1], 1)
    with torch.no_grad(), case.model.trace(case.ids):
        seen = access.repeated[layer].save()
        access.repeated[layer] = _some(name)(expected)
        logits = case.model.logits.save()
    assert torch.equal(seen, expected), f"{name}.repeated[{layer}]"
    with torch.no_grad(), case.model.trace(case.ids):
        access[layer] = _some(name)(once)
        same = case.model.logits.save()
    assert torch.equal(logits, same), f"{name}.repeated[{layer}], set: not what {name}[{layer}] does"
    assert not torch.equal(logits, case.logits), f"{name}.repeated[{layer}], set: nothing came of it"
    if once.shape[1] == heads:
        return
    apart = expected.clone()
    apart[:, 1] += 1
    try:
        with torch.no_grad(), case.model.trace(case.ids):
            access.repeated[layer] = apart
    except SharedHeadsError:
        return
    raise AssertionError(f"{name}.repeated[{layer}] was set to other values for heads that share one")


def probabilities(case: Case) -> None:
    """They add up to one over the keys that may be seen, weigh the values, and are the family's own eager weights."""
    value_inside("attention_probabilities")(case)
    if not layers(case):
        return
    for layer in layers(case):
        found = {name: each for (one, name), each in _read(case).items() if one == layer}
        shown = found["attention_probabilities"]
        total, sums = torch.ones(shown.shape[:-1]), shown.sum(-1)
        fits = (sums <= total + 1e-5).all() if case.model_type in SINKS else torch.allclose(sums, total)
        assert fits, f"layer {layer}: a sum is not one"
        assert not shown[found["attention_scores"] < -1e30].any(), f"layer {layer}: what is masked has a probability"
        values = found["values"].repeat_interleave(shown.shape[1] // found["values"].shape[1], 1)
        if "heads_output" in found:
            _close(shown @ values, found["heads_output"], f"what layer {layer} weighs with its probabilities")
    _are_eager(case)
    _of_a_new_token(case)
    if case.spec.family == case.model_type:
        # The same for all types of a file, and slower than all the rest.
        _of_inputs(case)


#: Sinks take some of the probability.
SINKS = ("deepseek_v4", "flint", "gpt_oss", "hy_v4", "inkling2_text", "mimo_v2_flash")
#: It takes its keys once more for each of several rounds of queries, one after the other.
MORE_KEYS = ("jetmoe",)
#: Their eager weights are those of several runs of each layer, of other layers as well, or of tokens alone. In
#: transformers 4 some families keep none, or others.
MORE_WEIGHTS = ("blt", "cpmant", "hrm_text", "longcat_flash")


def _eager(case: Case) -> Any:
    """A copy of the plain model with its attention written out, for some releases leave marks where it is asked."""
    module = copy.deepcopy(case.module)
    for each in module.modules():
        config: Any = getattr(each, "config", None)
        if config is not None and config._attn_implementation in ("sdpa", "flex_attention"):
            config._attn_implementation = "eager"
    return module


def _of_layers(case: Case, weights: Any) -> list[torch.Tensor]:
    found = [weights[layer] for layer in layers(case)] if len(weights) == case.num_layers else list(weights)
    assert len(found) == len(layers(case)), f"{len(weights)} eager weights"
    # XLNet predicts through a second stream, whose weights come along.
    return [each[0] if isinstance(each, tuple) else each for each in found]


def _are_eager(case: Case) -> None:
    if OLDER or case.model_type in MORE_WEIGHTS:
        return
    with torch.no_grad():
        weights = _of_layers(case, _eager(case)(input_ids=case.ids, output_attentions=True).attentions)
    for layer, each in zip(layers(case), weights, strict=True):
        _close(_read(case)[layer, "attention_probabilities"], each, f"eager weights of layer {layer}")


def _of_inputs(case: Case) -> None:
    """Each of two inputs in one pass sees and changes what is its own."""
    if "invokes" in case.spec.cannot:
        return
    layer, access = layers(case)[-1], case.model.attention_probabilities
    with torch.no_grad(), case.model.trace() as tracer:
        with tracer.invoke(case.ids[:1]):
            first = access[layer].save()
            logits = case.model.logits.save()
        with tracer.invoke(case.ids[1:]):
            second = access[layer].save()
            access[layer][:, 0] = 0
    assert tracer.forward_passes == 1
    whole = _read(case)[layer, "attention_probabilities"]
    _close(torch.cat([first, second]), whole, "probabilities of two inputs")
    _close(logits, case.logits[:1], "logits of an input whose neighbour is changed")


def _of_a_new_token(case: Case) -> None:
    """With a cache there is one query; it has what it has in the family's own generation."""
    options: dict[str, Any] = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    layer, kept, ids = layers(case)[0], [], case.ids[:1]
    with torch.no_grad(), case.model.generate(ids, **options) as tracer:
        for _ in tracer.iter[:]:
            kept.append(case.model.attention_probabilities[layer].save())
    assert len(kept) == 2
    if OLDER or case.model_type in MORE_WEIGHTS:
        return
    options |= {"attention_mask": torch.ones_like(ids), "output_attentions": True, "return_dict_in_generate": True}
    with torch.no_grad():
        given = _eager(case).generate(ids, **options)
    weights = getattr(given, "decoder_attentions", None) or given.attentions
    _close(kept[1].value, _of_layers(case, weights[1])[0], "probabilities of a new token")


PROMISES: dict[str, Callable[[Case], None]] = {
    **{name: value_inside(name) for name in NAMES},
    "attention_probabilities": probabilities,
}
PRESENT: dict[str, Callable[[Case], bool]] = {name: lambda case: bool(layers(case)) for name in PROMISES}
