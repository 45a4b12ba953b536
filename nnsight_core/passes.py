"""One pass: a run of the model, and the parts of a script that take their values from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from nnsight_core.arguments import apply
from nnsight_core.asked import Asked, View
from nnsight_core.cache import Cache
from nnsight_core.call import Call
from nnsight_core.counting import CallCounter
from nnsight_core.errors import RowsError, StepNotRunError
from nnsight_core.events import Event, Origin
from nnsight_core.forward_pass import ForwardPass
from nnsight_core.gradients import Backwards, wants_gradients
from nnsight_core.hooked_calls import call_hooked
from nnsight_core.hooks import HookBoard
from nnsight_core.interleaver import Interleaver
from nnsight_core.live import LiveClient
from nnsight_core.operations import is_operation
from nnsight_core.order import observed_operations, observed_order
from nnsight_core.proxy import Proxy
from nnsight_core.rows import Rows
from nnsight_core.run_axes import RunAxes
from nnsight_core.scope import Scope
from nnsight_core.sites import Site, user_site
from nnsight_core.tape import Recorder, Tape, TapeClient
from nnsight_core.tree import Tree
from nnsight_core.twin import Twin


class TraceEdits(Protocol):
    """The edits of a model in one trace."""

    def start(self, interleaver: Interleaver, batch: Call, clients: dict[Tape, TapeClient]) -> None:
        """A pass begins: let the edits have the first turn at every value."""

    def value(self, edit: Any, number: int, live: bool) -> Proxy | None:
        """What a step of an edit gives in this trace; None if the trace does not make this edit."""


class Part:
    """One body of a script: the inputs that it speaks of, and how far it is.

    Args:
        tree: the model's.
        call: its input, prepared; None for a body that sees the whole batch.
        backwards: the backward passes of the trace.
        twin: what runs in the place of the model, if it is not the model itself.
        in_steps: a pass may run the model several times.
    """

    def __init__(
        self, tree: Tree, call: Call | None, backwards: Backwards, twin: Twin | None = None, in_steps: bool = False
    ) -> None:
        self._tree = tree
        self._in_steps = in_steps
        self.call = call
        self.twin = twin
        if twin is not None:
            with tree.lock:
                tree.open_parts.add(self)
                # The model may have been loaded since its twin was made.
                twin.follow(tree.root)
        self.scope = Scope()
        self.scope.gradient_tape = backwards.tape
        self._batch = call
        self.tape: Tape | None = None
        self.live: LiveClient | None = None
        self.rows: Rows | None = None
        self.edits: TraceEdits | None = None
        #: Somebody in the pass asks for gradients of values.
        self.wants_gradients = True
        #: The run of the model that values are asked of, where a pass may run it several times.
        self.step = 0
        self._steps_of: dict[torch.nn.Module, int] | None = None
        #: The last step that was asked for by number in a recorded body: which, what asked, and where.
        self.needed: tuple[int, str, Site] | None = None
        #: What counts the calls of modules that were asked for by number.
        self.counters: dict[torch.nn.Module, CallCounter] | None = None
        #: Caches, each with what tells its modules' ancestors.
        self.caches: list[tuple[Cache, Tree]] = []

    def record(self, recorder: Recorder) -> None:
        """From now on, what is done with values is recorded."""
        self.tape = self.scope.tape = Tape(self.scope, recorder)

    @property
    def is_alone(self) -> bool:
        """Whether no other input shares the batch, which a recorded body cannot know."""
        return self.live is not None and self.rows is None

    def step_of(self, module: torch.nn.Module) -> int:
        """The run of the model that values of ``module`` are asked of."""
        return self.step if self._steps_of is None else max(self.step, self._steps_of.get(module, 0))

    def next_step_of(self, module: torch.nn.Module, increment: int, label: str) -> None:
        """From now on, ask ``module`` for the values of a later run; ``label`` is how errors are to call that.

        Raises:
            StepNotRunError: the model is run once only.
        """
        step = self.step_of(module) + increment
        self.check_step(label, step)
        self._steps_of = {**(self._steps_of or {}), module: step}

    def need_step(self, label: str, step: int) -> None:
        """From now on, values are those of the run number ``step``, which has to come, whatever is asked of it."""
        self.step = step
        if step > (0 if self.needed is None else self.needed[0]):
            self.needed = step, label, user_site()

    def check_ran(self, last: int | None) -> None:
        """Raises:
        StepNotRunError: a run was asked for that has not come; ``last`` is the last that has.
        """
        if self.needed is not None and self.needed[0] > (last or 0):
            step, label, site = self.needed
            raise StepNotRunError(label, site, step, 0 if last is None else last + 1)

    def check_step(self, label: str, step: int) -> None:
        """Raises:
        StepNotRunError: the model is run once only, and ``step`` is not that run.
        ValueError: a step before the first.
        """
        if step < 0:
            raise ValueError(f"{label}: generation steps are counted from 0, and go forwards.")
        if step and not self._in_steps:
            raise StepNotRunError(label, user_site(), step, 1, in_steps=False)

    def counter_of(self, asked: Asked) -> CallCounter:
        """What counts the calls of the module that is ``asked`` for.

        Raises:
            CallsNotCountedError: the pass is under way, and the module may have been called already.
        """
        counter = (self.counters or {}).get(asked.module)
        if counter is None:
            counter = CallCounter()
            if self.live is not None:
                self.live.count(counter, asked)
            self.counters = {**(self.counters or {}), asked.module: counter}
        return counter

    @property
    def root(self) -> torch.nn.Module:
        """The model, which may be loaded in the middle of a dry run."""
        return self._tree.root

    def follow(self, root: torch.nn.Module) -> None:
        """The model is being loaded in the middle of a dry run, as ``root``."""
        if self.twin is not None:
            self.twin.follow(root)

    def running(self, module: torch.nn.Module) -> torch.nn.Module:
        """What runs in the place of ``module``."""
        return module if self.twin is None else self.twin.of(module)

    def ask(self, asked: Asked, view: View | None = None) -> Any:
        """The value asked for, or the part that ``view`` shows: present if this body runs live, else pending."""
        if self.twin is not None:
            asked.module = self.twin.original(asked.module)
        if self.live is None:
            assert self.tape is not None
            whole = self.tape.ask(asked)
            return whole if view is None else whole.as_part(*view)
        event = self.live.ask(asked)
        is_plain = event.kind == "output" and type(event.value) is torch.Tensor and not event.is_copied
        if view is None and self.rows is None and is_plain:
            # What most accesses come to, by the shortest way.
            return self.scope.wrap(event.value, event, event.site)
        return self.proxy(event, view)

    def do(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``function`` on the values of proxies, now if this body runs live, else when they arrive."""
        if self.live is None:
            assert self.tape is not None
            return self.tape.record(apply, function, *args, **kwargs)
        return apply(function, *args, **kwargs)

    def edited_value(self, edit: Any, number: int) -> Proxy | None:
        """What a step of an edit gives in this trace; None if the trace does not make this edit."""
        return None if self.edits is None else self.edits.value(edit, number, self.live is not None)

    def proxy(self, event: Event, view: View | None = None) -> Any:
        """The proxy of what ``event`` gives, cut to this body's rows, or of the part that ``view`` shows."""
        if event.memory is not None:
            whole = self._inside(event)
            return whole if view is None else whole.as_part(*view)
        if view is not None:
            return self._part(event, *view)
        # A call that a body made on its own rows holds no others.
        is_call, rows = event.is_call, self.rows if event.rows is None else None
        if rows is None:
            value = self.scope.copied(event.value) if event.is_copied else event.value
            if event.kind == "skip" and event.replaced:
                # Somebody else has skipped it already; the last to do so says what it gives.
                value = (None,), {}
            return self.scope.proxy(value, event, is_call, event.site)
        place = (event.module, event.kind, ())
        try:
            part = rows.take(event.value, place)
        except RowsError as error:
            # The model is at work here; the line that asked is the user's.
            raise RowsError(error.what, event.site) from None
        if self.wants_gradients and torch.is_grad_enabled():
            # What is cut out is no part of the way to the loss; put back, it is, and gradients come by it.
            event.write(rows.put(event.value, part, place))
        if event.is_copied:
            part = self.scope.copied(part)
        return self.scope.proxy(part, event.origin(rows), is_call, event.site)

    def _inside(self, event: Event) -> Any:
        """The proxy of what an operation inside a module is called with, or gives."""
        # A call that a body made on its own rows holds no others.
        rows = None if self.rows is None or event.rows is not None else self.rows.strictly()
        place = (event.module, event.kind, ())
        try:
            value = event.value if rows is None else rows.take(event.value, place)
        except RowsError as error:
            raise RowsError(error.what, event.site) from None
        # What others hold has to stay in their memory.
        can_move = event.is_call or event.memory == "own"
        if rows is not None and can_move and torch.is_grad_enabled() and self.wants_gradients:
            event.write(rows.put(event.value, value, place))
        if event.memory != "own":
            value = self.scope.copied(value)
        return self.scope.proxy(value, event if rows is None else event.origin(rows), event.is_call, event.site)

    def announce(self, module: torch.nn.Module, ancestors: Sequence[torch.nn.Module]) -> None:
        """Operations inside ``module`` are going to be asked for."""
        if self.live is not None:
            self.live.announce(module, ancestors)

    def operations(self, module: torch.nn.Module) -> list[tuple[str, Site]] | None:
        """The operations that ``module`` calls on this body's input, with their lines; None if it is not called."""
        if self._batch is None and self.tape is not None:
            # A body that sees the whole batch, which has to be put together first.
            self.tape.force()
        assert self._batch is not None
        shapes = None if self.twin is None else self.twin.shapes
        return observed_operations(self.root, self._batch.args, self._batch.kwargs, module, shapes)

    def _part(self, event: Event, get: Callable[[Any, Any], Any], put: Callable[[Any, Any], Any]) -> Any:
        if self.rows is not None:
            return self.proxy(event).as_part(get, put)
        # The whole value has no proxy that anybody could have, so none is made for it.
        read, write, scope = event.read, event.write, self.scope
        origin = Origin(event, lambda: get(read(), scope), lambda part: write(put(read(), part)))
        part = get(event.value, scope)
        return scope.wrap(scope.copied(part) if event.is_copied else part, origin, event.site)

    def place(self, rows: Rows | None, batch: Call) -> None:
        """Say where in the batch this body's input stands."""
        self._batch = batch
        self.rows = None if rows is None or rows.size == rows.total else rows
        self.scope.tape = None
        self.scope.is_cut = self.rows is not None
        self.scope.give_inputs(batch.inputs, self.rows and self.rows.of_inputs(), (self.root, "input", (1,)))
        padding = batch.padding
        if padding is not None and self.rows is not None:
            padding = padding[self.rows.start : self.rows.start + self.rows.size]
        self.scope.padding, self.scope.prompt_length = padding, batch.prompt_length


