"""Norms with the statistics of a pass held fast: what is linear in the residual stream then, and what it is divided by.

A norm centres its input or does not, divides each position by a number, and multiplies each entry by a weight. Which of
these it does is seen by what it gives for chosen inputs, and not by its class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from nnsight_core.arguments import apply
from nnsight_core.sites import user_site
from nnsight_core.values import first_tensor
from nnterp.accessors import Layers, Place, StreamShape, ValueAccess, read, write
from nnterp.calling import config_of
from nnterp.errors import CannotError, MissingPartError, ShapeError, StackShapeError
from nnterp.spec_layer import KINDS

if TYPE_CHECKING:
    from collections.abc import Callable

    from nnsight_core.envoy import Envoy
    from nnterp.rename_plan import LayerPlan, RenamePlan
    from nnterp.spec import ArchitectureSpec

__all__ = ["frozen", "FrozenNorm", "Norms", "NormScales", "probes", "rounding"]

#: The size of the inputs that a norm is tried with: far above any epsilon, and its square far below what float16 holds.
SIZE = 64.0
#: How far two ways to one number may be apart, relative to its size.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


NO_NORM = "it has no such part, or none that reads the stream through a norm."
NO_SUM_NORM = "it has no such part, or the stream goes through no norm once what it gives is added."


def rounding(dtype: torch.dtype) -> float:
    """How far two ways to one number may be apart in this precision, relative to its size: rounding, not meaning.

    >>> rounding(torch.float32)
    0.0001
    """
    return _ROUNDING.get(dtype, 5e-2)


@dataclass(frozen=True)
class FrozenNorm:
    """A norm whose statistics are those of one pass: ``weight * (x - mean(x)) / scale + bias``.

    Args:
        weight: (hidden).
        bias: (hidden); zero where there is none.
        scale: what each position is divided by: (batch, position, 1), positive.
        centers: whether the mean over the hidden axis is taken away.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    scale: torch.Tensor
    centers: bool

    def apply(self, stack: torch.Tensor) -> torch.Tensor:
        """Each contribution as it comes out of the norm, without the bias: (..., batch, position, hidden)."""
        if self.centers:
            stack = stack - stack.mean(-1, keepdim=True)
        return stack * (self.weight.double() / self.scale.double()).to(stack.dtype)


def probes(stream: torch.Tensor) -> torch.Tensor:
    """What a norm over the last axis of ``stream`` is tried with: (3, 1, hidden)."""
    ones = torch.ones(stream.shape[-1], device=stream.device, dtype=stream.dtype)
    signs = ones.clone()
    signs[1::2] = -1
    return SIZE * torch.stack([signs, -signs, signs + ones])[:, None]


def frozen(stream: torch.Tensor, given: Any, tried: Any, label: str = "the norm") -> FrozenNorm:
    """The norm that gives ``given`` for ``stream``, with its statistics held fast.

    >>> norm = torch.nn.LayerNorm(4)
    >>> stream = torch.tensor([[[1.0, 2.0, 3.0, 6.0]]])
    >>> held = frozen(stream, norm(stream), norm(probes(stream)))
    >>> held.centers, round(float(held.scale), 4)
    (True, 1.8708)

    Args:
        stream: what the norm takes in the pass: (batch, position, hidden).
        given: what it gives for that.
        tried: what it gives for :func:`probes`.
        label: what the norm is called, in errors.

    Raises:
        CannotError: what it gives is no weighted, divided and shifted copy of what it takes.
    """
    # What is frozen is a number of this pass, and no gradient goes through it.
    values = (stream.detach(), first_tensor(given).detach(), first_tensor(tried).detach())
    is_known = not any(each.is_meta or type(each).__name__ == "FakeTensor" for each in values)
    if values[1].shape != values[0].shape:
        reason = f"it makes {tuple(values[1].shape)} of {tuple(values[0].shape)}."
        raise CannotError(f"{label} as a linear map", reason, "The shapes of the pass")
    x, y, (plus, minus, moved) = (each.double() for each in values)
    centers = not is_known or bool(((moved - plus).abs() <= 0.01 * (plus - minus).abs().max()).all())
    signs = probes(values[0]).double()[0]
    if centers:
        x, signs = x - x.mean(-1, keepdim=True), signs - signs.mean()
    bias = (plus[0] + minus[0]) / 2
    weight = (plus[0] - bias) * signs.square().mean().sqrt() / signs[0]
    whole = weight * x
    inverse = (whole * (y - bias)).sum(-1, keepdim=True) / whole.square().sum(-1, keepdim=True)
    # A position that is nothing but zeros gives no scale; what it contributes is zero whatever the scale.
    inverse = torch.where(inverse.isfinite() & (inverse != 0), inverse, torch.ones_like(inverse))
    if is_known:
        _check(whole * inverse + bias, y, rounding(values[1].dtype), label)
    dtype = torch.promote_types(values[0].dtype, torch.float32)
    return FrozenNorm(weight.to(dtype), bias.to(dtype), (1 / inverse).to(dtype), centers)


