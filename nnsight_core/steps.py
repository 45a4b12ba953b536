"""Generation steps: which run of the model values are asked of."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch

from nnsight_core.asked import Asked
from nnsight_core.envoy import Envoy
from nnsight_core.passes import Part
from nnsight_core.sites import user_site


class Steps:
    """``tracer.iter``: takes the numbers of steps.

    Args:
        part: the body that asks.
        result: the envoy of what the whole generation gives.
        root: the model, which runs once in each step.
    """

    def __init__(self, part: Part, result: Envoy, root: torch.nn.Module) -> None:
        self._part = part
        self._result = result
        self._root = root

    def __getitem__(self, steps: int | slice) -> ChosenSteps:
        if isinstance(steps, int):
            steps = slice(steps, steps + 1)
        start, step = steps.start or 0, 1 if steps.step is None else steps.step
        if start < 0 or step < 1 or (steps.stop is not None and steps.stop < 0):
            raise ValueError("Generation steps are counted from 0, forwards: nobody knows the last one beforehand.")
        return ChosenSteps(self, slice(start, steps.stop, step))

    def __iter__(self) -> Iterator[int]:
        return iter(self[:])

    def reach(self, step: int, needed: bool) -> bool:
        """Let the model run until ``step`` begins; False if the generation ends before.

        Raises:
            StepNotRunError: the step is ``needed`` and does not come.
        """
        part = self._part
        if part.live is None:
            # Where steps are numbered a recording can go on; how many there are is only known live.
            if needed:
                part.step = step
                return True
            assert part.tape is not None
            part.tape.force()
        assert part.live is not None
        part.step = step
        if part.live.is_in_step(step):
            return True
        site, label = user_site(), f"tracer.iter[{step}]"
        end = Asked(self._result._module, "input", label, site, (), None)
        begins = Asked(self._root, "input", label, site, (), step, otherwise=None if needed else end)
        return part.live.ask(begins).module is self._root


class ChosenSteps:
    """Some steps: a loop over them, or a block for a single one."""

    def __init__(self, steps: Steps, chosen: slice) -> None:
        self._steps = steps
        self._chosen = chosen

    def __iter__(self) -> Iterator[int]:
        step, needed = self._chosen.start, self._chosen.stop is not None
        while not needed or step < self._chosen.stop:
            if not self._steps.reach(step, needed):
                return
            yield step
            step += self._chosen.step

    def __enter__(self) -> int:
        step = self._chosen.start
        if self._chosen.stop != step + 1:
            raise TypeError("A block is run once, so it is for one step. Write a loop: for step in tracer.iter[...]:")
        self._steps.reach(step, needed=True)
        return int(step)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> Any:
        return None
