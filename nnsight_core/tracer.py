"""``with`` blocks: a trace, and the invokes in it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from types import FrameType, TracebackType
from typing import Any

import torch

from nnsight_core.arguments import apply
from nnsight_core.cache import Cache, CacheOptions, Wanted, chosen_envoys
from nnsight_core.call import Call
from nnsight_core.current import OpenSession, closed, end_scope, open_session, opened
from nnsight_core.edit_runs import EditRuns
from nnsight_core.editor import check_not_in_its_edit
from nnsight_core.envoy import Envoy
from nnsight_core.gathering import Combine, put_together
from nnsight_core.gone import GONE
from nnsight_core.gradients import Backwards
from nnsight_core.input_errors import MissingInputError
from nnsight_core.invoker import Invoker
from nnsight_core.keeping import Keeper, save, write_line
from nnsight_core.old_spellings import explain
from nnsight_core.passes import Part, Pass
from nnsight_core.sites import user_frame, user_site
from nnsight_core.steps import ChosenSteps, Steps
from nnsight_core.tape import Tape
from nnsight_core.twin import Twin

Prepare = Callable[..., Call]


class Tracer:
    """What ``with model.trace(...) as tracer`` gives.

    It does nothing until the block is entered, and every way out of the block leaves the model as it was.

    Args:
        model: the root of the model that is traced.
        prepare: turns what the user gave into the call to make; runs when the block is entered.
        combine: makes one call of several, and says how many rows each has.
        result: the envoy of what a pass gives.
        has_input: False where the inputs are to come from invokes.
        in_steps: the model may be run several times, as in a generation.
        keeps_output: ``.output`` is to be there after the block, too.
    """

    #: How often the model has been run.
    forward_passes = 0
    _entered = False
    _stopped = False
    _pass: Pass | None = None
    _batch: Call | None = None
    #: What runs in the place of the model, if it is not to be the model itself.
    _twin: Twin | None = None
    _session: OpenSession | None = None
    #: The body being written.
    _current: Part | None = None

    def __init__(
        self,
        model: Envoy,
        prepare: Prepare,
        combine: Combine,
        result: Envoy,
        has_input: bool,
        in_steps: bool = False,
        keeps_output: bool = False,
    ) -> None:
        self._model = model
        self._prepare: Prepare | None = prepare
        self._combine = combine
        self._has_input = has_input
        self._in_steps = in_steps
        self._result = result
        #: What the batches gave, if that is to be kept; a batch may take several passes.
        self._outputs: list[Any] | None = [] if keeps_output else None
        self._keeper = Keeper()
        self._backwards = Backwards()
        self._edits = EditRuns(model._tree, self, self._backwards) if model._tree.edits else None
        #: The bodies gathered for the next pass, and all that there have been.
        self._gathered: list[Part] = []
        self._parts: list[Part] = []

    def __enter__(self) -> Tracer:
        if self._entered:
            raise RuntimeError("This trace is open already. Call .trace(...) again for another one.")
        if self._prepare is None:
            raise RuntimeError("This trace has been run. Call .trace(...) again for another one.")
        check_not_in_its_edit(self._model._tree)
        self._entered = True
        self._keeper.open()
        self._session = open_session()
        try:
            self._make_ready()
            if self._edits is not None:
                self._edits.twin = self._twin
            if self._has_input:
                part = self._part(self._prepare())
                self._begin(part, sys._getframe(1))
                self._start_pass(part)
        except BaseException:
            self._close()
            raise
        return self

    def _make_ready(self) -> None:
        """Make sure that there is something to run."""
        self._model._tree.load()

    def _part(self, call: Call | None) -> Part:
        return Part(self._model._tree, call, self._backwards, self._twin, self._in_steps)

    def _begin(self, part: Part, frame: FrameType) -> None:
        part.edits = self._edits
        self._gathered.append(part)
        self._parts.append(part)
        self._current = part
        opened(part, user_frame(frame))

    def _start_pass(self, live: Part | None) -> None:
        parts, self._gathered = self._gathered, []
        # A dry run has no numbers by which the axes of the batch could be found out.
        root = self._model._tree.root if self._twin is None else None
        self._run(put_together(parts, self._combine, root), parts, live)

    def _run(self, batch: Call, parts: Sequence[Part], live: Part | None) -> None:
        self.forward_passes += 1
        self._batch = batch
        root = self._model._tree.root
        self._pass = Pass(batch, parts, root, self._result._module, self._edits, self._twin)
        self._pass.start(live)

    def _finish_pass(self) -> None:
        undone: list[Part] | None = None
        while self._pass is not None:
            running, self._pass = self._pass, None
            try:
                again = running.finish()
            except BaseException:
                running.unwind()
                raise
            if self._outputs is not None and not again and not self._stopped:
                self._outputs.append(running.forward.result)
            if again and again == undone:
                raise RuntimeError("These invokes wait for values of each other, and no order of passes serves them.")
            if again:
                # They need values that came too late for them, and that are there now. Everybody goes through the
                # further pass, so that each change is made in it and each value is what it would be in one pass.
                undone = again
                assert self._batch is not None
                self._run(self._batch, running.parts, None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        explain(error)
        try:
            if kind is None:
                self._finish_pass()
                self._finish_gathered()
                if not self._parts:
                    raise MissingInputError()
                self._check_parts()
        finally:
            self._close()

    def _check_parts(self) -> None:
        """Nothing asked for is silently not done."""
        if self._edits is not None and not self._stopped:
            self._edits.check()
        for part in self._parts:
            part.scope.check_gradients()
            part.scope.check_saved()
            for cache, _ in part.caches if not self._stopped else ():
                cache.check()

    def _close(self) -> None:
        try:
            if self._pass is not None:
                self._pass.unwind()
        finally:
            self._pass = None
            self._keeper.close()
            # What was traced may be large, and the tracer may outlive the block.
            self._prepare = self._batch = self._twin = None
            session, self._session = self._session, None
            for part in self._parts:
                closed(part)
                end_scope(part.scope, session)
            if self._edits is not None:
                self._edits.close(session)
            self._parts, self._gathered = [], []
            self._current = self._edits = None
            self._model = self._result = self._combine = GONE
            self._backwards = Backwards()
            self._entered = False

    def __del__(self) -> None:
        # While Python shuts down no coroutine can have its turn any more, and nothing needs to be put back.
        if getattr(self, "_entered", False) and not sys.is_finalizing():
            self._close()

    # Invokes.

    def invoke(self, *inputs: Any, **kwargs: Any) -> Invoker:
        """A block for one input of several, which are put together into one forward pass.

        Each block sees the rows of its own input. A block without input sees the whole batch. Values of one block may
        be used in another; where the model cannot serve both in one pass, there are two.

        >>> with model.trace() as tracer:  # doctest: +SKIP
        ...     with tracer.invoke("The Eiffel Tower is in the city of"):
        ...         clean = model.layers_output[3]
        ...     with tracer.invoke("The Colosseum is in the city of"):
        ...         model.layers_output[3] = clean
        ...         patched = model.logits.save()
        """
        # Without an input of its own, in a trace that has one, it sees what the trace sees.
        around = self._current.call if self._has_input and self._current and not inputs and not kwargs else None
        return Invoker(self, inputs, kwargs, around)

    def _enter_invoke(self, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        if self._has_input:
            raise RuntimeError("This trace has an input already. Open it with model.trace() to give it invokes.")
        if self._current is not None:
            raise RuntimeError("An invoke cannot be opened inside another one: put them one after the other.")
        assert self._prepare is not None
        call = self._prepare(*inputs, **kwargs) if inputs or kwargs else None
        part = self._part(call)
        part.record(self)
        self._begin(part, sys._getframe(2))
        return call

    def _exit_invoke(self, failed: bool) -> None:
        part, self._current = self._current, None
        assert part is not None
        closed(part)
        if part.live is not None and self._pass is not None:
            if failed:
                running, self._pass = self._pass, None
                running.unwind()
            else:
                self._finish_pass()
        elif failed and part in self._gathered:
            self._gathered.remove(part)

    def tape_for(self, tape: Tape) -> Tape:
        """The tape of the invoke that is being written."""
        current = self._current
        return tape if current is None or current.tape is None else current.tape

    def force(self, tape: Tape) -> None:
        """Python looks at a pending value: run what has been gathered, and let the body go on live."""
        current = self._current
        if self._pass is not None:
            return
        if current is not None and current.call is not None:
            # The others do not need this body, so they go first, and it can still be in time for everything.
            self._gathered.remove(current)
            self._finish_gathered()
            self._gathered.append(current)
            if current.tape is tape:
                self._start_pass(current)
            return
        self._start_pass(current)
        if current is None:
            self._finish_pass()

    def _finish_gathered(self) -> None:
        if self._gathered:
            self._start_pass(None)
            self._finish_pass()

    def barrier(self, count: int = 0) -> Callable[[], None]:
        """Accepted for scripts that have one: values cross between invokes by themselves."""
        return lambda: None

    # Everything else.

    def stop(self) -> None:
        """End the forward pass here. Nothing that comes later in the model is computed; what was read stays."""
        if self._pass is None:
            if self._current is None:
                raise RuntimeError("stop() belongs inside the trace, after the values that you need.")
            self._start_pass(self._current)
        assert self._pass is not None
        self._stopped = True
        self._pass.interleaver.stop()

    def cache(
        self,
        modules: Wanted | Iterable[Wanted] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        detach: bool = True,
        include_output: bool = True,
        include_inputs: bool = False,
    ) -> Cache:
        """Keep what modules give, from here on, in whatever order they run.

        >>> with model.trace("Hello") as tracer:  # doctest: +SKIP
        ...     cache = tracer.cache(modules=[model.transformer.h[0], "lm_head"]).save()
        >>> cache["transformer.h.0"].output.shape, cache.lm_head.output.shape  # doctest: +SKIP

        Args:
            modules: envoys, paths or torch modules, or one of them; all modules if None.
            device: where to put tensors; None leaves them where they are.
            dtype: the type of floating-point tensors; None leaves it.
            detach: cut from the autograd graph.
            include_output: keep what modules give.
            include_inputs: keep what modules are called with.

        Raises:
            NoSuchModuleError: a path or a module that is not in the model.
            OptionError: nothing would be kept.
        """
        part = self._open_part()
        envoys = None if modules is None else chosen_envoys(self._model, modules)
        options = CacheOptions(device, dtype, detach, include_output, include_inputs)
        cache = Cache(self._model, envoys, options, user_site())
        part.caches.append((cache, self._model._tree))
        if part.live is not None and self._pass is not None:
            self._pass.attach(part, cache, self._model._tree)
        return cache

    # Generation steps.

    @property
    def iter(self) -> Steps:
        """Generation steps by number: ``for step in tracer.iter[1:3]``, ``tracer.iter[:]``, ``with tracer.iter[0]``.

        An open loop ends with the generation; a step asked for by number that does not come is an error.
        """
        return Steps(self._open_part(), self._result, self._model._tree.root)

    def all(self) -> ChosenSteps:
        """All generation steps: ``for step in tracer.all()``, as ``tracer.iter[:]``."""
        return self.iter[:]

    def next(self, increment: int = 1) -> Tracer:
        """From now on, values are those of the next generation step."""
        part = self._open_part()
        part.check_step("tracer.next()", part.step + increment)
        part.step += increment
        return self

    def _open_part(self) -> Part:
        if self._current is None:
            raise RuntimeError(
                "This belongs inside the trace; in a trace of several inputs, inside one of its invokes."
            )
        return self._current

    @property
    def result(self) -> Any:
        """What the pass gives: the model's own output, or the tokens that were generated."""
        return self._result.output

    @property
    def output(self) -> Any:
        """The model's own output, as ``model.output``.

        After ``with model.forward(...) as runner`` and ``with model.generate() as generator`` it is what the whole
        batch gave, and need not be saved.
        """
        if self._entered or not self._outputs:
            return self._model.output
        if len(self._outputs) > 1:
            count = len(self._outputs)
            raise RuntimeError(f"There were {count} batches, not one. Save model.output in each invoke instead.")
        return self._outputs[0]

    def save(self, value: Any) -> Any:
        """Keep ``value``, or every proxy inside it, beyond the trace."""
        return save(value)

    def apply(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``function`` on the values of proxies, when they are there; gives its result as a proxy."""
        part = self._current
        if part is None or part.tape is None:
            return apply(function, *args, **kwargs)
        # Recorded even without a value to wait for, so that it stays between the lines around it.
        return part.tape.record(apply, function, *args, **kwargs)

    def log(self, *values: Any) -> None:
        """Print values when they are there, in the place of this line among those around it."""
        self.apply(write_line, *values)

    def __getattr__(self, name: str) -> Any:
        # ``tracer.layer1`` is another spelling of ``model.layer1``.
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._model, name)