def _check(frozen: torch.Tensor, given: torch.Tensor, tolerance: float, label: str) -> None:
    apart = float((frozen - given).abs().max())
    if not apart <= tolerance * (1e-6 + float(given.abs().max())):
        reason = f"with its statistics held fast it gives other numbers than in the pass, by up to {apart:.3g}."
        raise CannotError(f"{label} as a linear map", reason, "A comparison of the two")


def _scale(stream: torch.Tensor, given: Any, tried: Any, label: str) -> torch.Tensor:
    return frozen(stream, given, tried, label).scale


def _rescaled(given: torch.Tensor, stream: torch.Tensor, own: Any, tried: Any, label: str, new: Any) -> torch.Tensor:
    held = frozen(stream, own, tried, label)
    if isinstance(new, (int, float)):
        new = torch.full_like(held.scale, new)
    if not isinstance(new, torch.Tensor) or new.shape != held.scale.shape:
        raise ShapeError(label, new, held.scale)
    bias = held.bias.to(given.dtype)
    return bias + (given - bias) * (held.scale / new).to(given.dtype)


class NormScales(Layers):
    """``mlps_norm_scale[i]`` and its kin: what the norm before a part divides by, (batch, position, 1).

    Set it, and the norm divides by that instead. A norm runs before its part: ask for its scale first.
    ``mlps_sum_norm_scale[i]`` and its kin are the same of the norm that the stream itself goes through once the part is
    added, as in BERT; it runs after its part.

    Args:
        paths: the norm's full path for each layer, None where there is none.
        shape: the axes of what the norms take and give.
        spec: says why, where what stands there is no norm.
    """

    def __init__(
        self,
        root: Envoy,
        name: str,
        paths: tuple[str | None, ...],
        shape: StreamShape,
        spec: ArchitectureSpec,
        why_not: str = NO_NORM,
    ) -> None:
        super().__init__(name, len(paths))
        self._spec = spec
        self._root = root
        self._paths = paths
        self._shape = shape
        self._why_not = why_not

    def has(self, layer: int) -> bool:
        """Whether there is such a norm in the layer."""
        return self._paths[self.position(layer)] is not None

    def _place(self, layer: int, kind: str) -> Place:
        index = self.position(layer)
        label, path = f"{self.name}[{index}]", self._paths[index]
        if path is None:
            raise MissingPartError(label, self._why_not)
        self._spec.refuse("norm_scales", label)
        return Place(path, kind, label, shape=self._shape)

    def __getitem__(self, layer: int) -> Any:
        place = self._place(layer, "input")
        return apply(_scale, *_seen(self._root, place), place.label)

    def __setitem__(self, layer: int, value: Any) -> None:
        taken, given = self._place(layer, "input"), self._place(layer, "output")
        seen = _seen(self._root, taken)
        current = read(self._root, given, setting=True)
        write(self._root, given, apply(_rescaled, current, *seen, taken.label, value))


def _seen(root: Envoy, place: Place, stream: Any = None) -> tuple[Any, Any, Any]:
    """What a norm takes, gives, and gives for the probes."""
    if stream is None:
        stream = read(root, place, site=user_site())
    norm = root.get(place.path)
    return stream, norm(stream), norm(apply(probes, stream))