class Pass:
    """A run of the model with its clients.

    Args:
        call: the call to make.
        parts: the bodies that it serves, in their order.
        root: the model.
        result: the module that is called with what the pass gives.
        edits: the edits of the model; None if it has none.
        twin: what is run in the place of the model, if it is not to be the model itself.
    """

    def __init__(
        self,
        call: Call,
        parts: Sequence[Part],
        root: torch.nn.Module,
        result: torch.nn.Module,
        edits: TraceEdits | None = None,
        twin: Twin | None = None,
    ) -> None:
        def run() -> Any:
            return result(call.function(*call.args, **call.kwargs))

        def run_twin() -> Any:
            assert twin is not None
            args, kwargs = twin.own((call.args, call.kwargs))
            with twin.running():
                return result(twin.module(*args, **kwargs))

        shapes = None if twin is None else twin.shapes
        observe = partial(observed_order, root, call.args, call.kwargs, shapes)
        self.forward = ForwardPass(run if twin is None else run_twin)
        board = HookBoard if twin is None else twin.board
        self.interleaver = Interleaver(self.forward, observe, root if call.runs_repeatedly else None, board)
        self.parts = parts
        self._call = call
        self._edits = edits
        self._in_steps = call.runs_repeatedly
        self._clients: dict[Tape, TapeClient] = {}
        self._by_part: dict[Part, TapeClient] = {}

    def start(self, live: Part | None) -> None:
        """Let all recorded bodies go as far as they get without the model, and ``live`` go on live."""
        if self._edits is not None:
            self._edits.start(self.interleaver, self._call, self._clients)
        wanted = live is not None or any(part.tape is not None and wants_gradients(part.tape) for part in self.parts)
        self._let_axes_follow()
        for part in self.parts:
            part.wants_gradients = wanted
            for module, counter in (part.counters or {}).items():
                self.interleaver.count_from_start(module, counter)
            for cache, tree in part.caches:
                self.attach(part, cache, tree)
            if part.tape is not None:
                for asked in part.tape.questions:
                    if is_operation(asked.kind):
                        self.interleaver.hooks.announce(asked.module, asked.ancestors)
                client = TapeClient(part.tape, self.interleaver, part.proxy, part.rows)
                self._clients[part.tape] = self._by_part[part] = client
                part.scope.run_hooked = partial(call_hooked, self.interleaver, client, part.twin)
                if part is not live:
                    client.run(self._clients)
        if live is None:
            return
        live.live = LiveClient(self.interleaver)
        live.scope.run_hooked = partial(call_hooked, self.interleaver, live.live, live.twin)
        if live.tape is not None:
            self._by_part[live].play(live.ask)
            live.tape = None

    def _let_axes_follow(self) -> None:
        """Where the model runs again and again, whoever knows of its batch is told of each run."""
        axes = next((part.rows.axes for part in self.parts if part.rows is not None), None)
        if isinstance(axes, RunAxes):
            self.interleaver.at_runs.append(axes.begin)

    def attach(self, part: Part, cache: Cache, tree: Tree) -> None:
        """Let ``cache`` note the values of ``part`` from here on."""
        record = cache.recorder(self._in_steps)
        for module, kind in cache.watched():
            ancestors, known, note = tree.ancestors(module), module, record
            if part.twin is not None:
                known, note = part.twin.original(module), partial(_noted_of, record, module)
            self.interleaver.observe(known, kind, ancestors, note, part.rows)

    def finish(self) -> list[Part]:
        """Run to the end; gives the bodies that could not be done in this pass."""
        try:
            self.interleaver.finish(counts=any(part.needed is not None for part in self.parts))
            undone = {part: client for part, client in self._by_part.items() if not client.done}
            if self.interleaver.stopped_at is not None:
                for client in undone.values():
                    if client.waits_for is not None:
                        raise self.interleaver.missing(client, client.waits_for)
            else:
                for part in self.parts:
                    if part.needed is not None:
                        part.check_ran(self.interleaver.step)
            return list(undone)
        finally:
            self._drop()

    def unwind(self) -> None:
        """Leave the pass where it stands."""
        try:
            if self.interleaver.turns.is_in_its_thread:
                self.interleaver.unwind()
            else:
                # Only its own thread may resume the forward pass; the hooks can go from anywhere.
                self.interleaver.end()
        finally:
            self._drop()

    def _drop(self) -> None:
        for part in self.parts:
            part.live = None
        if self._clients:
            # Those who run tapes know one another, and the collector alone could take that apart.
            self._clients.clear()
            self._by_part.clear()


def _noted_of(
    record: Callable[[torch.nn.Module, str, Any], None], module: torch.nn.Module, _: Any, kind: str, value: Any
) -> None:
    record(module, kind, value)
