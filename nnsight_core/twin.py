"""A module's twin: a copy that a dry run may do anything to, while the module itself is left as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nnsight_core.copies import hookless_copy, with_tensors
from nnsight_core.counting import CallCounter
from nnsight_core.devices import homes, resident_hooks
from nnsight_core.errors import CopyError
from nnsight_core.hooks import HookBoard
from nnsight_core.operations import Tap
from nnsight_core.shapes import ShapesOnly
from nnsight_core.sites import user_site
from nnsight_core.taps import Deliver, Taps

#: Up to this many bytes the numbers of a model are copied, all of them.
_SMALL = 2**28


def is_small(root: torch.nn.Module) -> bool:
    """Whether there is room for a copy of all numbers of ``root``."""
    return sum(each.nbytes for each in (*root.parameters(), *root.buffers())) <= _SMALL


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
            self.module = hookless_copy(root, known, but_own=with_hooks)
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
        return with_tensors(value, _copied if self.shapes is None else self.shapes.fake)

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
        super().__init__(coroutine, lambda module, *what: deliver(twin.original(module), *what))
        self._twin = twin

    def stand_in(self, module: torch.nn.Module) -> torch.nn.Module:
        return self._twin.of(module)

    def watch(self, module: torch.nn.Module, kind: str, ancestors: Iterable[torch.nn.Module]) -> None:
        super().watch(self._twin.of(module), kind, [self._twin.of(each) for each in ancestors])

    def announce(self, module: torch.nn.Module, ancestors: Iterable[torch.nn.Module] = ()) -> Taps:
        return super().announce(self._twin.of(module), [self._twin.of(each) for each in ancestors])

    def operations_of(self, module: torch.nn.Module) -> list[str] | None:
        return super().operations_of(self._twin.of(module))

    def tap_inside(self, module: torch.nn.Module, *about: Any) -> Tap:
        return super().tap_inside(self._twin.of(module), *about)

    def count(self, module: torch.nn.Module, counter: CallCounter, counts: Callable[[], Any]) -> None:
        super().count(self._twin.of(module), counter, counts)

    def follow(self, module: torch.nn.Module, begins: Callable[..., None], gives: Callable[[Any], Any]) -> None:
        super().follow(self._twin.of(module), begins, gives)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _tensors(root: torch.nn.Module, shapes: ShapesOnly | None, otherwise: torch.device | None) -> dict[int, Any]:
    """What takes the place of each tensor that a module of ``root`` holds directly, by its id."""
    # A forward may write into its parameters, though hardly in a large model, for which there may be no room twice.
    shares_parameters = shapes is None and not is_small(root)

    def own(tensor: torch.Tensor, home: torch.device | None) -> torch.Tensor:
        if shapes is not None:
            return shapes.fake(tensor, home)
        is_shared = shares_parameters and isinstance(tensor, torch.nn.Parameter)
        return tensor.detach() if is_shared else tensor.detach().clone()

    found: dict[int, Any] = {}
    for module, home in homes(root):
        direct = [each for each in vars(module).values() if isinstance(each, torch.Tensor)]
        for tensor in (*module._parameters.values(), *module._buffers.values(), *direct):
            if tensor is not None and id(tensor) not in found:
                found[id(tensor)] = own(tensor, home or otherwise)
    return found
