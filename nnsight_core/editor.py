"""``with model.edit() as edited:``: an edit is being written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch

from nnsight_core.arguments import apply
from nnsight_core.asked import Asked, View
from nnsight_core.bytecode import drops_result, unpacks_result
from nnsight_core.counting import CallCounter
from nnsight_core.current import closed, open_trace, opened
from nnsight_core.edits import LOOKED_AT, Edit, Edits
from nnsight_core.envoy import Envoy
from nnsight_core.errors import EditError, RecordingError
from nnsight_core.gradients import Backwards
from nnsight_core.old_spellings import explain
from nnsight_core.order import observed_operations
from nnsight_core.proxy import Proxy
from nnsight_core.scope import Scope
from nnsight_core.sites import Site, user_frame, user_site
from nnsight_core.tape import Tape
from nnsight_core.tree import Tree


class EditPart:
    """The body of an edit, as modules see the block that they are asked in.

    Args:
        tree: the model that is edited.
        name: the user's name for the edit.
    """

    #: An edit sees the whole batch.
    is_alone = True

    def __init__(self, tree: Tree, name: str) -> None:
        self.tree = tree
        self.root: torch.nn.Module = tree.root
        self.scope = Scope()
        self.scope.gradient_tape = Backwards().tape
        self.scope.give_inputs(_NoInputs())
        self.edit = Edit(self.scope, self, tree.root, name)
        self.scope.tape = self.edit
        tree.open_parts.add(self)

    def follow(self, root: torch.nn.Module) -> None:
        """The model has been loaded."""
        self.root = self.edit.root = root

    def running(self, module: torch.nn.Module) -> torch.nn.Module:
        """``module``, with its weights."""
        self.tree.load()
        return self.tree.now(module)

    def step_of(self, module: torch.nn.Module) -> int:
        """An edit is done in each run of the model."""
        return 0

    def next_step_of(self, module: torch.nn.Module, increment: int, label: str) -> None:
        """Raises:
        EditError: always; an edit has no run that others could come after.
        """
        mend = "Say for which steps it is:\n    editor = model.edit()\n    with editor as edited, editor.iter[1]: ..."
        raise EditError("An edit is done in every run of the model, so that there is no next one.", user_site(), mend)

    def counter_of(self, asked: Asked) -> CallCounter:
        """Nothing is counted while an edit is written; each trace has counters of its own."""
        return CallCounter()

    def ask(self, asked: Asked, view: View | None = None) -> Any:
        """The pending value, or the part of it that ``view`` shows."""
        whole = self.edit.ask(asked)
        return whole if view is None else whole.as_part(*view)

    def do(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``function`` on the values of proxies in every later trace."""
        return self.edit.record(apply, function, *args, **kwargs)

    def announce(self, module: torch.nn.Module, ancestors: Sequence[torch.nn.Module]) -> None:
        """Nothing: each trace counts operations from the start for what an edit asks."""

    def operations(self, module: torch.nn.Module) -> list[tuple[str, Site]] | None:
        """The operations that ``module`` calls on an example, for an edit has no input; None if it is not called.

        Raises:
            EditError: there is no example to run the model on.
        """
        call = self.tree.example(self.root)
        if call is None:
            what = "Operations are listed by running the model, and an edit has no input to run it on."
            raise EditError(what, user_site(), "List them in a trace, and ask for them by name in the edit.")
        return observed_operations(self.root, call[0], call[1], module)

    def edited_value(self, edit: Any, number: int) -> Proxy | None:
        """Nothing: there are no values while an edit is written."""
        return None

    def tape_for(self, tape: Tape) -> Tape:
        """The edit."""
        return self.edit

    def force(self, tape: Tape) -> None:
        """Nothing can be made to arrive; the edit says so where it is looked at."""


class _NoInputs(Mapping[str, Any]):
    """The arguments of the model's call, where no model is called."""

    def _refuse(self, *_: Any) -> Any:
        raise RecordingError("The input of a trace was looked at in an edit.", user_site(), LOOKED_AT)

    __getitem__ = __iter__ = __len__ = __contains__ = get = _refuse


