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
from nnsight_core.hooks import on_gradient
from nnsight_core.proxy import Proxy
from nnsight_core.scope import Scope, arrive
from nnsight_core.sites import user_frame, user_site
from nnsight_core.tape import Instruction, NotThereYet, Tape, point_at, resolved


class GradientTape(Tape):
    """What is done with gradients that have yet to arrive. Steps are taken as soon as what they need is there.

    Args:
        scope: where the values live.
    """

    def __init__(self, scope: Scope) -> None:
        super().__init__(scope, self)
        #: For each gradient that was asked for and has not come: its proxy, and how to stop waiting.
        self._awaited: dict[int, tuple[Proxy, Any]] = {}
        self._done: list[Any] = []

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
        pending = self.scope.pending(self)

        def arrived(gradient: torch.Tensor) -> torch.Tensor | None:
            # Not removed here: torch is going through the hooks of this tensor.
            self._done.append(self._awaited.pop(id(pending))[1])
            event = Event(tensor, "gradient", site.source or "a gradient", gradient, site)
            arrive(pending, self.scope.proxy(gradient, event.origin()))
            self._advance()
            event.current = False
            return event.value if event.replaced else None

        self._awaited[id(pending)] = pending, on_gradient(tensor, arrived)
        return pending

    def _advance(self) -> None:
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
        awaited, self._awaited = self._awaited, {}
        for _, handle in awaited.values():
            handle.remove()
        return [proxy for proxy, _ in awaited.values()]

    def run(self, loss: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the backward pass, in which what was asked for arrives."""
        try:
            loss.value.backward(*unwrap(args), **unwrap(kwargs))
        finally:
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
            return BackwardBlock(self, run)
        run()
        return _NoBlock()


def _backward(loss: Proxy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    # Whose gradients these are is known by then: an edit is done in many traces.
    loss._scope.gradients.run(loss, args, kwargs)


class BackwardBlock:
    """``with loss.backward():``: gradients are asked for inside, and the backward pass runs at the end."""

    def __init__(self, tape: GradientTape, run: Callable[[], None]) -> None:
        self._tape = tape
        self._run = run

    def __enter__(self) -> BackwardBlock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self._run()


class _NoBlock:
    """What a backward pass gives that has run already."""

    def __enter__(self) -> None:
        raise GradientError("to be asked for in this block, but its backward pass has run already", user_site())

    def __exit__(self, *exception: object) -> None:
        return None
