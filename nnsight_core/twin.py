"""A module's twin: a copy that a dry run may do anything to, while the module itself is left as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from nnsight_core.devices import homes, resident_hooks
from nnsight_core.errors import CopyError
from nnsight_core.hooks import Deliver, HookBoard, without_hooks
from nnsight_core.shapes import ShapesOnly
from nnsight_core.sites import user_site


class Twin:
    """A copy of a module, with fake tensors or with numbers of its own.

    Args:
        root: the module.
        shapes: makes the tensors of the copy; None copies the numbers.
        home: the device of weights that are not loaded.
        with_hooks: the copy has the hooks that the model's own library has put on the module.

    Raises:
        CopyError: the module holds something that cannot be copied.
    """

    def __init__(
        self,
        root: torch.nn.Module,
        shapes: ShapesOnly | None,
        home: torch.device | None = None,
        with_hooks: bool = False,
    ) -> None:
        self.shapes = shapes
        known = _tensors(root, shapes, home)
        for hook, resident in resident_hooks(root):
            known[id(hook)] = resident
        try:
            with without_hooks(root, with_hooks):
                self.module: torch.nn.Module = copy.deepcopy(root, known)
        except (TypeError, RuntimeError, NotImplementedError) as error:
            raise CopyError(type(root).__name__, str(error).rstrip("."), user_site()) from error
        self._twins: dict[torch.nn.Module, torch.nn.Module] = {}
        self._originals: dict[torch.nn.Module, torch.nn.Module] = {}
        self.follow(root)

    def follow(self, root: torch.nn.Module) -> None:
        """Let the modules of ``root`` too, of the same form as the original, have their twins here."""
        # By path: a module that hangs at several places has one twin all the same.
        copies = dict(self.module.named_modules(remove_duplicate=False))
        for path, module in root.named_modules(remove_duplicate=False):
            if path in copies:
                self._twins[module] = copies[path]
                self._originals.setdefault(copies[path], module)

    def of(self, module: torch.nn.Module) -> torch.nn.Module:
        """The twin of ``module``; a module from outside is its own."""
        return self._twins.get(module, module)

    def original(self, module: torch.nn.Module) -> torch.nn.Module:
        """The module whose twin ``module`` is, or shares; of several, the one that the twin was made from."""
        module = self.of(module)
        return self._originals.get(module, module)

    def own(self, value: Any) -> Any:
        """``value`` with tensors that the dry run may have: fake ones, or copies."""
        known: dict[int, Any] = {}
        if self.shapes is not None:
            known = {id(each): self.shapes.fake(each) for each in tree_leaves(value) if isinstance(each, torch.Tensor)}
        return copy.deepcopy(value, known)

    @contextmanager
    def running(self) -> Iterator[None]:
        """While it lasts, the twin may be called."""
        if self.shapes is None:
            yield
            return
        with self.shapes.running_model():
            yield

    def board(self, coroutine: Callable[[], Any], deliver: Deliver) -> HookBoard:
        """Hooks on the twin, for somebody who speaks of the original."""
        return _TwinBoard(self, coroutine, deliver)


class _TwinBoard(HookBoard):
    def __init__(self, twin: Twin, coroutine: Callable[[], Any], deliver: Deliver) -> None:
        super().__init__(coroutine, lambda module, kind, value: deliver(twin.original(module), kind, value))
        self._twin = twin

    def watch(self, module: torch.nn.Module, kind: str, ancestors: Any) -> None:
        super().watch(self._twin.of(module), kind, [self._twin.of(each) for each in ancestors])

    def follow(self, module: torch.nn.Module, begins: Callable[[], None]) -> None:
        super().follow(self._twin.of(module), begins)


def _tensors(root: torch.nn.Module, shapes: ShapesOnly | None, otherwise: torch.device | None) -> dict[int, Any]:
    """What takes the place of each tensor that a module of ``root`` holds directly, by its id."""
    found: dict[int, Any] = {}
    for module, home in homes(root):
        direct = [each for each in vars(module).values() if isinstance(each, torch.Tensor)]
        for tensor in (*module._parameters.values(), *module._buffers.values(), *direct):
            if tensor is not None and id(tensor) not in found:
                own = tensor.detach().clone() if shapes is None else shapes.fake(tensor, home or otherwise)
                found[id(tensor)] = own
    return found
