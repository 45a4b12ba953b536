"""Which operation of an attention does what, told by what flows into what: no name of a family or a module is known.

The softmax over keys is the one whose result values are multiplied by. The product before it is that of queries and
keys, the product after it gives what the heads give.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nnsight_core.flow import Flow, Step, tensors_in
from nnterp.attention_forms import Form, form_of, matching
from nnterp.attention_kernel import KERNELS

#: What finds each row's largest.
LARGEST = ("max", "amax")
#: The operand of a product: whether it is among the arguments or the keyword arguments, and where.
Slot = tuple[int, int | str]
#: Where the two operands of a product stand among its arguments, and what they are called.
_OPERANDS = {
    "matmul": ((0, "input"), (1, "other")),
    "bmm": ((0, "input"), (1, "mat2")),
    "baddbmm": ((1, "batch1"), (2, "batch2")),
    "einsum": ((1, ""), (2, "")),
}


class UnknownAttentionError(Exception):
    """The flow is not that of an attention that is known; says why."""


@dataclass(frozen=True)
class Product:
    """A product of matrices, for each batch and head: ``left`` (row, inner) by ``right`` (inner, column).

    Args:
        step: the operation.
        slots: where its operands stand.
        letters: the axes of its operands and of its result.
    """

    step: Step
    slots: tuple[Slot, Slot]
    letters: tuple[str, str, str]

    @property
    def operands(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What is multiplied."""
        call = (self.step.args, self.step.kwargs)
        left, right = (call[kind][at] for kind, at in self.slots)  # type: ignore[index]
        return left, right

    @property
    def result(self) -> torch.Tensor:
        """What comes of it."""
        made: torch.Tensor = self.step.result
        return made

    @property
    def swapped(self) -> Product:
        """The same product, read from the other side."""
        left, right, result = self.letters
        return Product(self.step, (self.slots[1], self.slots[0]), (right, left, result))

    def axes(self) -> tuple[str, str, str, str] | None:
        """The letters of batch and heads, of rows, of what is summed over, and of columns; None if it is another."""
        left, right, result = self.letters
        lead = "".join(each for each in result if each in left and each in right)
        row = "".join(each for each in result if each in left and each not in right)
        column = "".join(each for each in result if each in right and each not in left)
        inner = "".join(each for each in left if each in right and each not in result)
        is_usual = len(row) == len(column) == len(inner) == 1 and lead
        return (lead, row, inner, column) if is_usual else None

    def form(self, which: int) -> Form | None:
        """The form of the left operand, (batch, head, row, inner), of the right one, (batch, head, column, inner) where
        ``which`` is 1, and (batch, head, inner, column) where it is 2, or of the result where it is 3.
        """
        axes = self.axes()
        if axes is None:
            return None
        lead, row, inner, column = axes
        left, right, result = self.letters
        letters, rows, columns = (
            (left, row, inner),
            (right, column, inner),
            (right, inner, column),
            (result, row, column),
        )[which]
        return form_of(letters, lead, rows, columns, self.result, result)


def product_of(step: Step) -> Product | None:
    """The operation as a product of two; None if it is none."""
    if step.function not in _OPERANDS or not isinstance(step.result, torch.Tensor):
        return None
    slots: list[Slot] = []
    for number, name in _OPERANDS[step.function]:
        slots.append((0, number) if number < len(step.args) else (1, name))
    call: Any = (step.args, step.kwargs)
    try:
        left, right = (call[kind][at] for kind, at in slots)
    except KeyError:
        return None
    if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor):
        return None
    if step.function == "einsum":
        equation = step.args[0].replace(" ", "") if isinstance(step.args[0], str) else ""
        operands, arrow, result = equation.partition("->")
        if not arrow or operands.count(",") != 1 or "." in equation:
            return None
        one, other = operands.split(",")
        return Product(step, (slots[0], slots[1]), (one, other, result))
    if left.ndim != right.ndim or left.ndim < 3:
        return None
    lead = "abcdefgh"[: left.ndim - 2]
    return Product(step, (slots[0], slots[1]), (f"{lead}rs", f"{lead}st", f"{lead}rt"))


@dataclass(frozen=True)
class Found:
    """An attention's operations.

    Args:
        flow: all that it does.
        softmax: the softmax over keys.
        shift: what subtracts each row's largest before it, where that is done.
        scores: what goes into the softmax, before that.
        before: the product of queries and keys.
        after: the product of probabilities and values.
    """

    flow: Flow
    softmax: Step
    shift: Step | None
    scores: torch.Tensor
    before: Product
    after: Product


