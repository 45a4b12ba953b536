"""The edits of a model in one trace: run in each of its passes, ahead of everything else."""

from __future__ import annotations

import operator
import weakref
from functools import partial
from typing import Any

import torch

from nnsight_core.arguments import mapped
from nnsight_core.asked import Asked
from nnsight_core.call import Call
from nnsight_core.counting import CallCounter
from nnsight_core.current import OpenSession, end_scope
from nnsight_core.edits import SCOPE, Edit, Slot, steps_in
from nnsight_core.errors import NNsightError, RecordingError, StepNotRunError
from nnsight_core.gradients import Backwards
from nnsight_core.hooked_calls import call_hooked
from nnsight_core.input_proxy import InputProxy
from nnsight_core.interleaver import Interleaver
from nnsight_core.operations import is_operation
from nnsight_core.passes import Part
from nnsight_core.proxy import Proxy
from nnsight_core.scope import Scope
from nnsight_core.sites import user_site
from nnsight_core.tape import Recorder, Tape, TapeClient
from nnsight_core.tree import Tree
from nnsight_core.twin import Twin

#: Steps that hand an argument on to the model as it is, which may then change it in place.
_HAND_ON = (
    Proxy.set_value,
    Proxy.update_value,
    InputProxy.set_call,
    InputProxy.set_result,
    operator.setitem,
    setattr,
)


class EditRun:
    """One go through an edit, with values of its own.

    Args:
        edit: the program.
        number: the run of the model, counted from 0.
        runs: who knows what the other edits of the trace give.
        live: the run is under way, and not yet to come.
    """

    def __init__(self, edit: Edit, number: int, runs: EditRuns, live: bool) -> None:
        self.number = number
        self._edit = edit
        self._live = live
        self.part = Part(runs.tree, None, runs.backwards, runs.twin)
        self.part.record(runs)
        self.part.scope.run = number
        tape = self.part.tape
        assert tape is not None
        #: By step of the program, what it gives.
        self.results: dict[int, Proxy] = {}
        for index, step in steps_in(edit, number):
            exchange = partial(self._exchanged, runs, step.function in _HAND_ON)
            asked = None if step.asked is None else self._asked(step.asked, runs)
            is_call = asked is not None and asked.is_call
            args, kwargs = mapped(step.args, exchange), mapped(step.kwargs, exchange)
            result = self.results[index] = self.part.scope.pending(tape, is_call, step.site)
            tape.instructions.append(step.again(asked, args, kwargs, result))

    def _asked(self, asked: Asked, runs: EditRuns) -> Asked:
        step = None if asked.step is None else self.number
        module = runs.tree.now(asked.module)
        ancestors = runs.tree.ancestors(module)
        counted = module
        if runs.twin is not None:
            module = runs.twin.original(module)
        question = (module, asked.kind, asked.label, asked.site, ancestors, step)
        again = Asked(*question, setting=asked.setting, written_over=asked.written_over)
        if asked.call is not None:
            again.call = asked.call[0], runs.counter_of(counted)
        return again

    def _exchanged(self, runs: EditRuns, hand_on: bool, value: Any) -> Any:
        if value is SCOPE:
            return self.part.scope
        if type(value) is Slot:
            return self._result(runs, value)
        if isinstance(value, torch.nn.Module):
            return self.part.running(runs.tree.now(value))
        return value.clone() if hand_on and type(value) is torch.Tensor and not value.requires_grad else value

    def _result(self, runs: EditRuns, slot: Slot) -> Proxy:
        edit = slot.edit()
        found = None
        if edit is self._edit:
            found = self.results.get(slot.number)
        elif edit is not None:
            found = runs.value(edit, slot.number, self._live)
        if found is None:
            raise RecordingError("An edit uses a value of another edit, which this model does not have.", user_site())
        return found