class Norms:
    """What a :class:`~nnterp.StandardizedTransformer` knows of its norms."""

    #: What the norm before a layer's mixer takes: (batch, position, hidden), read and set.
    layers_norm_input: ValueAccess
    layers_output: ValueAccess
    mixers_norm_scale: NormScales
    attentions_norm_scale: NormScales
    mlps_norm_scale: NormScales
    mixers_sum_norm_scale: NormScales
    attentions_sum_norm_scale: NormScales
    mlps_sum_norm_scale: NormScales
    hidden_size: int
    _plan: RenamePlan
    _spec: ArchitectureSpec
    _module: torch.nn.Module

    def _add_norms(self, root: Envoy, shape: StreamShape) -> None:
        layers = self._plan.layers
        parts = {
            "mixers": [each.mixer for each in layers],
            "attentions": [each.part("attention") for each in layers],
            "mlps": [each.part("mlp") for each in layers],
        }
        for name, each in parts.items():
            for kind, why_not in (("norm", NO_NORM), ("sum_norm", NO_SUM_NORM)):
                paths = tuple(getattr(part, kind) if part else None for part in each)
                scales = NormScales(root, f"{name}_{kind}_scale", paths, shape, self._spec, why_not)
                setattr(self, scales.name, scales)
        places = tuple(
            Place(norm, "input", f"layers_norm_input[{index}]", shape=shape) if norm else None
            for index, norm in enumerate(map(_first_norm, layers))
        )
        reasons = (NO_NORM,) * len(places)
        self.layers_norm_input = ValueAccess(root, "layers_norm_input", places, reasons, shape)

    def frozen_ln_final(self, stream: Any = None) -> Any:
        """The final norm with the statistics of this pass, a :class:`~nnterp.norms.FrozenNorm`; None where the family
        has no final norm.

        >>> from nnterp import StandardizedTransformer
        >>> model = StandardizedTransformer("demo-llama")
        >>> with model.trace("The Eiffel Tower is in the city of"):
        ...     norm = model.frozen_ln_final().save()
        >>> norm.centers, norm.weight.shape == (model.hidden_size,)
        (False, True)

        Args:
            stream: the residual stream whose statistics are meant, (batch, position, hidden); without it, what the
                final norm takes in the open trace.

        Raises:
            CannotError: what stands at the end is no norm.
        """
        self._spec.refuse("final_norm", "frozen_ln_final()")
        path = self._plan.modules["ln_final"]
        if path is None:
            return None
        root: Any = self
        if stream is None and self._plan.unembed[0] == path and "project_on_vocab" not in self._spec.cannot:
            # The norm may run elsewhere as well; what the last layer gives is what it takes at the end.
            stream = self.layers_output.shape.joined(self.layers_output[-1])
        return apply(frozen, *_seen(root, Place(path, "input", "the input of ln_final"), stream), "ln_final")

    @property
    def ln_final_scale(self) -> Any:
        """What the final norm divides by in this pass: (batch, position, 1).

        Raises:
            MissingPartError: the family has no final norm.
            CannotError: what stands at the end is no norm.
        """
        norm = self.frozen_ln_final()
        if norm is None:
            raise MissingPartError("ln_final_scale", self._spec.absent["ln_final"])
        return apply(_scale_of, norm)

    def apply_ln_to_stack(self, stack: Any, stream: Any = None) -> Any:
        """What each contribution to the residual stream becomes in the final norm, when its statistics are those of
        this pass.

        The norm is then linear: a LayerNorm centres each contribution, an RMSNorm does not; both divide it by this
        pass's scale and multiply it by the norm's weight. What is given for a complete decomposition of the stream adds
        up to the final norm's output without its bias, so that its products with :meth:`unembedding_directions` add up
        to the logits ("direct logit attribution", Elhage et al. 2021, "A Mathematical Framework for Transformer
        Circuits"). Where the family has no final norm the stack comes back as it is.

        >>> from nnterp import StandardizedTransformer
        >>> model = StandardizedTransformer("demo-gpt2")
        >>> with model.trace("The Eiffel Tower is in the city of"):
        ...     begin = model.layers_output[1]
        ...     rest = model.layers_output[-1] - begin
        ...     parts = model.apply_ln_to_stack(torch.stack([begin, rest])).save()
        >>> parts.shape[0], parts.shape[-1] == model.hidden_size
        (2, True)

        Args:
            stack: (..., batch, position, hidden).
            stream: as for :meth:`frozen_ln_final`; with it, no trace need be open.

        Returns:
            the same shape as ``stack``.

        Raises:
            StackShapeError: the last three axes of ``stack`` are not those of the stream.
            CannotError: what stands at the end is no norm.
            OutOfOrderError: the pass has gone by the final norm; ask before the logits.
        """
        norm = self.frozen_ln_final(stream)
        return stack if norm is None else apply(_applied, norm, stack)

    def unembedding_directions(self, tokens: Any) -> Any:
        """For each token the direction along which the final norm's output makes its logit: (..., hidden).

        The logits are those before soft-capping, multiplied as the family multiplies them, without the unembedding's
        bias.

        >>> from nnterp import StandardizedTransformer
        >>> model = StandardizedTransformer("demo-gpt2")
        >>> model.unembedding_directions([5, 6]).shape == (2, model.hidden_size)
        True

        Args:
            tokens: one token id, or ids of any shape.

        Raises:
            CannotError: the way from the final norm to the logits is not linear.
        """
        return self._unembedding(tokens)[0]

    def unembedding_bias(self, tokens: Any) -> torch.Tensor:
        """What the unembedding gives for each token whatever the final norm's output is: the shape of ``tokens``.

        Raises:
            CannotError: the way from the final norm to the logits is not linear.
        """
        return self._unembedding(tokens)[1]

    def _unembedding(self, tokens: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Directions (..., hidden) and biases (...)."""
        self._spec.refuse("unembedding_directions", "unembedding_directions(...)")
        ids = torch.as_tensor(getattr(tokens, "value", tokens))
        path = self._plan.modules["ln_final"]
        steps = self._plan.unembed[self._plan.unembed.index(path) + 1 :] if path in self._plan.unembed else None
        get: Callable[[str], Any] = self.get  # type: ignore[attr-defined]
        modules = [get(each) for each in (self._plan.unembed if steps is None else steps)]
        weight = next(modules[-1]._module.parameters())
        random = torch.Generator().manual_seed(0)
        with torch.enable_grad():
            at = torch.randn(ids.numel(), 1, self.hidden_size, generator=random)
            at = at.to(device=weight.device, dtype=weight.dtype).requires_grad_()
            scale = self._spec.logits.multiplier
            factor = 1.0 if scale is None else float(scale.value(config_of(self._module)))
            chosen = [_logits(modules, each, ids.reshape(-1), factor) for each in (at, 2 * at, 3 * at)]
            (found,) = torch.autograd.grad(chosen[0].sum(), at, materialize_grads=True)
        first, second, third = (each.detach().double() for each in chosen)
        apart = float((third - 2 * second + first).abs().max())
        if apart > rounding(weight.dtype) * (1e-6 + float(third.abs().max())):
            reason = "the way from the final norm to the logits is not linear"
            reason += f": along one line the logits bend by {apart:.3g}."
            raise CannotError("unembedding_directions(...)", reason, self._spec.where("unembed"))
        bias = chosen[0].detach() - (at * found).sum(-1)[:, 0].detach()
        return found.detach().reshape(*ids.shape, self.hidden_size), bias.reshape(ids.shape).to(found.dtype)


def _logits(modules: list[Any], at: torch.Tensor, ids: torch.Tensor, factor: float) -> torch.Tensor:
    for module in modules:
        given = module(at)
        at = first_tensor(getattr(given, "value", given))
    return at[torch.arange(len(ids)), 0, ids.to(at.device)] * factor


def _first_norm(layer: LayerPlan) -> str | None:
    """The norm through which the layer's mixers, or the MLP where it has nothing else, read the stream."""
    mixers = [part for part in layer.parts if part.kind in KINDS] or layer.parts[:1]
    return next((part.norm for part in mixers if part.norm), None)


def _scale_of(norm: FrozenNorm) -> torch.Tensor:
    return norm.scale


def _applied(norm: FrozenNorm, stack: Any) -> torch.Tensor:
    wanted = (*norm.scale.shape[:-1], norm.weight.shape[0])
    if not isinstance(stack, torch.Tensor) or tuple(stack.shape[-3:]) != wanted:
        raise StackShapeError(stack, wanted)
    return norm.apply(stack)
