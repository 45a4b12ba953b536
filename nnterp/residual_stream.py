"""Changing the residual stream: steering, ablating a direction, and skipping layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from nnsight_core.arguments import apply, unwrap
from nnsight_core.values import own_copy
from nnterp.accessors import read, write
from nnterp.errors import PositionError, SteeringVectorError, UsageError

if TYPE_CHECKING:
    from nnsight_core.scope import Scope
    from nnterp.accessors import ValueAccess
    from nnterp.spec import ArchitectureSpec


class ResidualStream:
    """What a :class:`~nnterp.StandardizedTransformer` does to the residual stream inside a trace."""

    layers_input: ValueAccess
    layers_output: ValueAccess
    hidden_size: int
    _spec: ArchitectureSpec

    def steer(
        self,
        layers: int | Sequence[int],
        steering_vector: Any,
        factor: float = 1,
        positions: int | Sequence[int] | torch.Tensor | None = None,
        token_positions: int | Sequence[int] | torch.Tensor | None = None,
        batch_index: int | Sequence[int] | torch.Tensor | None = None,
    ) -> None:
        """Add ``factor * steering_vector`` to the output of one or more layers (Turner et al. 2023, "Activation
        Addition").

        >>> from nnterp import StandardizedTransformer
        >>> model = StandardizedTransformer("demo-gpt2")
        >>> with model.trace("The Eiffel Tower is in the city of"):
        ...     model.steer(layers=[1, 3], steering_vector=torch.ones(model.hidden_size), factor=0.5)
        ...     logits = model.logits.save()

        Args:
            layers: the layers after which to add; they are steered in forward order, whatever the order given.
            steering_vector: of shape (hidden), or (batch, position, hidden) for the chosen rows and positions, where
                1 stands for all.
            factor: how much of it.
            positions: which positions of the padded batch, all of them if None; -1 is the last.
            token_positions: instead of ``positions``, counted by the tokens of one's own prompt, whatever the padding.
            batch_index: which prompts of the batch, all of them if None. Of several prompts and several positions the
                first prompt is steered at the first position, the second at the second, as tensors are indexed.

        Raises:
            SteeringVectorError: the vector does not fit the model.
            PositionError: a position or a row is not there, or there are not as many positions as prompts.
            LayerIndexError: the model has no such layer.
        """
        where = (positions, token_positions, batch_index)
        self._change("steer", layers, where, _added, (steering_vector, factor))

    def ablate_direction(
        self,
        layers: int | Sequence[int],
        direction: Any,
        positions: int | Sequence[int] | torch.Tensor | None = None,
        token_positions: int | Sequence[int] | torch.Tensor | None = None,
        batch_index: int | Sequence[int] | torch.Tensor | None = None,
    ) -> None:
        """Take ``direction`` out of the output of one or more layers: ``h - (h . d) d``, where d has the length 1.

        The method is from Arditi et al. 2024, "Refusal in Language Models Is Mediated by a Single Direction".

        >>> from nnterp import StandardizedTransformer
        >>> model = StandardizedTransformer("demo-gpt2")
        >>> direction = torch.ones(model.hidden_size)
        >>> with model.trace("The Eiffel Tower is in the city of"):
        ...     model.ablate_direction(layers=3, direction=direction)
        ...     along = (model.layers_output[3] @ direction).abs().max().save()
        >>> bool(along < 1e-4)
        True

        Args:
            layers: the layers after which to ablate, as for :meth:`steer`.
            direction: of shape (hidden), of any length but 0.
            positions: as for :meth:`steer`.
            token_positions: as for :meth:`steer`.
            batch_index: as for :meth:`steer`.

        Raises:
            SteeringVectorError: the direction does not fit the model.
            UsageError: the direction is zero.
            PositionError: a position or a row is not there.
            LayerIndexError: the model has no such layer.
        """
        where = (positions, token_positions, batch_index)
        self._change("ablate_direction", layers, where, _without, (direction,))

    def _change(
        self,
        name: str,
        layers: int | Sequence[int],
        where: tuple[Any, Any, Any],
        change: Callable[..., torch.Tensor],
        given: tuple[Any, ...],
    ) -> None:
        self._spec.refuse("steer", f"{name}(...)")
        if where[0] is not None and where[1] is not None:
            raise PositionError(f"{name}() takes positions or token_positions, not both: they count differently.")
        scope = self.open_scope(f"model.{name}(...)")  # type: ignore[attr-defined]
        wanted = [layers] if isinstance(layers, int) else list(layers)
        for layer in sorted({self.layers_output.position(each) for each in wanted}):
            hidden = self.layers_output[layer]
            self.layers_output[layer] = apply(_changed, hidden, change, given, scope, where)

    def detect_layer_output_type(self) -> None:
        """For scripts that call it; nothing is done, since whether a layer gives a tuple is seen each time."""

    def skip_layer(self, layer: int, skip_with: Any = None) -> None:
        """Let layer ``layer`` change nothing: its output is its own input, or ``skip_with``, (batch, position, hidden).

        See :meth:`skip_layers`.
        """
        self.skip_layers(layer, layer, skip_with)

    def skip_layers(
        self, start_layer: int, end_layer: int, skip_with: Any = None, layer_returns_tuple: bool | None = None
    ) -> None:
        """Let the layers from ``start_layer`` to ``end_layer``, both included, change nothing.

        The output of each is what came into the first of them, or ``skip_with`` of shape (batch, position, hidden). The
        layers' own computation still runs, so that a key-value cache stays whole; nothing of it reaches the stream.
        ``layer_returns_tuple`` is for scripts that say it: whether a layer gives a tuple is seen when it does.

        >>> from nnterp import StandardizedTransformer
        >>> model = StandardizedTransformer("demo-gpt2")
        >>> with model.trace("The Eiffel Tower is in the city of"):
        ...     model.skip_layers(1, 2)
        ...     logits = model.logits.save()

        Raises:
            LayerIndexError: the model has no such layer.
            ShapeError: ``skip_with`` has another shape than the residual stream.
        """
        self._spec.refuse("skip", f"skip_layers({start_layer}, {end_layer})")
        start, end = self.layers_output.position(start_layer), self.layers_output.position(end_layer)
        if end < start:
            raise ValueError(f"skip_layers({start_layer}, {end_layer}) ends before it begins; both ends are included.")
        # A copy for each layer, so that changing one of these outputs in place leaves the others alone.
        if skip_with is not None:
            for layer in range(start, end + 1):
                self.layers_output[layer] = apply(own_copy, skip_with)
            return
        root: Any = self
        stream = read(root, self.layers_input.as_it_is(start))
        for layer in range(start, end + 1):
            write(root, self.layers_output.as_it_is(layer), apply(own_copy, stream))


def _changed(
    hidden: torch.Tensor,
    change: Callable[..., torch.Tensor],
    given: tuple[Any, ...],
    scope: Scope,
    where: tuple[Any, Any, Any],
) -> torch.Tensor:
    rows, columns = chosen(hidden, scope, *where)
    new = hidden.clone()
    new[rows, columns] = change(new[rows, columns], *given)
    return new


def _added(part: torch.Tensor, vector: Any, factor: float) -> torch.Tensor:
    # Of two axes, the first might be meant for prompts or for positions: that is for the user to say.
    size = part.shape[-1]
    if not isinstance(vector, torch.Tensor) or vector.ndim not in (1, 3) or vector.shape[-1] != size:
        raise SteeringVectorError(vector, (size,))
    try:
        return part + (factor * vector).to(device=part.device, dtype=part.dtype).expand(part.shape)
    except RuntimeError:
        raise SteeringVectorError(vector, tuple(part.shape)) from None


def _without(part: torch.Tensor, direction: Any) -> torch.Tensor:
    size = part.shape[-1]
    if not isinstance(direction, torch.Tensor) or direction.shape != (size,):
        raise SteeringVectorError(direction, (size,))
    if not direction.any():
        raise UsageError("The direction is zero everywhere, so it points nowhere: there is nothing to take out.")
    # In float32, for half a precision more would be left along the direction than was there of noise.
    unit = torch.nn.functional.normalize(direction.to(device=part.device, dtype=torch.float32), dim=0)
    exact = part.float()
    return (exact - (exact @ unit)[..., None] * unit).to(part.dtype)


def _indices(given: Any, length: int, what: str, device: torch.device) -> torch.Tensor:
    """Indices from 0 as a tensor of shape (n); negative ones count from the end."""
    if given is None:
        return torch.arange(length, device=device)
    found = torch.atleast_1d(torch.as_tensor(unwrap(given), device=device))
    if found.dtype == torch.bool:
        found = found.nonzero()[:, 0]
    found = found if found.numel() else found.long()
    outside = found[(found < -length) | (found >= length)]
    if len(outside):
        raise PositionError(f"{what} {int(outside[0])} is not there: there are {length}, counted from 0.")
    inside: torch.Tensor = found % length
    return inside


def chosen(
    hidden: torch.Tensor, scope: Scope, positions: Any, token_positions: Any, batch_index: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows and columns to change, so that ``hidden[rows, columns]`` is (batch, position, hidden)."""
    batch, length = hidden.shape[:2]
    rows = _indices(batch_index, batch, "Prompt", hidden.device)
    places = positions if token_positions is None else token_positions
    starts = torch.zeros(batch, dtype=torch.long)
    if token_positions is not None and scope.padding and length >= scope.prompt_length:
        starts = torch.as_tensor(scope.padding)
    each: list[Any] = [places] * len(rows)
    if batch_index is not None and places is not None and len(rows) > 1:
        listed = torch.atleast_1d(torch.as_tensor(unwrap(places)))
        listed = listed.nonzero()[:, 0] if listed.dtype == torch.bool else listed
        # As tensors are indexed by two lists: the first row at the first position, the second at the second.
        if len(listed) not in (0, 1, len(rows)):
            raise PositionError(
                f"{len(rows)} prompts and {len(listed)} positions are given: batch_index and positions are taken in "
                "pairs. Give one position for each of these prompts, or one for all, or steer once for each position."
            )
        each = list(listed.expand(len(rows))) if len(listed) else each
    columns = []
    for row, place in zip(rows.tolist(), each, strict=True):
        start = int(starts[row])
        what = "Position" if token_positions is None else f"In prompt {row}, token"
        columns.append(start + _indices(place, length - start, what, hidden.device))
    return rows[:, None], torch.stack(columns) if columns else rows[:, None]
