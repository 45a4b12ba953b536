"""How a tensor of attention's stands to (batch, head, row, column): which axes it has, and in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import torch

from nnterp.errors import UsageError

#: How many rows a dry run's batch has. They are alike, which is how the axis of the batch is known.
BATCH = 2


class UnexpectedShapeError(UsageError):
    """A layer's attention does otherwise in this pass than in the dry run that showed where its values stand."""

    def __init__(self, shape: torch.Size, expected: str) -> None:
        super().__init__(
            f"The layer's attention computes otherwise here than in the dry run in which its operations were found: "
            f"a tensor of shape {tuple(shape)} came where one of shape {expected} was expected.\n"
            "The module's .source shows what it computes; read and set its operations by their names there."
        )


@dataclass(frozen=True)
class Form:
    """The axes of a tensor.

    Args:
        order: which axes, once batch and heads are apart, are the batch, the heads, the rows and the columns; there may
            be several of heads, which then are one.
        folded: the axis that holds batch and heads in one; None if they are apart.
        heads: how many heads there are in the folded axis.
        batch_first: whether the folded axis is (batch * head), and not (head * batch).
        before: how many columns stand before those meant.
        after: how many after, such as a sink.
        groups: how often each head is repeated, one after the other.
    """

    order: tuple[int, ...]
    folded: int | None = None
    heads: int = 0
    batch_first: bool = True
    before: int = 0
    after: int = 0
    groups: int = 1

    def _apart(self, tensor: torch.Tensor) -> torch.Tensor:
        ndim = len(self.order) - (self.folded is not None)
        if tensor.ndim != ndim or (self.folded is not None and tensor.shape[self.folded] % self.heads):
            raise UnexpectedShapeError(tensor.shape, self.expected)
        if self.folded is None:
            return tensor
        sizes = (-1, self.heads) if self.batch_first else (self.heads, -1)
        apart: torch.Tensor = tensor.unflatten(self.folded, sizes)
        return apart

    @property
    def expected(self) -> str:
        """The shape in words."""
        names = ["batch", *["head"] * (len(self.order) - 3), "row", "column"]
        axes = [names[self.order.index(axis)] for axis in range(len(self.order))]
        if self.folded is not None:
            axes[self.folded : self.folded + 2] = [f"{self.heads} * batch"]
        return f"({', '.join(axes)})"

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """(batch, head, row, column).

        >>> Form((0, 1, 3, 2), groups=2).view(torch.zeros(1, 4, 8, 5)).shape
        torch.Size([1, 2, 5, 8])

        Raises:
            UnexpectedShapeError: the tensor has other axes.
        """
        value = self._apart(tensor).permute(self.order)
        value = value.flatten(1, -3) if value.ndim > 4 else value
        value = value[..., self.before : value.shape[-1] - self.after]
        return value if self.groups == 1 else value[:, :: self.groups]

    def put(self, tensor: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """The tensor with ``new`` in the place of what :meth:`view` gives of it.

        >>> Form((0, 1, 2, 3), folded=0, heads=2, after=1).put(torch.zeros(2, 1, 3), torch.ones(1, 2, 1, 2))
        tensor([[[1., 1., 0.]],
        <BLANKLINE>
                [[1., 1., 0.]]])
        """
        whole = self._apart(tensor).permute(self.order)
        new = new if self.groups == 1 else new.repeat_interleave(self.groups, 1)
        if self.before or self.after:
            end = whole.shape[-1] - self.after
            flat = whole.flatten(1, -3)
            new = torch.cat([flat[..., : self.before], new, flat[..., end:]], -1)
        back = [self.order.index(axis) for axis in range(len(self.order))]
        return new.reshape(whole.shape).permute(back).reshape(tensor.shape)

    def repeated(self, tensor: torch.Tensor, groups: int) -> Form:
        """The same form, where each head of the tensor is there ``groups`` times, one after the other."""
        value = self.view(tensor)
        if groups <= 1 or value.shape[1] % groups:
            return self
        once = value[:, ::groups].repeat_interleave(groups, 1)
        return replace(self, groups=groups) if torch.equal(once, value) else self


def rows_alike(tensor: torch.Tensor, axis: int) -> bool:
    """Whether the axis is as long as a dry run's batch, and its entries are all the same."""
    return tensor.shape[axis] == BATCH and _alike(*tensor.unbind(axis))


def _alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    # Rows of one batch may be computed in another order, so what counts is how large numbers are at all.
    size = float(one.nan_to_num().abs().max()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=1e-3, atol=1e-4 * min(size, 1e30), equal_nan=True)


def form_of(axes: str, lead: str, row: str, column: str, product: torch.Tensor, product_axes: str) -> Form | None:
    """The form of a tensor whose axes have these letters.

    Args:
        axes: a letter for each axis of the tensor.
        lead: the letters of batch and heads.
        row: the letter of the rows.
        column: the letter of the columns.
        product: a tensor of a batch of alike rows, which tells the batch.
        product_axes: its letters.
    """
    if sorted(axes) != sorted(lead + row + column):
        return None
    if len(lead) == 1:
        at = product_axes.index(lead)
        if product.shape[at] % BATCH:
            return None
        heads = product.shape[at] // BATCH
        for batch_first in (True, False):
            apart = product.unflatten(at, (BATCH, heads) if batch_first else (heads, BATCH))
            if rows_alike(apart, at if batch_first else at + 1):
                # The one letter stands for two axes from here on.
                pair = "<>" if batch_first else "><"
                letters = axes.replace(lead, pair)
                order = tuple(letters.index(each) for each in f"<>{row}{column}")
                return Form(order, axes.index(lead), heads, batch_first)
        return None
    batch = [each for each in lead if rows_alike(product, product_axes.index(each))]
    if len(batch) != 1 or len(lead) < 2:
        return None
    heads_axes = lead.replace(batch[0], "")
    return Form(tuple(axes.index(each) for each in f"{batch[0]}{heads_axes}{row}{column}"))


def matching(tensor: torch.Tensor, usual: torch.Tensor) -> Form | None:
    """The form in which ``tensor`` is ``usual``, (batch, head, row, column), but for columns before or after."""
    for form in _forms(tensor, usual):
        value = form.view(tensor)
        if value.shape == usual.shape and torch.equal(value.to(usual.dtype), usual):
            return form
    return None


def _forms(tensor: torch.Tensor, usual: torch.Tensor) -> Iterator[Form]:
    plain: Sequence[Form] = ()
    if tensor.ndim == 4:
        plain = [Form(order) for order in permutations(range(4))]
    elif tensor.ndim == 3 and tensor.shape[0] == BATCH * usual.shape[1]:
        plain = [Form((0, 1, 2, 3), 0, usual.shape[1], True), Form((1, 0, 2, 3), 0, usual.shape[1], False)]
    for form in plain:
        more = form.view(tensor).shape[-1] - usual.shape[-1]
        if more >= 0:
            yield replace(form, after=more)
        if more > 0:
            yield replace(form, before=more)
