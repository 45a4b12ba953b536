"""What is promised of norms, held against the plain norm and the derivatives that torch finds of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch

from nnterp.errors import MissingPartError
from tests.matrix import hooks
from tests.matrix.models import Case

#: At which position those begin that the logits come of, where it is not the first.
PREFIX = {"cpmant": 32, "prophetnet": 12}
#: How many positions of the model's own the accessors leave out.
LEFT_OUT = {"cpmant": 32}


def _close(seen: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert seen.shape == expected.shape, f"{what}: {tuple(seen.shape)} where {tuple(expected.shape)} is right"
    error = float((seen - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    assert error < 1e-4, f"{what}: off by {error:.3g} of its size"


def _random(shape: torch.Size, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _steady(stream: torch.Tensor) -> torch.Tensor:
    """A direction along which neither the mean nor the size of any position changes."""
    direction = _random(stream.shape, 3).double()
    for _ in range(2):
        for axis in (torch.ones_like(direction), stream.double() - stream.double().mean(-1, keepdim=True)):
            along = (direction * axis).sum(-1, keepdim=True) / axis.square().sum(-1, keepdim=True).clamp(min=1e-30)
            direction = direction - along * axis
    return direction.to(stream.dtype)


def _derivative(norm: torch.nn.Module, stream: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    def run(each: torch.Tensor) -> torch.Tensor:
        return hooks.first(norm(each))

    with torch.enable_grad():
        _, found = torch.autograd.functional.jvp(run, stream, direction)
    return found.detach()  # type: ignore[no-any-return]


def _call(case: Case, module: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """What the module takes and gives when it runs for the last time."""
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    see = module.register_forward_hook(
        lambda _, args, out: kept.append((hooks.first(args).clone(), hooks.first(out).clone()))
    )
    hooks.logits(case.module, case.ids)
    see.remove()
    return kept[-1]


def final_norm(case: Case) -> None:
    """The final norm with the statistics of the pass is linear, and what it makes of all parts is what the norm gives.

    Along directions that leave the statistics alone it is the derivative of the norm that torch finds.
    """
    path = case.model._plan.modules["ln_final"]
    if path is None:
        _without(case)
        return
    norm = case.module.get_submodule(path)
    start = PREFIX.get(case.model_type, 0)
    stream, given = (each[:, start:] for each in _call(case, norm))
    half = _random(stream.shape, 1)
    direction = _steady(stream)
    with torch.no_grad(), case.model.trace(case.ids):
        held = case.model.frozen_ln_final().save()
        scale = case.model.ln_final_scale.save()
        parts = case.model.apply_ln_to_stack(torch.stack([half, stream - half, direction])).save()
        logits = case.model.logits.save()
    _close(parts[0] + parts[1] + held.bias, given, "what the final norm makes of two parts")
    _close(parts[2], _derivative(norm, stream, direction), "the derivative of the final norm")
    centred = stream - stream.mean(-1, keepdim=True) if held.centers else stream
    size = centred.square().mean(-1, keepdim=True).sqrt()
    assert torch.allclose(scale, size, rtol=0.02), "the scale is not the size of the stream"
    assert torch.equal(logits, case.logits)


def unembedding_directions(case: Case) -> None:
    """What the final norm gives, times the directions, makes the logits: with the bias, and then soft-capped."""
    tokens = torch.tensor([[7, 11], [300, 300]])
    model, config = case.model, case.module.config
    path = model._plan.modules["ln_final"] or case.layer(case.num_layers - 1)[0]
    given = _call(case, case.module.get_submodule(path))[1]
    given = given.transpose(0, 1) if case.model_type == "xlnet" else given
    start = PREFIX.get(case.model_type, 0)
    given = given[:, start : start + case.ids.shape[1]]
    directions = model.unembedding_directions(tokens)
    assert directions.shape == (2, 2, model.hidden_size)
    scale, cap = case.spec.logits.multiplier, case.spec.logits.softcap
    bias = getattr(case.module.get_submodule(model._plan.unembed[-1]), "bias", None)
    made = torch.einsum("bph,kth->bpkt", given, directions)
    if isinstance(bias, torch.Tensor):
        made = made + bias.detach()[tokens] * (1 if scale is None else scale.value(config))
    limit = getattr(config, cap, None) if cap else None
    _close(made if limit is None else limit * (made / limit).tanh(), case.logits[..., tokens], "the logits")


def _without(case: Case) -> None:
    with torch.no_grad(), case.model.trace(case.ids) as tracer:
        stack = torch.ones(2, 3)
        assert case.model.apply_ln_to_stack(stack) is stack and case.model.frozen_ln_final() is None
        try:
            case.model.ln_final_scale  # noqa: B018 - asked for
        except MissingPartError as error:
            assert case.spec.absent["ln_final"] in str(error)
        else:
            raise AssertionError("a scale of a norm that is not there")
        tracer.stop()


def norm_scales(case: Case) -> None:
    """What the norms before the parts of each layer, and after their addition, divide by, read and set."""
    for name, kind in itertools.product(("mixers", "attentions", "mlps"), ("norm", "sum_norm")):
        values = getattr(case.model, f"{name}_{kind}_scale")
        for index, layer in enumerate(case.model._plan.layers):
            part = layer.mixer if name == "mixers" else layer.part(name[:-1])
            norm = None if part is None else getattr(part, kind)
            assert values.has(index) == (norm is not None)
            if norm is not None:
                _scale(case, values, index, norm)


def _scale(case: Case, values: Any, index: int, path: str) -> None:
    norm = case.module.get_submodule(path)
    found = hooks.read(case.module, [(path, "input"), (path, "output")], case.ids)
    stream = found[path, "input"]
    direction = _steady(stream)
    with torch.no_grad(), case.model.trace(case.ids):
        scale = values[index].save()
        values[index] = scale * 2
        logits = case.model.logits.save()
    shown = scale if scale.shape[:-1] == stream.shape[:-1] else None
    # What is left of the derivative, times what it was divided by, is the same at every position.
    if shown is not None:
        ones = direction.new_zeros(direction.shape)
        ones[..., 0] = 1
        steady = ones - _along(ones, stream)
        whole = _derivative(norm, stream, steady) * shown / steady.where(steady.abs() > 1e-3, torch.inf)
        first = whole[..., 0]
        _close(first, first[0, 0].expand_as(first), f"what the norm at {path} divides by")
    zero = hooks.first(norm(torch.zeros_like(stream))).nan_to_num().detach()
    start = LEFT_OUT.get(case.model_type, 0)

    def halved(each: torch.Tensor) -> torch.Tensor:
        return torch.cat([each[:, :start], zero[:, start:] + (each[:, start:] - zero[:, start:]) / 2], 1)

    truth = hooks.changed_logits(case.module, (path, "output"), halved, case.ids)
    _close(logits, truth, f"logits with twice the scale at {path}")
    assert not torch.equal(logits, case.logits)


def _along(direction: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
    centred = stream.double() - stream.double().mean(-1, keepdim=True)
    found = torch.zeros_like(centred)
    for axis in (torch.ones_like(centred), centred):
        found += (direction * axis).sum(-1, keepdim=True) / axis.square().sum(-1, keepdim=True).clamp(min=1e-30) * axis
    return found.to(stream.dtype)


PROMISES: dict[str, Callable[[Case], None]] = {
    "final_norm": final_norm,
    "norm_scales": norm_scales,
    "unembedding_directions": unembedding_directions,
}
#: Whether a model has what the promise is about.
PRESENT: dict[str, Callable[[Case], bool]] = {
    "final_norm": lambda case: case.model._plan.modules["ln_final"] is not None,
    "norm_scales": lambda case: any(
        part.norm or part.sum_norm for layer in case.model._plan.layers for part in layer.parts
    ),
}
