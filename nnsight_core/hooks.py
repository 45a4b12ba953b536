"""The only file that registers anything with torch.

Hooks are put on demand and taken off when nobody waits for them. PyTorch decides whether a module has hooks when its
call *starts*, so asking for a module also arms its ancestors, whose calls may be under way by the time they are asked
for themselves; a module that nobody asked for costs nothing.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any, ClassVar

import torch
from greenlet import getcurrent
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from nnsight_core.arguments import Met, unwrap
from nnsight_core.values import map_tensors

#: Called with (module, "input" or "output", value); gives the changed value in a one-tuple, or None for no change.
Deliver = Callable[[torch.nn.Module, str, Any], "tuple[Any] | None"]


def _keeps_hooks_running(module: torch.nn.Module, args: Any, output: Any) -> None:
    """A hook that does nothing: its presence alone lets later hooks of a running module fire."""


def _nothing(*args: Any) -> None:
    return None


#: The keys of hooks among torch's own, which are counted from 0 upwards.
_keys = count(-1, -1)


class HookBoard:
    """The hooks of one pass: put one by one as they are asked for, all gone at :meth:`clear`.

    They are written straight into the modules' own dicts, for a handle of torch's costs as much as everything else that
    is done for a value. One key serves all hooks of a pass.

    Args:
        coroutine: gives the coroutine in which the pass runs; what other coroutines and threads do is not its business.
        deliver: told of what has come.
    """

    def __init__(self, coroutine: Callable[[], Any], deliver: Deliver) -> None:
        self.coroutine = coroutine
        self._deliver = deliver
        self._key = next(_keys)
        self._armed_last: Iterable[torch.nn.Module] | None = None
        #: The modules with a forward hook of ours, and whether it delivers what they give.
        self._hooked: dict[torch.nn.Module, bool] = {}
        #: The modules with a forward pre-hook of ours, and their gates: scripted modules have none.
        self._gates: dict[torch.nn.Module, Gate | None] = {}
        self._may_skip: set[torch.nn.Module] | None = None
        self._followed: RemovableHandle | None = None

    def watch(self, module: torch.nn.Module, kind: str, ancestors: Iterable[torch.nn.Module]) -> None:
        """Deliver ``kind`` of ``module``, whose call stands inside calls of ``ancestors``, from now on."""
        if ancestors is not self._armed_last:
            self._armed_last = ancestors
            for ancestor in ancestors:
                self._arm(ancestor)
        if kind == "output":
            if not self._hooked.get(module):
                self._put(module, self._on_output)
                self._hooked[module] = True
            return
        self._arm(module)
        if kind == "skip":
            self._may_skip = {*(self._may_skip or ()), module}
        if module not in self._gates:
            # torch looks up the forward before it delivers the input, and whoever sees the input may want to skip.
            self._gates[module] = None if isinstance(module, torch.jit.ScriptModule) else Gate.hold(module, self)
            # The mark comes first and goes last, so that another thread's torch never sees the hook without it.
            module._forward_pre_hooks_with_kwargs[self._key] = True
            module._forward_pre_hooks[self._key] = self._on_input

    def _arm(self, module: torch.nn.Module) -> None:
        if module not in self._hooked:
            self._put(module, _keeps_hooks_running)
            self._hooked[module] = False

    def _put(self, module: torch.nn.Module, hook: Callable[..., Any]) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            # It has no hooks, and torch says so.
            module.register_forward_hook(hook)
        module._forward_hooks[self._key] = hook

    def at_gate(self, module: torch.nn.Module, args: Any, kwargs: Any) -> tuple[Any] | None:
        """``module`` is about to compute: what it gives instead, in a one-tuple, or None to let it."""
        if self._may_skip is None or module not in self._may_skip or getcurrent() is not self.coroutine():
            return None
        return self._deliver(module, "skip", (args, kwargs))

    def follow(self, module: torch.nn.Module, begins: Callable[[], None]) -> None:
        """Call ``begins`` at the start of every call of ``module``, before any value of it is delivered."""
        self._followed = module.register_forward_pre_hook(lambda m, args: begins(), prepend=True)

    def _on_output(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        # Another thread, task or trace may run the same module: it never sees these hooks.
        if getcurrent() is not self.coroutine():
            return None
        changed = self._deliver(module, "output", output)
        return None if changed is None else changed[0]

    def _on_input(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Any:
        # torch looks up live whether a hook takes kwargs: when another thread takes it off meanwhile, there are none.
        if kwargs is None or getcurrent() is not self.coroutine():
            return None
        changed = self._deliver(module, "input", (args, kwargs))
        return None if changed is None else changed[0]

    def clear(self) -> None:
        """Remove every hook."""
        key = self._key
        if self._hooked:
            for module in self._hooked:
                module._forward_hooks.pop(key, None)
            self._hooked.clear()
            self._armed_last = None
        if self._gates:
            for module, gate in self._gates.items():
                module._forward_pre_hooks.pop(key, None)
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                if gate is not None:
                    gate.let_go(self)
            self._gates.clear()
        if self._followed is not None:
            self._followed.remove()
            self._followed = None

    def release(self) -> None:
        """Forget who is to be told; there are no hooks any more."""
        self.coroutine = self._deliver = _nothing


class Gate:
    """Stands in for a module's ``forward`` while passes that may skip the module are under way.

    Several passes, in several threads, may hold one gate; the module gets its own forward back when none does.
    """

    _lock = threading.Lock()
    _gates: ClassVar[dict[int, Gate]] = {}

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self.own = module.__dict__.get("forward")
        self._forward = module.forward
        self._boards: list[HookBoard] = []
        # Models look at the signatures of their own forwards.
        self.__wrapped__ = self._forward

    @classmethod
    def hold(cls, module: torch.nn.Module, board: HookBoard) -> Gate:
        """Put up the gate of ``module`` for ``board``, or find it."""
        with cls._lock:
            gate = cls._gates.get(id(module))
            if gate is None:
                gate = cls._gates[id(module)] = cls(module)
                module.__dict__["forward"] = gate
            gate._boards.append(board)
            return gate

    def let_go(self, board: HookBoard) -> None:
        """``board`` needs the gate no more."""
        with self._lock:
            self._boards.remove(board)
            if self._boards:
                return
            del self._gates[id(self._module)]
            # Somebody may have set a forward of their own since, which is not ours to take away. If it goes on to what
            # was there before, as that of a library that fetches weights does, that is not to be the gate for good.
            if self._module.__dict__.get("_old_forward") is self:
                self._module.__dict__["_old_forward"] = self._forward
            if self._module.__dict__.get("forward") is self:
                if self.own is None:
                    del self._module.__dict__["forward"]
                else:
                    self._module.__dict__["forward"] = self.own

    def __getattr__(self, name: str) -> Any:
        # Whatever else they look at: the name, the documentation, what a decorator has left there.
        return getattr(self.__dict__["_forward"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for board in list(self._boards):
            changed = board.at_gate(self._module, args, kwargs)
            if changed is not None:
                return changed[0]
        return self._forward(*args, **kwargs)


class PlainCalls:
    """While it is on, modules called with proxies get the plain values, and give a proxy back.

    It is on only while the body of a trace has its turn, so that the model itself never pays for it.
    """

    def __init__(self) -> None:
        self._body: Any = None
        # The calls under way: the module, and what was met among its arguments if that makes its result a proxy.
        self._under_way: list[tuple[torch.nn.Module, Met | None]] = []

    def on(self, body: Any) -> None:
        """The body has its turn, in the coroutine ``body``."""
        self._body = body
        torch_module._global_forward_pre_hooks[self] = self._before  # type: ignore[index]
        torch_module._global_forward_hooks[self] = self._after  # type: ignore[index]

    def off(self) -> None:
        """The model has its turn."""
        if self._body is None:
            return
        self._body = None
        torch_module._global_forward_pre_hooks.pop(self, None)  # type: ignore[call-overload]
        torch_module._global_forward_hooks.pop(self, None)  # type: ignore[call-overload]
        self._under_way.clear()

    def _before(self, module: torch.nn.Module, args: tuple[Any, ...]) -> Any:
        if getcurrent() is not self._body:
            return None
        # torch shows keyword arguments to global hooks nowhere else than in the frame that calls them.
        kwargs = sys._getframe(1).f_locals.get("kwargs") or {}
        met = Met()
        plain_args = unwrap(args, met)
        for name, value in kwargs.items():
            kwargs[name] = unwrap(value, met)
        if met.scope is None:
            # Inside another call everything is plain; the call is noted so that its result stays so.
            if self._under_way:
                self._under_way.append((module, None))
            return None
        # Calls that failed are still noted; none of them can be under way when proxies come in.
        self._under_way[:] = [(module, met)]
        return plain_args

    def _after(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        while self._under_way:
            noted, met = self._under_way.pop()
            if noted is module:
                if met is None:
                    return None
                met.check_changes()
                return met.scope.wrap(output)
        return None


@contextmanager
def recording(modules: Iterable[torch.nn.Module], seen: list[tuple[torch.nn.Module, str]]) -> Iterator[None]:
    """While it lasts, every call of ``modules`` is written down in ``seen``: (module, "input"), (module, "output")."""
    with _observing(modules, lambda module, kind, value: seen.append((module, kind))):
        yield


@contextmanager
def collecting(modules: Iterable[torch.nn.Module], kept: dict[tuple[torch.nn.Module, str], Any]) -> Iterator[None]:
    """While it lasts, copies of what ``modules`` take and give in their first call go into ``kept``."""

    def keep(module: torch.nn.Module, kind: str, value: Any) -> None:
        if (module, kind) not in kept:
            kept[module, kind] = map_tensors(lambda tensor: tensor.detach().clone(), value)

    with _observing(modules, keep):
        yield


@contextmanager
def _observing(modules: Iterable[torch.nn.Module], note: Callable[[torch.nn.Module, str, Any], None]) -> Iterator[None]:
    def before(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        note(module, "input", (args, kwargs))

    def after(module: torch.nn.Module, args: Any, output: Any) -> None:
        note(module, "output", output)

    handles: list[RemovableHandle] = []
    try:
        for module in dict.fromkeys(modules):
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


def on_gradient(tensor: torch.Tensor, arrived: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
    """Call ``arrived`` with the gradient of ``tensor`` in the next backward pass; ``.remove()`` takes it back."""
    return tensor.register_hook(arrived)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@contextmanager
def without_hooks(root: torch.nn.Module, but_own: bool = False) -> Iterator[None]:
    """While it lasts, the modules of ``root`` show no gates and no hooks to whoever copies them.

    ``but_own`` leaves those that the model's own library has put there, which are part of what it computes.
    """
    kept = [(module, name, module.__dict__[name]) for module in root.modules() for name in _HOOKS]
    gated = [module for module in root.modules() if isinstance(module.__dict__.get("forward"), Gate)]
    gates = [(module, module.__dict__.pop("forward")) for module in gated]
    try:
        for module, name, hooks in kept:
            own = [(key, hook) for key, hook in hooks.items() if but_own and _is_own(hook, module, root)]
            module.__dict__[name] = type(hooks)(own)
        for module, gate in gates:
            if gate.own is not None:
                module.__dict__["forward"] = gate.own
        yield
    finally:
        for module, name, hooks in kept:
            module.__dict__[name] = hooks
        for module, gate in gates:
            module.__dict__["forward"] = gate


def _is_own(hook: Any, *modules: torch.nn.Module) -> bool:
    """Whether a hook comes from the library that one of ``modules`` comes from."""
    while isinstance(hook, partial):
        hook = hook.func
    return _package_of(hook) in {_package_of(type(module)) for module in modules}


def _package_of(thing: Any) -> str:
    return str(getattr(thing, "__module__", "")).partition(".")[0]
