"""Who asks a pass for values, and for which."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch

from nnsight_core.counting import CallCounter
from nnsight_core.errors import NNsightError
from nnsight_core.events import Event, PastEvent
from nnsight_core.operations import is_call
from nnsight_core.rows import Rows
from nnsight_core.sites import Site

#: Which part of a value is to be shown: ``get(whole, scope)`` finds it, given the scope of the trace that it is in;
#: ``put(whole, part)`` gives the whole with another part.
View = tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]


class Asked:
    """A value that a client waits for.

    Args:
        module: whose value.
        kind: ``"input"`` or ``"output"`` of its call, what is :class:`~nnsight_core.kinds.Derived` of both, or
            ``"skip"``: its call before it computes; for an operation inside it ``"source.softmax_0.input"`` or
            ``"source.softmax_0.output"``.
        label: what the user calls it.
        site: the user's line.
        ancestors: the modules inside whose calls it runs.
        step: the run of the model in which it is wanted, counted from 0; None if it belongs to no run in particular.
        otherwise: something else that would do as well, whichever comes first.
        setting: it is asked for to be set.
        written_over: the model goes on to write into the value, so that what is read has to be kept apart from it.
        call: which call of the module, counted from 0, and what counts them; None for the next that comes.
    """

    __slots__ = (
        "ancestors",
        "call",
        "kind",
        "label",
        "module",
        "otherwise",
        "setting",
        "site",
        "step",
        "written_over",
    )

    def __init__(
        self,
        module: torch.nn.Module,
        kind: str,
        label: str,
        site: Site,
        ancestors: Iterable[torch.nn.Module],
        step: int | None = None,
        otherwise: Asked | None = None,
        setting: bool = False,
        written_over: bool = False,
        call: tuple[int, CallCounter] | None = None,
    ) -> None:
        self.module = module
        self.kind = kind
        self.label = label
        self.site = site
        self.ancestors = ancestors
        self.step = step
        self.otherwise = otherwise
        self.setting = setting
        self.written_over = written_over
        self.call = call

    def is_answered_by(self, module: torch.nn.Module, kind: str, step: int | None) -> bool:
        """Whether the value of ``kind`` of ``module`` is what is asked for; ``step`` is the run of the model that is
        under way, None where steps are not counted.
        """
        each: Asked | None = self
        while each is not None:
            if (
                each.module is module
                and each.kind == kind
                and (step is None or each.step is None or each.step == step)
                and (each.call is None or each.call[1].now == each.call[0])
            ):
                return True
            each = each.otherwise
        return False

    @property
    def is_call(self) -> bool:
        """Whether it is what something is called with, and not what it gives."""
        return is_call(self.kind)


class Client(Protocol):
    """Somebody who asks for values of a pass."""

    #: The last value that it got.
    last_read: Asked | None
    #: The rows of the batch that are its own; None if all are.
    rows: Rows | None
    #: What the calls gave that it made itself with ``hook=True``.
    given: dict[tuple[torch.nn.Module, str], PastEvent]

    def keeps(self, module: torch.nn.Module, kind: str) -> bool:
        """Whether it may yet ask for what such a call gives."""

    def advance(self, event: Event) -> None:
        """``event`` is what the client waits for: do what is to be done with it, and wait for the next, or not."""

    def missed(self, error: NNsightError) -> None:
        """What the client waits for cannot come any more."""
