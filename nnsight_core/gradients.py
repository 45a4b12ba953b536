"""Gradients: asked for before they can be there, and read and set while the backward pass goes by.

``g = x.grad.save()`` before a plain ``loss.backward()``, or inside ``with loss.backward():``. Either way the gradient
is pending until the backward pass reaches ``x``; what is done with it is recorded, and done right there.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from nnsight_core.arguments import unwrap
from nnsight_core.bytecode import opens_block
from nnsight_core.errors import GradientError
from nnsight_core.events import Event
from nnsight_core.hooks import NAMES_OF_GRADIENTS, on_gradient
from nnsight_core.proxy import Proxy
from nnsight_core.scope import Scope, arrive
from nnsight_core.sites import user_frame, user_site
from nnsight_core.tape import Instruction, NotThereYet, Tape, acting, point_at, resolved


class Backwards:
    """The backward passes of one trace.

    The bodies of its invokes share one graph, so that a backward pass of one goes through the values of all. Each body
    waits for its own.
    """

    def __init__(self) -> None:
        self.tapes: list[GradientTape] = []
        #: Whose backward pass is under way, in a tuple; None where there is none.
        self.under_way: tuple[Any] | None = None
        #: How many there have been, and how many blocks for one are open.
        self.count = 0
        self.open_blocks = 0

    def tape(self, scope: Scope) -> GradientTape:
        """What records the gradients of values in ``scope``."""
        made = GradientTape(scope, self)
        self.tapes.append(made)
        return made

    def run(self, loss: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the backward pass of the body that is at work.

        Raises:
            GradientError: no gradient can come from this loss.
        """
        value = loss.value
        if not value.requires_grad:
            raise GradientError("to come from a loss that depends on nothing that requires one", user_site())
        if loss._scope.is_cut and len(args) < 2:
            # The others go through the same graph, and this body cannot know of them.
            kwargs = {**kwargs, "retain_graph": True}
        before, self.under_way = self.under_way, (acting(),)
        try:
            value.backward(*unwrap(args), **unwrap(kwargs))
        finally:
            self.under_way = before
            self.count += 1
            for tape in self.tapes:
                tape.forget_done()


class GradientTape(Tape):
    """What is done with gradients that have yet to arrive. Steps are taken as soon as what they need is there.

    Args:
        scope: where the values live.
        backwards: the backward passes of the trace.
    """

    def __init__(self, scope: Scope, backwards: Backwards) -> None:
        super().__init__(scope, self)
        self._backwards = backwards
        #: For each gradient that was asked for and has not come: its proxy, and how to stop waiting.
        self._awaited: dict[int, tuple[Proxy, Any]] = {}
        self._done: list[Any] = []

    @property
    def is_still_to_come(self) -> bool:
        """Whether a gradient asked for now is that of a backward pass to come, and not one that torch has kept."""
        return self._backwards.open_blocks > 0 or not self._backwards.count

    def tape_for(self, tape: Tape) -> Tape:
        """Itself: gradients are recorded apart from everything else."""
        return self

    def force(self, tape: Tape | None = None) -> None:
        """A gradient cannot be made to arrive by being looked at.

        Raises:
            GradientError: always.
        """
        raise GradientError("looked at before the backward pass has made it", user_site())

    def gradient(self, tensor: torch.Tensor) -> Proxy:
        """The pending gradient of ``tensor`` in the next backward pass.

        Raises:
            GradientError: no gradient can reach it.
        """
        site = user_site()
        tensor = self.scope.original(tensor)
        if not tensor.requires_grad:
            raise GradientError("asked of a value that no gradient reaches", site)
        pending, asker = self.scope.pending(self), acting()

        def arrived(gradient: torch.Tensor) -> torch.Tensor | None:
            under_way = self._backwards.under_way
            is_others = under_way is not None and under_way[0] is not asker
            if id(pending) not in self._awaited or (is_others and not (asker is not None and asker.shares_backward)):
                return None
            # Not removed here: torch is going through the hooks of this tensor.
            self._done.append(self._awaited.pop(id(pending))[1])
            event = Event(tensor, "gradient", "", gradient, site)
            arrive(pending, self.scope.proxy(gradient, event.origin()))
            for tape in self._backwards.tapes:
                tape.advance()
            event.current = False
            return event.value if event.replaced else None

        self._awaited[id(pending)] = pending, on_gradient(tensor, arrived)
        return pending

    def advance(self) -> None:
        """Take the steps whose gradients are there."""
        waiting: list[Instruction] = []
        for step in self.instructions:
            try:
                args, kwargs = resolved(step.args), resolved(step.kwargs)
            except NotThereYet:
                waiting.append(step)
                continue
            try:
                step.take(args, kwargs)
            except Exception as error:
                point_at(error, step.site)
                raise
        self.instructions = waiting

    def give_up(self) -> None:
        """The backward pass is over: what has not come does not come.

        Raises:
            GradientError: a gradient that was asked for has not come.
        """
        awaited = self.drop()
        for proxy in awaited:
            raise GradientError("asked for, but the backward pass did not reach its value", proxy._site)

    def drop(self) -> list[Proxy]:
        """Wait for nothing any more; gives what was waited for."""
        self.forget_done()
        awaited, self._awaited = self._awaited, {}
        for _, handle in awaited.values():
            handle.remove()
        if self in self._backwards.tapes:
            self._backwards.tapes.remove(self)
        return [proxy for proxy, _ in awaited.values()]

    def run(self, loss: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the backward pass, in which what was asked for arrives."""
        self._backwards.run(loss, args, kwargs)

    def forget_done(self) -> None:
        """Take the hooks of gradients that have come off their values."""
        while self._done:
            self._done.pop().remove()

    def backward(self, loss: Proxy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``loss.backward(...)``: at once, or at the end of the block that it opens."""

        def run() -> None:
            if loss._is_pending:
                loss._defer(_backward, args, kwargs)
            else:
                self.run(loss, args, kwargs)

        if opens_block(user_frame()):
            return BackwardBlock(self._backwards, run)
        run()
        return _NoBlock()


def _backward(loss: Proxy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # Whose gradients these are is known by then: an edit is done in many traces.
    loss._scope.gradients.run(loss, args, kwargs)


class BackwardBlock:
    """``with loss.backward():``: gradients are asked for inside, and the backward pass runs at the end."""

    def __init__(self, backwards: Backwards, run: Callable[[], None]) -> None:
        self._backwards = backwards
        self._run = run

    def __enter__(self) -> BackwardBlock:
        self._backwards.open_blocks += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._backwards.open_blocks -= 1
        if kind is None:
            self._run()


class _NoBlock:
    """What a backward pass gives that has run already."""

    def __enter__(self) -> None:
        raise GradientError("to be asked for in this block, but its backward pass has run already", user_site())

    def __exit__(self, *exception: object) -> None:
        return None


_FUNCTIONS = frozenset({torch.autograd.grad, torch.autograd.backward})


def wants_gradients(tape: Tape) -> bool:
    """Whether a step of a recorded body speaks of gradients of values."""
    for step in tape.instructions:
        if step.function in _FUNCTIONS or any(type(arg) is str and arg in NAMES_OF_GRADIENTS for arg in step.args):
            return True
    return False