class EditRuns:
    """The edits of one trace.

    Args:
        tree: the model.
        tracer: who records what the script does in the trace.
        backwards: the backward passes of the trace.
    """

    #: What runs in the place of the model, if it is not the model itself.
    twin: Twin | None = None

    def __init__(self, tree: Tree, tracer: Recorder, backwards: Backwards) -> None:
        self.tree = tree
        self.backwards = backwards
        self._edits = tree.edits
        self._tracer = weakref.ref(tracer)
        self._expected: dict[Edit, EditRun] = {}
        self._latest: dict[Edit, EditRun] = {}
        # Of the runs themselves only the latest is kept, for they hold values.
        self._scopes: list[Scope] = []
        self._clients: list[EditClient] = []
        asked = [step.asked for edit in self._edits for step in edit.instructions if step.asked is not None]
        self._counters = {each.module: CallCounter() for each in asked if each.call is not None}

    def counter_of(self, module: torch.nn.Module) -> CallCounter:
        """What counts the calls of a module that an edit asks for by number."""
        return self._counters[module]

    def start(self, interleaver: Interleaver, batch: Call, clients: dict[Tape, TapeClient]) -> None:
        """A pass begins: let the edits have the first turn at every value."""
        for module, counter in self._counters.items():
            interleaver.count_from_start(module, counter)
        self._clients = [EditClient(edit, self, interleaver, batch) for edit in self._edits]
        for client in self._clients:
            interleaver.enrol(client)
        for client in self._clients:
            client.begin_first(clients)

    def begin(self, edit: Edit, number: int) -> EditRun:
        """The values of ``edit`` for a run of the model that begins."""
        before = self._latest.get(edit)
        if before is not None and before.number < number:
            edit.keep(before.results)
        found = self._expected.pop(edit, None) if number == 0 else None
        found = self._latest[edit] = found or self._made(edit, number, live=True)
        return found

    def _made(self, edit: Edit, number: int, live: bool) -> EditRun:
        run = EditRun(edit, number, self, live)
        self._scopes.append(run.part.scope)
        return run

    def value(self, edit: Edit, number: int, live: bool) -> Proxy | None:
        """What a step of ``edit`` gives in this trace; None if the trace does not make this edit."""
        if edit not in self._edits:
            return None
        if live:
            run = self._latest.get(edit)
        else:
            # An invoke is written before its pass begins.
            run = self._expected.get(edit)
            if run is None:
                run = self._expected[edit] = self._made(edit, 0, live=False)
        return None if run is None else run.results.get(number)

    def tape_for(self, tape: Tape) -> Tape:
        """The tape of the invoke that is being written."""
        tracer = self._tracer()
        found = tape if tracer is None else tracer.tape_for(tape)
        if found is tape:
            self.force(tape)
        return found

    def force(self, tape: Tape) -> None:
        """Raises:
        RecordingError: always.
        """
        mend = "Use it after a value that the model gives later, or ask the module itself for the value."
        raise RecordingError("A value of an edit was used before the model had come to it.", user_site(), mend)

    def check(self) -> None:
        """Raises:
        StepNotRunError: a part of an edit is for a run of the model that did not come.
        GradientError: a gradient was asked for that has not come.
        """
        for scope in self._scopes:
            scope.check_gradients()
        for client in self._clients:
            client.check_runs()

    def close(self, session: OpenSession | None = None) -> None:
        """The trace is over; in a session its values are kept for later ones."""
        for edit, run in self._latest.items():
            edit.keep(run.results, session is not None)
        for scope in self._scopes:
            end_scope(scope, session)
        self._scopes, self._clients = [], []
        self._latest, self._expected = {}, {}


class EditClient(TapeClient):
    """Runs one edit in a pass, in each run of the model anew.

    Args:
        edit: the program.
        runs: all edits of the trace.
        interleaver: the turns of the pass.
        batch: the call that is made.
    """

    #: An edit has a part in whatever the trace does.
    shares_backward = True

    def __init__(self, edit: Edit, runs: EditRuns, interleaver: Interleaver, batch: Call) -> None:
        run = runs.begin(edit, 0)
        assert run.part.tape is not None
        super().__init__(run.part.tape, interleaver, run.part.proxy)
        self._edit = edit
        self._runs = runs
        self._batch = batch
        self._run = run

    def begin_first(self, clients: dict[Tape, TapeClient]) -> None:
        """The model is about to run for the first time."""
        self._clients = clients
        for asked in self._edit.questions:
            if is_operation(asked.kind):
                module = self._runs.tree.now(asked.module)
                self._interleaver.hooks.announce(module, self._runs.tree.ancestors(module))
        if self._batch.runs_repeatedly:
            self._interleaver.at_steps.append(self.begin)
            for asked in self._edit.questions:
                module = self._runs.tree.now(asked.module)
                self._interleaver.hooks.watch(module, asked.kind, self._runs.tree.ancestors(module))
        self._go()

    def begin(self, number: int) -> None:
        """The model is about to run for another time."""
        self._interleaver.give_up(self)
        # It holds what the run before has given.
        self._clients.pop(self.tape, None)
        self._run = self._runs.begin(self._edit, number)
        self._position = 0
        self.given.clear()
        self._go()

    def _go(self) -> None:
        part = self._run.part
        assert part.tape is not None
        part.place(None, self._batch)
        part.scope.run_hooked = partial(call_hooked, self._interleaver, self, part.twin)
        self.tape, self._proxy = part.tape, part.proxy
        self._clients[self.tape] = self
        self.run(self._clients)

    def missed(self, error: NNsightError) -> None:
        """The module did not run, or had run before the edit came to it."""
        error.args = (f"{error}\nThe line is part of an edit, which every trace of the model makes:\n{self._edit!r}",)
        raise error

    def check_runs(self) -> None:
        """Raises:
        StepNotRunError: a part of the edit is for a run of the model that did not come.
        """
        ran = self._run.number + 1
        for step, runs in zip(self._edit.instructions, self._edit.runs, strict=True):
            if runs is None or runs[1] is None:
                continue
            missing = next((number for number in range(runs[0], runs[1], runs[2]) if number >= ran), None)
            if missing is not None:
                label = step.asked.label if step.asked else step.site.source
                raise StepNotRunError(label, step.site, missing, ran)
