"""Along which axis a value has its batch where the model is run again and again, as in a generation.

Each run has arguments of its own: the prompts first, then a token for each row and what is cached of those before. They
are noted as a run begins, for the model goes on to write into its cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from nnsight_core.batch_axes import Axes, Axis, BatchAxes
from nnsight_core.copies import with_tensors
from nnsight_core.dry_run import Place

#: What tells a run's batch, of the arguments of a language model.
_TOKENS = ("decoder_input_ids", "input_ids", "decoder_inputs_embeds", "inputs_embeds")


class RunAxes:
    """The axes of the runs of one generation.

    Args:
        root: the model.
        kwargs: the whole batch, as it was given.
        sizes: how many rows each input has.
        positions: how many positions the prompts have.
    """

    def __init__(
        self, root: torch.nn.Module, kwargs: dict[str, Any], sizes: Sequence[int], positions: int | None
    ) -> None:
        self._root = root
        self._sizes = tuple(sizes)
        given = dict(kwargs)
        if getattr(getattr(root, "config", None), "is_encoder_decoder", False) and "input_ids" in kwargs:
            # Its encoder runs by itself, before the first run of the model.
            given.setdefault("decoder_input_ids", kwargs["input_ids"][:, :1])
        self.of_inputs: Axes = BatchAxes(root, (), given, sizes, positions=positions, gives_rows=True)
        self._now: Axes | None = self.of_inputs
        self._modules: set[torch.nn.Module] | None = None
        self._run = -1
        #: By place, the last two runs with their shapes and axes.
        self._told: dict[Place, list[_Told]] = {}

    def begin(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is about to run, for the time of this ``number``, with these arguments."""
        if not number:
            self._told.clear()
        self._run, self._now = number, None
        tokens = next((kwargs[name] for name in _TOKENS if isinstance(kwargs.get(name), torch.Tensor)), None)
        if tokens is None:
            tokens = next((each for each in tree_leaves(args) if isinstance(each, torch.Tensor)), None)
        if tokens is None or tokens.ndim < 2:
            return
        spread, rest = divmod(len(tokens), sum(self._sizes))
        if rest:
            return
        try:
            args, kwargs = with_tensors((args, kwargs), lambda tensor: tensor)
        except Exception:  # noqa: BLE001 - what it holds may refuse to be copied; then nothing is known of this run
            return
        self._now = BatchAxes(self._root, args, kwargs, self._sizes, spread, tokens.shape[1], gives_rows=True)

    @property
    def spread(self) -> int:
        """How many rows of the model's batch each row of the inputs makes in this run."""
        return 1 if self._now is None else self._now.spread

    @property
    def positions(self) -> int | None:
        """How many positions each row has in this run."""
        return None if self._now is None else self._now.positions

    def serve(self, module: torch.nn.Module) -> bool:
        """Whether ``module`` is part of the model, and not of what is made of its results."""
        if self._modules is None:
            self._modules = set(self._root.modules())
        return module in self._modules

    def of(self, place: Place, shape: tuple[int, ...]) -> Axis:
        """The axis of the batch in a tensor of this shape, in this run.

        Raises:
            LookupError: it cannot be told, or each row's entries do not stand side by side.
        """
        if self._now is None:
            raise LookupError
        told = self._told.setdefault(place, [])
        now = _Told(self._run, (self._now.spread, self._now.positions), shape)
        if not now.goes_on_from(told):
            now.axis = self._now.of(place, shape)
            # Two that follow one another let the next be told without a run.
            self._told[place] = [*(each for each in told if each.run == self._run - 1), now][-2:]
        return now.axis


class _Told:
    """What was found out about a place in one run."""

    axis: Axis = None

    def __init__(self, run: int, batch: Any, shape: tuple[int, ...]) -> None:
        self.run = run
        self.batch = batch
        self.shape = shape

    def goes_on_from(self, told: list[_Told]) -> bool:
        """Whether the shape is what two runs that follow one another lead to: nothing but the cache has grown."""
        if len(told) != 2 or any(each.batch != self.batch for each in told):
            return False
        before, last = told
        if before.axis != last.axis or not len(before.shape) == len(last.shape) == len(self.shape):
            return False
        runs = self.run - last.run
        grown = zip(before.shape, last.shape, self.shape, strict=True)
        if any(now != then + runs * (then - first) for first, then, now in grown):
            return False
        self.axis = last.axis
        return self.axis is None or before.shape[self.axis[0]] == self.shape[self.axis[0]]