def kernels(flow: Flow) -> list[Step]:
    """The calls of torch's own kernels for all of attention."""
    return [step for step in flow.steps if step.function in KERNELS.values()]


def find(flow: Flow) -> Found:
    """The operations of attention in one call of a module.

    Raises:
        UnknownAttentionError: there is no attention in it, or one of another kind.
    """
    candidates: list[tuple[Step, Step | Product]] = []
    for step in flow.steps:
        if step.function == "softmax" and isinstance(step.result, torch.Tensor) and step.result.ndim > 2:
            after = _after(flow, step)
            if after is not None:
                candidates.append((step, after))
    if not candidates:
        raise UnknownAttentionError("no softmax gives what values are multiplied by.")
    if len(candidates) > 1:
        raise UnknownAttentionError(
            f"{len(candidates)} softmaxes go over keys in one call, and none of them alone is the attention."
        )
    softmax, after = candidates[0]
    if not isinstance(after, Product):
        raise UnknownAttentionError(f"{after.name} multiplies probabilities by values in a way that is not known.")
    shift = _shift(flow, softmax)
    scores = _taken(shift or softmax)
    return Found(flow, softmax, shift, scores, _before(flow, scores, softmax), after)


def _after(flow: Flow, softmax: Step) -> Step | Product | None:
    """What multiplies the softmax's result, as it is but for casts and cuts: the product of which it is one side, or
    the operation itself where the axes are unusual.
    """
    for step, came in flow.ahead(softmax.result, _is_product):
        if step.function not in _OPERANDS or not _is_cut_of(came, softmax.result):
            continue
        product = product_of(step)
        if product is None:
            return step
        left, right = product.operands
        if right is came and left is not came:
            product = product.swapped
        return step if product.axes() is None else product
    return None


def _is_product(step: Step) -> bool:
    return step.function in _OPERANDS or step.function == "linear"


def _is_cut_of(tensor: torch.Tensor, whole: torch.Tensor) -> bool:
    """Whether the tensor's numbers are those of ``whole``, row by row, but for columns at either end."""
    width, given = whole.shape[-1], tensor.shape[-1]
    if given > width or tensor.numel() * width != whole.numel() * given:
        return False
    rows, values = whole.reshape(-1, width).to(tensor.dtype), tensor.reshape(-1, given)
    return torch.equal(rows[:, :given], values) or torch.equal(rows[:, width - given :], values)


def _shift(flow: Flow, softmax: Step) -> Step | None:
    """What subtracts each row's largest before the softmax, which changes nothing; None where nobody does."""
    for step in flow.makers(_taken(softmax), softmax):
        if step.function == "sub" and len(step.taken) == 2 and not step.is_in_place:
            whole, largest = step.taken
            for maker in flow.makers(largest, step):
                if maker.function in LARGEST and any(each is whole for each in maker.taken):
                    return step
    return None


def _taken(step: Step) -> torch.Tensor:
    return tensors_in((step.args, step.kwargs))[0]


def _before(flow: Flow, scores: torch.Tensor, softmax: Step) -> Product:
    steps = flow.behind(scores, softmax, _is_product)
    products = [each for each in map(product_of, steps) if each is not None and each.axes() is not None]
    if len(products) > 1:
        # Positions have products of their own, of which one side does not come from what the module is given.
        products = [each for each in products if all(_is_given(flow, side, each.step) for side in each.operands)]
    if len(products) != 1:
        raise UnknownAttentionError(f"{len(products)} products that may be of queries and keys go into the softmax.")
    return products[0]


def _is_given(flow: Flow, tensor: torch.Tensor, before: Step) -> bool:
    given = tensors_in((flow.args, flow.kwargs))[:1]
    if not given:
        return False
    steps = [before, *flow.behind(tensor, before, lambda step: False)]
    return tensor is given[0] or any(each is given[0] for step in steps[1:] for each in step.taken)


def scores_form(found: Found, probabilities: torch.Tensor) -> Form | None:
    """The form of what goes into the softmax; ``probabilities`` are (batch, head, query, key)."""
    made: torch.Tensor = found.softmax.result
    return matching(made, probabilities) if made.shape == found.scores.shape else None
