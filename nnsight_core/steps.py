"""Generation steps: which run of the model values are asked of."""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

import torch

from nnsight_core.asked import Asked
from nnsight_core.envoy import Envoy
from nnsight_core.passes import Part
from nnsight_core.sites import user_site

_COUNTED = "Generation steps are counted from 0, forwards: nobody knows the last one beforehand."


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

    def __getitem__(self, steps: int | slice | Sequence[int]) -> ChosenSteps:
        if isinstance(steps, slice):
            return ChosenSteps(self, _from_slice(steps), needed=steps.stop is not None)
        listed: Sequence[Any] = steps if isinstance(steps, (list, tuple, range)) else [steps]
        wrong = next((each for each in listed if type(each) is bool or not hasattr(each, "__index__")), None)
        if wrong is not None:
            raise TypeError(f"tracer.iter takes numbers of generation steps, not {wrong!r}.")
        numbers = [operator.index(each) for each in listed]
        if any(each < 0 for each in numbers) or any(a >= b for a, b in itertools.pairwise(numbers)):
            raise ValueError(_COUNTED)
        return ChosenSteps(self, numbers, needed=True)

    def __iter__(self) -> Iterator[int]:
        return iter(self[:])

    def reach(self, step: int, needed: bool) -> bool:
        """Let the model run until ``step`` begins; False if the generation ends before.

        Raises:
            StepNotRunError: the step is ``needed`` and does not come.
        """
        part = self._part
        if needed:
            part.check_step(f"tracer.iter[{step}]", step)
        if part.live is None:
            # Where steps are numbered a recording can go on; how many there are is only known live.
            if needed:
                part.need_step(f"tracer.iter[{step}]", step)
                return True
            assert part.tape is not None
            part.tape.force()
        assert part.live is not None
        part.step = step
        if part.live.is_in_step(step):
            return True
        if part.live.is_stopped and not needed:
            return False
        site, label = user_site(), f"tracer.iter[{step}]"
        end = Asked(self._result._module, "input", label, site, (), None)
        begins = Asked(self._root, "input", label, site, (), step, otherwise=None if needed else end)
        return part.live.ask(begins).module is self._root


class ChosenSteps:
    """Some steps: a loop over them, or a block for a single one.

    Args:
        steps: where they are taken from.
        chosen: their numbers, rising.
        needed: one that does not come is an error.
    """

    def __init__(self, steps: Steps, chosen: Iterable[int], needed: bool) -> None:
        self._steps = steps
        self._chosen = chosen
        self._needed = needed

    def __iter__(self) -> Iterator[int]:
        for step in self._chosen:
            if not self._steps.reach(step, self._needed):
                return
            yield step

    def __enter__(self) -> int:
        chosen = list(itertools.islice(self._chosen, 2))
        if len(chosen) != 1 or not self._needed:
            raise TypeError("A block is run once, so it is for one step. Write a loop: for step in tracer.iter[...]:")
        self._steps.reach(chosen[0], needed=True)
        return chosen[0]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> Any:
        return None


def _from_slice(steps: slice) -> Iterable[int]:
    """The numbers of ``steps``, without an end if it has none.

    Raises:
        ValueError: they are counted from the end, or backwards.
    """
    start, step = steps.start or 0, 1 if steps.step is None else steps.step
    if start < 0 or step < 1 or (steps.stop is not None and steps.stop < start):
        raise ValueError(_COUNTED)
    return range(start, sys.maxsize if steps.stop is None else steps.stop, step)
