"""Fake tensors: they have a shape, a dtype and a device, and no numbers."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from greenlet import getcurrent, greenlet
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

from nnsight_core.errors import ScanError
from nnsight_core.sites import user_site

_local = threading.local()


class ShapesOnly(FakeTensorMode):
    """Runs operations for the shapes alone: what they give are fake tensors, and nothing is computed."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        #: Where models run, while they do.
        self._models: set[greenlet] = set()

    @classmethod
    def here(cls) -> ShapesOnly:
        """The one of this thread, so that values of one scan may be used in the next."""
        if not hasattr(_local, "shapes"):
            _local.shapes = cls()
        return _local.shapes  # type: ignore[no-any-return]

    def fake(self, tensor: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
        """A fake tensor like ``tensor``; what is on meta, which is no place, comes to be on ``device``."""
        if isinstance(tensor, FakeTensor) and tensor.fake_mode is self:
            return tensor
        plain = tensor.detach()
        if plain.is_meta:
            # Not of the tensor itself, in whose storage the fake one would leave a mark.
            like = torch.empty_strided(plain.size(), plain.stride(), dtype=plain.dtype, device="meta")
            made: torch.Tensor = FakeTensor(self, like, device or torch.device("cpu"))
        else:
            made = self.from_tensor(plain)
        if isinstance(tensor, torch.nn.Parameter):
            return torch.nn.Parameter(made, requires_grad=tensor.requires_grad)
        return made.requires_grad_(tensor.requires_grad)

    @contextmanager
    def running_model(self) -> Iterator[None]:
        """While it lasts, what this coroutine does is the model's doing."""
        with self:
            # A dry run within a scan leaves the scan's own model running.
            before = set(self._models)
            here = getcurrent()
            self._models.add(here)
            try:
                yield
            finally:
                if here not in before:
                    self._models.discard(here)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        in_model = getcurrent() in self._models
        if not in_model and func._schema.is_mutable and _writes_into_real(func, args, kwargs):
            raise ScanError("A value of a scan was written into a tensor that has numbers", user_site())
        if func is _GROUPED_MM:
            return self._grouped_product(func, types, args, kwargs)
        args = [_without_history(each) for each in args]
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ScanError(f"{func} was asked for numbers", user_site(), in_model) from error

    def _grouped_product(self, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # torch says the shape of it for one dtype alone, and computes it for others.
        given = args[0].dtype
        halves = [each.to(torch.bfloat16) for each in args[:2]]
        result = cast("torch.Tensor", super().__torch_dispatch__(func, types, (*halves, *args[2:]), kwargs))
        return result.to(kwargs.get("out_dtype") or given)

    # What is copied or sent with a fake tensor is the tensor, and not the mode that it belongs to.

    def __deepcopy__(self, memo: dict[int, Any]) -> ShapesOnly:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ScanError("A value of a scan was to be stored", user_site())


_GROUPED_MM = getattr(getattr(torch.ops.aten, "_grouped_mm", None), "default", None)


def refuse_numbers(value: Any, asked: str) -> None:
    """Raises:
    ScanError: ``value`` is a fake tensor, and its numbers are ``asked`` for.
    """
    if isinstance(value, FakeTensor):
        raise ScanError(f"{asked} was asked for numbers", user_site())


def _without_history(value: Any) -> Any:
    # A fake tensor is made of a real one by way of its gradient, which torch warns about where it cannot have one.
    if isinstance(value, list):
        return [_without_history(each) for each in value]
    if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
        return value
    return value.detach() if value.requires_grad and not value.is_leaf else value


def copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy of ``value``, which may be a fake tensor."""
    return value.clone() if isinstance(value, FakeTensor) else copy.deepcopy(value, memo)


def _writes_into_real(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    declared = func._schema.arguments
    given = [*zip(declared, args, strict=False), *((each, kwargs.get(each.name)) for each in declared[len(args) :])]
    for argument, value in given:
        if argument.alias_info is not None and argument.alias_info.is_write:
            for each in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(each, torch.Tensor) and not isinstance(each, FakeTensor):
                    return True
    return False
