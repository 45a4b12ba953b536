"""Where queries and keys stand before they are rotated by their positions, told by what flows into what.

A rotation multiplies what comes of the hidden states by numbers that come of positions alone, cosines and sines. What
stands before it is the last tensor through which all ways from the hidden states to the queries lead, and behind which
no such product lies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nnsight_core.flow import Flow, Step, tensors_in
from nnterp.attention_flow import find, kernels

__all__ = ["Absent", "before_rotation", "Made", "multiplied"]

#: What moves entries, turns their signs or casts them, and computes nothing.
_FORMS = frozenset(
    """
    getitem neg cat concat concatenate stack reshape view transpose permute split chunk unbind float to type flatten
    unflatten unsqueeze squeeze contiguous narrow clone expand repeat_interleave swapaxes movedim split_with_sizes
    tensor_split view_as_complex view_as_real type_as view_as reshape_as new_empty empty_like zeros_like copy_ setitem
    roll half bfloat16 double T mT
    """.split()
)


@dataclass(frozen=True)
class Absent:
    """There is no such thing.

    Args:
        why: the reason.
    """

    why: str


@dataclass(frozen=True)
class Made:
    """A tensor that an operation makes.

    Args:
        step: the operation.
        entry: which entry of its result the tensor is; None for the whole.
        tensor: the tensor.
    """

    step: Step
    entry: int | None
    tensor: torch.Tensor


def multiplied(flow: Flow) -> tuple[Step, torch.Tensor, torch.Tensor]:
    """The operation that multiplies queries by keys, with both.

    Raises:
        UnknownAttentionError: there is no attention in the call, or one of another kind.
    """
    calls = kernels(flow)
    if calls:
        given = [*calls[0].args, *(calls[0].kwargs.get(name) for name in ("query", "key") if name in calls[0].kwargs)]
        return calls[0], given[0], given[1]
    before = find(flow).before
    return before.step, *before.operands


class _Ways:
    """The ways by which the hidden states reach a tensor."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._hidden = next((each for each in tensors_in((flow.args, flow.kwargs)) if each.is_floating_point()), None)
        self._positions = 0 if self._hidden is None else self._hidden.shape[-2]
        self._depends: set[int] = set() if self._hidden is None else {id(self._hidden)}
        #: The operations that made a tensor, and those that wrote into its memory, each with its number.
        self._makers: dict[int, list[int]] = {}
        self._writers: dict[int, list[int]] = {}
        for number, step in enumerate(flow.steps):
            self._note(number, step)

    def _note(self, number: int, step: Step) -> None:
        depends = any(id(each) in self._depends for each in self._numbers(step))
        taken = {id(each) for each in step.taken}
        for each in step.made:
            if depends:
                self._depends.add(id(each))
            if step.is_in_place:
                self._writers.setdefault(_memory(each), []).append(number)
            elif id(each) not in taken:
                # What gives back what it took, as a cast to the same type does, makes nothing.
                self._makers.setdefault(id(each), []).append(number)

    def _numbers(self, step: Step) -> list[torch.Tensor]:
        """What goes into the numbers that the operation gives: not what it is only to be like."""
        if step.function.endswith("_as") or step.function.startswith("new_"):
            return step.taken[:1] if step.function.endswith("_as") else []
        return step.taken

    def _sources(self, tensor: torch.Tensor, before: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The operations that made the tensor, before another, each with what it took that comes of hidden states."""
        numbers = (*self._makers.get(id(tensor), ()), *self._writers.get(_memory(tensor), ()))
        for number in numbers:
            if number < before:
                for each in self._numbers(self._flow.steps[number]):
                    if id(each) in self._depends:
                        yield number, each

    def behind(self, tensor: torch.Tensor, before: int, without: int = 0) -> tuple[set[int], bool]:
        """The operations behind a tensor, by their numbers, and whether they lead to the hidden states, on ways that
        do not lead through the tensor of the id ``without``.
        """
        seen: set[int] = set()
        reached = False
        met: set[tuple[int, int]] = set()
        waiting = [(tensor, before)]
        while waiting:
            each, limit = waiting.pop()
            if id(each) == without or (id(each), limit) in met:
                continue
            met.add((id(each), limit))
            reached |= each is self._hidden
            for number, source in self._sources(each, limit):
                seen.add(number)
                waiting.append((source, number))
        return seen, reached

    def turns(self, number: int) -> bool:
        """Whether an operation multiplies by numbers of positions, each entry by its own."""
        step = self._flow.steps[number]
        if step.function != "mul" or len(step.taken) != 2:
            return False
        others = [each for each in step.taken if id(each) not in self._depends]
        if len(others) != 1 or isinstance(others[0], torch.nn.Parameter):
            return False
        shape = others[0].shape
        return len(shape) > 1 and shape[-1] > 1 and self._positions in shape[:-1]

    def only_moves(self, tensor: torch.Tensor, number: int) -> bool:
        """Whether an operation takes the tensor's own numbers, moved and cast at most."""
        step = self._flow.steps[number]
        numbers: set[int] = set()
        for each in step.taken:
            if id(each) in self._depends:
                numbers |= self.behind(each, number, id(tensor))[0]
        return all(self._flow.steps[each].function in _FORMS for each in numbers)

    def is_complex(self, number: int) -> bool:
        """Whether an operation works on complex numbers."""
        return any(each.is_complex() for each in self._flow.steps[number].taken)

    def tensors(self, numbers: set[int]) -> Iterator[tuple[int, Made]]:
        """What these operations make, last first."""
        for number in sorted(numbers, reverse=True):
            step = self._flow.steps[number]
            result = step.result
            entries = enumerate(result) if isinstance(result, (tuple, list)) else [(None, result)]
            for entry, each in entries:
                if isinstance(each, torch.Tensor) and number in self._makers.get(id(each), ()):
                    yield number, Made(step, entry, each)


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def before_rotation(flow: Flow) -> tuple[Made | Absent | str, Made | Absent | str]:
    """Queries and keys before their rotation: what makes them, that there are none, or why nothing makes them.

    Raises:
        UnknownAttentionError: there is no attention in the call, or one of another kind.
    """
    ways = _Ways(flow)
    if not any(ways.turns(number) for number in range(len(flow.steps))):
        return _UNTURNED, _UNTURNED
    step, queries, keys = multiplied(flow)
    number = flow.steps.index(step)
    return _before(ways, queries, number, "queries"), _before(ways, keys, number, "keys")


_UNTURNED = Absent("its attention does not rotate queries and keys by their positions.")


def _before(ways: _Ways, tensor: torch.Tensor, before: int, what: str) -> Made | Absent | str:
    numbers, comes_of_hidden = ways.behind(tensor, before)
    if not comes_of_hidden:
        return Absent(f"it takes its {what} from another layer.")
    turning = {number for number in numbers if ways.turns(number)}
    # A complex number turns by one product, a pair of real ones by two.
    if not turning or (len(turning) == 1 and not ways.is_complex(next(iter(turning)))):
        return _UNTURNED
    for number, made in ways.tensors(numbers):
        if made.tensor.ndim != 4 or made.tensor.is_complex():
            continue
        behind, _ = ways.behind(made.tensor, number + 1)
        if not behind & turning and not ways.behind(tensor, before, id(made.tensor))[1]:
            if not all(ways.only_moves(made.tensor, each) for each in turning):
                return f"its {what} are computed with once more between their last whole tensor and the rotation."
            return made
    return f"no one tensor holds the {what} of all heads before a part of them is rotated."
