"""The only file that registers anything with torch.

Hooks are put on demand and taken off when the pass is over. PyTorch decides whether a module has hooks when its
call *starts*, so asking for a module also arms its ancestors, whose calls may be under way by the time they are asked
for themselves; a module that nobody asked for costs nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from types import FrameType
from typing import Any

import torch
from greenlet import getcurrent
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from nnsight_core.arguments import Met, unwrap
from nnsight_core.compiled import Eager
from nnsight_core.counting import CallCounter, Counting
from nnsight_core.gates import Gate
from nnsight_core.kinds import Derived, place_of
from nnsight_core.operations import Tap, is_operation
from nnsight_core.taps import Deliver, Taps
from nnsight_core.values import map_tensors

#: Where torch keeps the hooks of a module.
HOOK_DICTS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def _keeps_hooks_running(module: torch.nn.Module, *given: Any) -> None:
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
        self._derived: dict[torch.nn.Module, dict[Derived, None]] = {}
        self._followed: torch.nn.Module | None = None
        self._following: tuple[RemovableHandle, ...] = ()
        self._taps: Taps | None = None
        self._ends: tuple[RemovableHandle, ...] = ()
        self._begins: Callable[..., Any] = _nothing
        self._gives: Callable[[Any], Any] = _nothing
        self._counters: list[tuple[CallCounter, RemovableHandle]] | None = None
        self._runs_eagerly = False

    def watch(self, module: torch.nn.Module, kind: str, ancestors: Iterable[torch.nn.Module]) -> None:
        """Deliver ``kind`` of ``module``, whose call stands inside calls of ``ancestors``, from now on."""
        if ancestors and ancestors is not self._armed_last:
            self._armed_last = ancestors
            for ancestor in ancestors:
                self._arm(ancestor)
        if place_of(kind) == "output":
            if not self._hooked.get(module):
                # The mark comes first and goes last, as that of an input does.
                module._forward_hooks_with_kwargs[self._key] = True
                self._put(module, self._on_output)
                self._hooked[module] = True
            if isinstance(kind, Derived):
                self._derived.setdefault(module, {})[kind] = None
            return
        self._arm(module)
        if is_operation(kind):
            self.announce(module).listen(module, kind)
            return
        if kind == "skip":
            self._may_skip = {*(self._may_skip or ()), module}
        self._put_gate(module)

    def _put_gate(self, module: torch.nn.Module) -> None:
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
            if "_orig_mod" in module._modules:
                self._run_eagerly()

    def _put(self, module: torch.nn.Module, hook: Callable[..., Any]) -> None:
        if isinstance(module, torch.jit.ScriptModule):
            # It has no hooks, and torch says so.
            module.register_forward_hook(hook)
        module._forward_hooks[self._key] = hook
        if module is self._followed and len(self._following) == 1:
            # Whoever asks for anything arms this module, and has its turn before what it gives is handed on.
            self._following = (*self._following, module.register_forward_hook(self._on_end))
        if module._compiled_call_impl is not None:
            self._run_eagerly()

    def _run_eagerly(self) -> None:
        """What torch has compiled as a whole shows nothing of its inside, so this pass runs the modules themselves."""
        if not self._runs_eagerly:
            self._runs_eagerly = True
            Eager.begin()

    def stand_in(self, module: torch.nn.Module) -> torch.nn.Module:
        """What runs in the place of ``module`` in this pass."""
        return module

    def announce(self, module: torch.nn.Module, ancestors: Iterable[torch.nn.Module] = ()) -> Taps:
        """Operations of ``module`` are going to be asked for: they are counted from the start of its next call on."""
        if self._taps is None:
            self._taps = Taps(lambda: self.coroutine(), self._deliver)
        for each in (module, *ancestors):
            self._arm(each)
        self._put_gate(module)
        self._taps.add(module)
        return self._taps

    def operations_of(self, module: torch.nn.Module) -> list[str] | None:
        """The operations in calls of ``module`` in this pass, so far; None if none has run with the tap on."""
        return None if self._taps is None else self._taps.names(module)

    @property
    def are_carrying(self) -> bool:
        """Whether something that was set is still on its way to the operations that take it."""
        return self._taps is not None and self._taps.are_carrying

    def tap_of(self, module: torch.nn.Module) -> Tap | None:
        """What is to be on while ``module``, which is about to run, runs."""
        return None if self._taps is None else self._taps.tap_of(module)

    def tap_inside(
        self,
        module: torch.nn.Module,
        call: FrameType,
        gone: Sequence[str],
        coming: Sequence[str],
        astray: Callable[[], None],
    ) -> Tap:
        """As :meth:`Taps.inside`; the tap goes with the end of ``call``."""
        taps = self.announce(module)

        def end(module: torch.nn.Module, args: Any, output: Any) -> None:
            # Called by torch's own inner function of the call that ends.
            taps.end_of(sys._getframe(1).f_back)

        self._ends = (*self._ends, module.register_forward_hook(end, prepend=True))
        return taps.inside(module, call, gone, coming, astray)

    def has_joined(self, call: FrameType) -> bool:
        """Whether ``call`` has got a tap while it was under way."""
        return self._taps is not None and self._taps.has_joined(call)

    def at_gate(self, module: torch.nn.Module, args: Any, kwargs: Any) -> tuple[Any] | None:
        """``module`` is about to compute: what it gives instead, in a one-tuple, or None to let it."""
        if self._may_skip is None or module not in self._may_skip or getcurrent() is not self.coroutine():
            return None
        return self._deliver(module, "skip", (args, kwargs))

    def follow(self, module: torch.nn.Module, begins: Callable[..., None], gives: Callable[[Any], Any]) -> None:
        """Call ``begins(args, kwargs)`` at the start of every call of ``module``, before any value of it is delivered;
        and ``gives`` with what it gives, after all else, if anything is watched: what that gives is handed on instead.
        """
        self._begins, self._gives, self._followed = begins, gives, module
        self._following = (module.register_forward_pre_hook(self._on_begin, prepend=True, with_kwargs=True),)

    def _on_begin(self, module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        self._begins(args, kwargs)

    def _on_end(self, module: torch.nn.Module, args: Any, output: Any) -> Any:
        return self._gives(output)

    def count(self, module: torch.nn.Module, counter: CallCounter, counts: Callable[[], Any]) -> None:
        """Let ``counter`` count the calls of ``module`` at which ``counts()``, before any value is delivered."""
        counter.reset()
        handle = module.register_forward_pre_hook(Counting(counts, counter), prepend=True)
        self._counters = [*(self._counters or ()), (counter, handle)]

    def reset_counters(self) -> None:
        """The model runs once more in the same pass."""
        for counter, _ in self._counters or ():
            counter.reset()

    def __reduce__(self) -> Any:
        # A copy of the model that is made, or written to a file, meanwhile has nothing to do with this pass.
        return _nobodys_board, ()

    def _on_output(self, module: torch.nn.Module, args: Any, *given: Any) -> Any:
        # Another thread, task or trace may run the same module: it never sees these hooks.
        if getcurrent() is not self.coroutine():
            return None
        # Of keyword arguments and output, torch leaves the former out for who is taking the hook off meanwhile.
        call, output, result = (args, given[0] if len(given) > 1 else {}), given[-1], None
        for kind in tuple(self._derived.get(module, ())) if self._derived else ():
            changed = self._deliver(module, kind, (module, call, output))
            output, result = (output, result) if changed is None else changed * 2
        return (self._deliver(module, "output", output, None, call) or (result,))[0]

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
            for module, delivers in self._hooked.items():
                module._forward_hooks.pop(key, None)
                if delivers:
                    module._forward_hooks_with_kwargs.pop(key, None)
            self._hooked.clear()
            self._derived = {}
            self._armed_last = None
        if self._gates:
            for module, gate in self._gates.items():
                module._forward_pre_hooks.pop(key, None)
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                if gate is not None:
                    gate.let_go(self)
            self._gates.clear()
        for handle in self._following:
            handle.remove()
        self._following, self._followed = (), None
        if self._taps is not None:
            self._taps.clear()
        for handle in self._ends:
            handle.remove()
        self._ends = ()
        for _, handle in self._counters or ():
            handle.remove()
        self._counters = None
        if self._runs_eagerly:
            self._runs_eagerly = False
            Eager.end()

    def release(self) -> None:
        """Forget who is to be told; there are no hooks any more."""
        self.coroutine = self._deliver = self._begins = self._gives = _nothing
        self._taps = None


def _nobodys_board() -> HookBoard:
    return HookBoard(_nothing, _nothing)


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
def collecting(
    modules: Iterable[torch.nn.Module],
    kept: dict[tuple[torch.nn.Module, str], Any],
    originals: dict[tuple[torch.nn.Module, str], Any] | None = None,
) -> Iterator[None]:
    """While it lasts, copies of what ``modules`` take and give in their first call go into ``kept``, and the things
    themselves into ``originals``.
    """

    def keep(module: torch.nn.Module, kind: str, value: Any) -> None:
        if (module, kind) not in kept:
            kept[module, kind] = map_tensors(lambda tensor: tensor.detach().clone(), value)
            if originals is not None:
                originals[module, kind] = value

    with observing(modules, keep):
        yield


@contextmanager
def observing(
    modules: Iterable[torch.nn.Module], note: Callable[[torch.nn.Module, str, Any], tuple[Any] | None]
) -> Iterator[None]:
    """While it lasts, ``note`` is called with (module, "input", (args, kwargs)) at the start of every call of
    ``modules``, and with (module, "output", result) at its end. What it gives in a one-tuple takes the value's place.
    """

    def before(module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        changed = note(module, "input", (args, kwargs))
        return None if changed is None else changed[0]

    def after(module: torch.nn.Module, args: Any, output: Any) -> Any:
        changed = note(module, "output", output)
        return None if changed is None else changed[0]

    handles: list[RemovableHandle] = []
    try:
        for module in dict.fromkeys(modules):
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        yield
    finally:
        for handle in handles:
            handle.remove()


#: What one asks of a value for the sake of its gradient.
NAMES_OF_GRADIENTS = frozenset({"grad", "retain_grad", "register_hook"})


def on_gradient(tensor: torch.Tensor, arrived: Callable[[torch.Tensor], torch.Tensor | None]) -> Any:
    """Call ``arrived`` with the gradient of ``tensor`` in the next backward pass; ``.remove()`` takes it back."""
    return tensor.register_hook(arrived)
