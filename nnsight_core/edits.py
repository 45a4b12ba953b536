"""An edit: what is done with a model's values in every trace of it, written down once.

While it is written an edit is a tape like that of an invoke. Once it is closed it is a program: the values in it are
numbers of steps, so that it can be run any number of times, by several threads at once, each time with values of its
own. The proxies that its writer holds then stand for what their steps give in the trace that is open, or gave in the
last one.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from nnsight_core import thread_state
from nnsight_core.arguments import PENDING, Standin, copied_if_plain, mapped
from nnsight_core.asked import Asked
from nnsight_core.current import open_trace
from nnsight_core.errors import RecordingError, ReleasedValueError
from nnsight_core.input_proxy import InputProxy
from nnsight_core.proxy import Proxy
from nnsight_core.scope import Scope
from nnsight_core.sites import Site, user_site
from nnsight_core.tape import Instruction, Recorder, Tape

#: Which runs of the model a step is for: the first, the one after the last (None for all that come), and each how many.
Runs = tuple[int, "int | None", int]

#: Stands in a program for the scope of the trace that runs it.
SCOPE: Any = type("RunScope", (), {"__repr__": lambda self: "<scope>"})()

#: Why there is nothing to look at, and what to do instead.
LOOKED_AT = (
    "An edit is written down once and done in every later trace, so that there is no value to look at here. Let\n"
    "tensor operations decide (torch.where), or put what looks at the value into a function that gets it then:\n"
    "    nnsight_core.apply(function, value)"
)


class Slot:
    """Stands in a program for what step ``number`` of ``edit`` gives."""

    __slots__ = ("edit", "number")

    def __init__(self, edit: Edit, number: int) -> None:
        # An edit that held itself would not go when the model goes.
        self.edit = weakref.ref(edit)
        self.number = number

    def __reduce__(self) -> Any:
        # In a copy of the model it is the copy's edit.
        return Slot, (self.edit(), self.number)


class Written:
    """What a proxy of an edit stands for: a step, and what it gave in the last trace if that was to be kept."""

    __slots__ = ("last", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.last: Proxy | None = None


class Edit(Tape):
    """One edit of a model, as ``model.edits`` lists it.

    Args:
        scope: where its values live while it is written.
        recorder: who writes it.
        root: the model.
        name: the user's name for it; may be empty.
    """

    def __init__(self, scope: Scope, recorder: Recorder, root: torch.nn.Module, name: str) -> None:
        super().__init__(scope, recorder)
        self.name = name
        self.root = root
        self._site = user_site()
        self._is_open = True
        self._state = thread_state.snapshot()
        self._values: list[weakref.ref[Any]] = []
        #: The runs that each step is for, None for all; and those that steps are being written for.
        self.runs: list[Runs | None] = []
        self.chosen: Runs | None = None
        self._sites: list[Site] = []
        self._lines: tuple[tuple[str, str], ...] = ()

    # Writing.

    @property
    def current(self) -> Tape:
        """Itself: what is done with a value of an edit belongs to the edit."""
        return self

    def record(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Note a call for every later trace; once the edit is written, make it here and now."""
        if not self._is_open:
            return function(*mapped(args, _standing), **mapped(kwargs, _standing))
        return self._add(None, function, mapped(args, self._kept), mapped(kwargs, self._kept))

    def _add(
        self, asked: Asked | None, function: Callable[..., Any] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Proxy:
        proxy = super()._add(asked, function, args, kwargs)
        step = self.instructions[-1]
        if asked is None:
            step.entered = self._state
            step.versions = [(each, version) for each, version in step.versions if not _is_trained(each)]
        object.__setattr__(proxy, "_live", Written(len(self.runs)))
        self._values.append(weakref.ref(proxy))
        self.runs.append(self.chosen)
        self._sites.append(step.site)
        return proxy

    def _kept(self, value: Any) -> Any:
        """What an argument is kept as: a value of this edit or of an earlier one, or a thing of its own."""
        if not issubclass(type(value), Standin):
            return value if _is_trained(value) else copied_if_plain(value)
        if value._value is PENDING:
            if value._tape is self:
                self._check_runs(value._live.number)
            elif type(value._tape) is not Edit or value._tape._is_open:
                raise RecordingError("A value that has yet to arrive in a trace was used in an edit.", user_site())
            return value
        value._get()
        is_call = issubclass(type(value), InputProxy) and not value._scope.open
        return value if is_call else copied_if_plain(value._plain())

    def _check_runs(self, number: int) -> None:
        runs = self.runs[number]
        if runs is not None and runs != self.chosen:
            what = "A value that comes in some runs of the model was used in others, where it is not there."
            raise RecordingError(what, user_site(), "Do all that needs it in one block of tracer.iter[...].")

    def close(self) -> None:
        """The edit is written: from now on it is a program."""
        sites = {(site.file, site.line): site for site in self._sites}
        self._lines = tuple((site.short, site.source) for site in sites.values())
        self._sites.clear()
        for step in self.instructions:
            step.args, step.kwargs = mapped(step.args, self._numbered), mapped(step.kwargs, self._numbered)
            step.result = None
        self.abandon()

    def abandon(self) -> None:
        """Nothing more is written."""
        self._is_open = self.scope.open = False
        self.scope.tape = None

    def _numbered(self, value: Any) -> Any:
        if value is self.scope:
            return SCOPE
        is_value = issubclass(type(value), Standin) and value._value is PENDING
        return Slot(value._tape, value._live.number) if is_value else value

    # Reading, in later traces and after them.

    def look_at(self, proxy: Proxy) -> Any:
        """The value that ``proxy`` stands for.

        Raises:
            RecordingError: the edit is still being written.
            ReleasedValueError: no trace has given it, or it was not to be kept.
        """
        return self.standing(proxy)._get()

    def standing(self, proxy: Any) -> Any:
        """The proxy of this trace that ``proxy`` stands for, or that of the last trace; raises as :meth:`look_at`."""
        if self._is_open:
            raise RecordingError("A value was looked at in an edit.", user_site(), LOOKED_AT)
        found = self._in_this_trace(proxy)
        if found is None:
            found = proxy._live.last
        if found is None:
            raise ReleasedValueError(proxy._site, of_edit=True)
        return found

    def _in_this_trace(self, proxy: Any) -> Any:
        trace = open_trace(self.root)
        return None if trace is None else trace.edited_value(self, proxy._live.number)

    def save(self, proxy: Proxy) -> Proxy:
        """Keep the value beyond the trace that is open; or, if none is, beyond each trace to come."""
        found: Proxy | None = None
        if self._is_open:
            self._sites.append(user_site())
        else:
            found = self._in_this_trace(proxy)
        return super().save(proxy) if found is None else found.save()

    def keep(self, results: dict[int, Proxy], in_session: bool = False) -> None:
        """A run of the model is over: let the proxies that were saved stand for what it gave.

        Args:
            results: by step, what it gave.
            in_session: those that were not saved do so too, as long as the session lasts.
        """
        for number, reference in enumerate(self._values):
            proxy = reference()
            if proxy is not None and (proxy._saved or in_session) and number in results:
                result = results[number]
                before = proxy._live.last
                # What did not come is told, but does not take the place of what came in an earlier run of this trace.
                if result._value is not PENDING or before is None or not before._scope.open:
                    proxy._live.last = result
                    object.__setattr__(result, "_saved", proxy._saved)

    def __repr__(self) -> str:
        head = f"Edit {self.name!r} at {self._site.short}" if self.name else f"Edit at {self._site.short}"
        wide = max((len(short) for short, _ in self._lines), default=0)
        return "\n".join([head, *(f"  {short:<{wide}}   {source}".rstrip() for short, source in self._lines)])


class Edits(tuple[Edit, ...]):
    """The edits of a model, in the order in which they are made."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "\n".join(repr(each) for each in self) or "no edits"


def steps_in(edit: Edit, run: int) -> list[tuple[int, Instruction]]:
    """The steps of ``edit`` that are for the model's run number ``run``, each with its own number."""
    found = []
    for number, (step, runs) in enumerate(zip(edit.instructions, edit.runs, strict=True)):
        if runs is None or (run >= runs[0] and (runs[1] is None or run < runs[1]) and (run - runs[0]) % runs[2] == 0):
            found.append((number, step))
    return found


def _is_trained(value: Any) -> bool:
    """Whether it is a variable of the user's that gradients reach: it is used as it is at the time, not as it was."""
    return isinstance(value, torch.Tensor) and value.is_leaf and value.requires_grad


def _standing(value: Any) -> Any:
    is_value = issubclass(type(value), Standin) and value._value is PENDING
    return value._tape.standing(value) if is_value else value