def check_not_in_its_edit(tree: Tree) -> None:
    """Raises:
    EditError: here is the block in which this very model is being edited.
    """
    here = open_trace(tree.root)
    if isinstance(here, EditPart) and here.tree is tree:
        mend = "Run it after the block, or run the model that is being edited: `model`, not `edited`."
        raise EditError("This model is being edited, and its edit is not complete yet.", user_site(), mend)


class Editor:
    """What ``model.edit()`` gives.

    Args:
        edited: gives the model that is to have the edit.
        name: the user's name for the edit.
        inplace: the model is the user's own and not a copy.
        return_context: the block is to get this object, as scripts of some eras expect.
    """

    def __init__(self, edited: Callable[[], Envoy], name: str, inplace: bool, return_context: bool) -> None:
        self._make = edited
        self._name = name
        self._inplace = inplace
        self._return_context = return_context
        self._part: EditPart | None = None
        self._edited: Envoy | None = None

    def __enter__(self) -> Any:
        if self._edited is not None:
            raise RuntimeError("This edit has been written. Call .edit() again for another one.")
        frame = user_frame()
        if not self._inplace and drops_result(frame):
            mend = (
                "Keep it, or change the model itself:\n"
                "    with model.edit() as edited: ...\n    with model.edit(inplace=True): ..."
            )
            raise EditError("This edit is made to a copy of the model that nobody keeps.", user_site(), mend)
        self._edited = edited = self._make()
        self._part = EditPart(edited._tree, self._name)
        opened(self._part, frame)
        if unpacks_result(frame):
            return self, edited
        if self._return_context:
            return self if self._inplace else (self, edited)
        return edited

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        part, self._part = self._part, None
        assert part is not None and self._edited is not None
        closed(part)
        explain(error)
        if kind is not None:
            part.edit.abandon()
            return
        part.edit.close()
        if part.edit.instructions:
            self._edited._tree.edits = Edits((*self._edited._tree.edits, part.edit))

    @property
    def iter(self) -> EditSteps:
        """Runs of the model by number, as ``tracer.iter``: ``with editor.iter[0]:``, ``for step in editor.iter[1:3]:``.

        What stands in an open range (``editor.iter[2:]``) is done in as many runs as come. Without it an edit is done
        in every run.
        """
        if self._part is None:
            raise RuntimeError("Generation steps are chosen inside the block of the edit.")
        return EditSteps(self._part)

    def all(self) -> ChosenRuns:
        """Every run, as ``editor.iter[:]``."""
        return self.iter[:]


class EditSteps:
    """Takes the numbers of runs of the model that a part of an edit is for."""

    def __init__(self, part: EditPart) -> None:
        self._part = part

    def __getitem__(self, steps: int | slice) -> ChosenRuns:
        if isinstance(steps, int):
            steps = slice(steps, steps + 1)
        start, step = steps.start or 0, 1 if steps.step is None else steps.step
        if start < 0 or step < 1 or (steps.stop is not None and steps.stop < 0):
            raise ValueError("Generation steps are counted from 0, forwards: nobody knows the last one beforehand.")
        return ChosenRuns(self._part, slice(start, steps.stop, step))

    def __iter__(self) -> Iterator[Any]:
        return iter(self[:])


class ChosenRuns:
    """Some runs: a loop over them, or a block that is for all of them."""

    def __init__(self, part: EditPart, chosen: slice) -> None:
        self._part = part
        self._chosen = chosen
        self._before: Any = None

    def __iter__(self) -> Iterator[Any]:
        edit, before = self._part.edit, self._part.edit.chosen
        start, stop, step = self._chosen.start, self._chosen.stop, self._chosen.step
        try:
            for number in range(start, stop, step) if stop is not None else ():
                edit.chosen = (number, number + 1, 1)
                yield number
            if stop is None:
                # How many there will be nobody knows; they are all alike.
                edit.chosen = (start, None, step)
                yield edit.record(_run_of, self._part.scope)
        finally:
            edit.chosen = before

    def __enter__(self) -> Any:
        edit, self._before = self._part.edit, self._part.edit.chosen
        start, stop, step = self._chosen.start, self._chosen.stop, self._chosen.step
        edit.chosen = (start, stop, step)
        return start if stop == start + 1 else edit.record(_run_of, self._part.scope)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._part.edit.chosen = self._before


def _run_of(scope: Scope) -> int:
    return scope.run
