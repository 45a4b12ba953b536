"""Every mistake that the engine can name.

    NNsightError
    ├── OrderError
    │   ├── OutOfOrderError      a value was asked for after the forward pass had gone by it
    │   ├── ModuleNotRunError    the module does not run in this pass at all
    │   ├── CallsNotCountedError a call was asked for by number when the pass was under way
    │   ├── StepNotRunError      a generation step was asked for that did not come
    │   └── TraceStoppedError    a value was asked for after tracer.stop()
    ├── WrongThreadError         a trace was continued in another thread than the one that opened it
    ├── GradientError            a gradient that is not there, or cannot be
    ├── RecomputedError          a change that gradient checkpointing would not make again
    ├── WrittenOverError         a value was saved into which the model has written since
    ├── NoTraceError             a value was asked for outside a trace
    ├── RowsError                a value whose rows cannot be told apart among the inputs of a batch
    ├── RecordingError           something that cannot be recorded for a value that has yet to arrive
    ├── EditError                an edit that would be lost, or that cannot be made where it stands
    ├── ReleasedValueError       a value that was not saved was used after its trace
    ├── ScanError                a scan was asked for numbers
    ├── CopyError                a module that cannot be copied was to be scanned
    ├── SessionError             a session inside a session, or one that is over
    ├── NoSuchModuleError        a name that is not in the module tree
    ├── NoSuchEntryError         an index beyond the modules of a list
    ├── RenameError              a new name for a module that fits none, or that is taken
    ├── OptionError              an option that nobody here knows, or that would do nothing
    ├── RemoteError              a trace was to run on another machine
    ├── NameTakenError           a module cannot be added under a name that means something else
    ├── NoSuchOperationError     a name that is not among the operations inside a module
    ├── SourceError              a module whose operations cannot be seen
    └── InputError
        ├── MissingInputError    a trace without anything to run on
        ├── EmptyPromptError     a prompt without a token
        ├── PaddingError         prompts of different lengths for a model that cannot be padded
        ├── PromptTooLongError   a prompt beyond the model's context length
        ├── ModelNotFoundError   a name or folder that holds no model
        │   └── ModelClassError  a model of another kind
        └── MissingWeightsError  a model some of whose weights are not there

Each class writes its own message: what was asked, at which line, what is so, and how to mend it.
"""

from __future__ import annotations

from collections.abc import Iterable

from nnsight_core.error_text import did_you_mean, table
from nnsight_core.old_spellings import ELSEWHERE
from nnsight_core.sites import Site


class NNsightError(Exception):
    """The root of everything that this package raises of its own."""


class OrderError(NNsightError):
    """A value was asked for at a moment at which the model cannot give it."""


class OutOfOrderError(OrderError):
    """A value was asked for, or set, after the forward pass had gone by it."""

    def __init__(
        self,
        asked: str,
        asked_at: Site,
        reached: str,
        reached_at: Site | None,
        setting: bool = False,
        runs_inside: bool = False,
        mend: str = "",
    ) -> None:
        verb = "set" if setting else "asked for"
        what = "after the forward pass had gone by it"
        here = reached_at is not None and reached_at.file == asked_at.file and reached_at.line != asked_at.line
        if mend:
            pass
        elif runs_inside and ".source." in asked:
            what = "while its module was half-way through its call, and nobody had counted its operations"
            parent = asked.partition(".source.")[0] + ".source"
            mend = f"Write {parent} before you ask for {reached}: then they are counted from the start."
        elif runs_inside:
            what = "while its module was running already, outside its own children"
            mend = (
                f"Ask for {asked.removesuffix('.output')}.input before {reached}; then its output can be had as well."
            )
        elif setting and reached == asked:
            mend = "Set it before you ask for anything that comes later, or work on a copy: .clone()."
        elif here and reached_at is not None:
            mend = f"Move line {asked_at.line} above line {reached_at.line}."
        else:
            mend = f"Ask for {asked} before {reached}, and keep it in a variable."
        rows = [("called" if reached == "the call" else "already read", reached, reached_at), (verb, asked, asked_at)]
        super().__init__(
            f"{asked} was {verb} {what}.\n{table(rows)}\n"
            f"A model gives each value once, in the order it makes them. {mend}"
        )


class ModuleNotRunError(OrderError):
    """The module whose value was asked for does not run in this forward pass."""

    def __init__(self, asked: str, asked_at: Site, doubt: str = "", hint: str = "") -> None:
        rest = "\n".join(each for each in (doubt, hint) if each)
        super().__init__(
            f"{asked} was asked for, but its module did not run in this forward pass.\n"
            f"{table([('asked for', asked, asked_at)])}\n"
            "Check in print(model) that it is on the path that these inputs take." + (f"\n{rest}" if rest else "")
        )


class CallsNotCountedError(OrderError):
    """A call of a module was asked for by its number, and nobody has counted the calls before."""

    def __init__(self, asked: str, asked_at: Site) -> None:
        name = asked.partition(".calls")[0]
        super().__init__(
            f"{asked} was asked for when the pass was under way, and the calls before had not been counted.\n"
            f"{table([('asked for', asked, asked_at)])}\n"
            f"Write this at the start of the trace, before you ask for any value:\n    calls = model.{name}.calls"
        )


class StepNotRunError(OrderError):
    """A generation step was asked for that did not come: the end of the sequence, or of the tokens asked for."""

    def __init__(self, asked: str, asked_at: Site, step: int, ran: int, in_steps: bool = True) -> None:
        times = "once" if ran == 1 else f"{ran} times"
        mend = (
            "Ask for fewer steps or generate more tokens. For as many steps as there are, write\n"
            "    for step in tracer.iter[:]: ..."
        )
        if not in_steps:
            mend = "A trace runs the model once; steps are those of model.generate(prompt, max_new_tokens=...)."
        super().__init__(
            f"{asked} was asked for in generation step {step} (counted from 0), but the model ran {times}.\n"
            f"{table([('asked for', asked, asked_at)])}\n{mend}"
        )


class TraceStoppedError(OrderError):
    """A value was asked for after ``tracer.stop()`` had ended the forward pass."""

    def __init__(self, asked: str, asked_at: Site, stopped_at: Site) -> None:
        super().__init__(
            f"{asked} was asked for after tracer.stop() had ended the forward pass.\n"
            f"{table([('stopped', 'tracer.stop()', stopped_at), ('asked for', asked, asked_at)])}\n"
            "Ask for every value that you need before you stop."
        )


class WrongThreadError(NNsightError):
    """A trace was continued in another thread than the one that opened it."""

    def __init__(self) -> None:
        super().__init__(
            "This trace was opened in another thread, and a forward pass cannot move between threads.\n"
            "Open the trace in the thread that works with its values; threads may trace one model at the same time."
        )


class GradientError(NNsightError):
    """A gradient that is not there yet, or cannot be."""

    def __init__(self, what: str, site: Site) -> None:
        super().__init__(
            f"A gradient was {what}.\n{table([('at', site.source or 'this line', site)])}\n"
            "Gradients come in a backward pass: save them in the block, and look at them after it.\n"
            "    with loss.backward():\n        gradient = hidden.grad.save()\n"
            "The value must be on the way to the loss and require a gradient. Under torch.no_grad() none does; in a\n"
            "model of frozen parameters, call hidden.requires_grad_() where you read it, before you ask for more."
        )


class RecomputedError(NNsightError):
    """A value was changed that gradient checkpointing computes a second time, without the change."""

    def __init__(self, label: str, site: Site) -> None:
        super().__init__(
            f"{label} was changed inside a checkpointed module.\n{table([('changed', label, site)])}\n"
            "The backward pass would compute it again, as it was, and give wrong gradients.\n"
            "Turn checkpointing off, or trace under torch.no_grad() if you want no gradients."
        )


class WrittenOverError(NNsightError):
    """A value was saved into which the model has written since it was read."""

    def __init__(self, label: str, site: Site) -> None:
        super().__init__(
            f"{label} was saved, but is not any more what was read: the model has written into it since (x += y).\n"
            f"{table([('saved', label, site)])}\n"
            "Save a copy of what is there when it is read: .clone().save()."
        )


class NoTraceError(NNsightError):
    """A value was asked for where no trace of its model is open."""

    def __init__(self, asked: str, asked_at: Site, model: str = "model") -> None:
        super().__init__(
            f"{asked} was asked for outside a trace.\n{table([('asked for', asked, asked_at)])}\n"
            "A module has values only while the model runs. Open a trace around this line:\n"
            f"    with {model}.trace(inputs):\n        {asked if asked.endswith(')') else f'value = {asked}.save()'}"
        )


class ReleasedValueError(NNsightError, ValueError):
    """A value was used after its trace had ended, and was not saved or never came."""

    def __init__(self, made_at: Site, never_came: bool = False, of_edit: bool = False) -> None:
        what = "it was not saved, so it was released when its trace or session ended.", "Keep it with .save()."
        if of_edit:
            what = "no trace has given it.", "Write .save() in the edit, and run a trace of the edited model first."
        if never_came:
            what = "its trace ended before it came.", "Mend what ended the trace early: an error, or tracer.stop()."
        super().__init__(
            f"Accessing Proxy value before it's been set: {what[0]}\n"
            f"{table([('made at', made_at.source or 'this value', made_at)])}\n{what[1]}"
        )


class RecordingError(NNsightError):
    """What a script does to a value that has yet to arrive cannot be recorded."""

    def __init__(self, what: str, site: Site, mend: str = "") -> None:
        mend = mend or (
            "In an invoke, values arrive when all inputs are there. Look at the value first, value.value: then the\n"
            "body goes on with the value itself."
        )
        super().__init__(f"{what}\n{table([('at', site.source or 'this line', site)])}\n{mend}")


class EditError(NNsightError):
    """An edit that would be lost, or that cannot be made where it stands."""

    def __init__(self, what: str, site: Site, mend: str) -> None:
        super().__init__(f"{what}\n{table([('at', site.source or 'this line', site)])}\n{mend}")


class NameTakenError(NNsightError, ValueError):
    """A module cannot be added under a name that means something else."""

    def __init__(self, name: str, parent: str, why: str) -> None:
        super().__init__(f"No module can be added to {parent} as {name!r}: {why}\nGive it a name of its own.")


class ScanError(NNsightError):
    """A scan was asked for numbers, by the script or by the model itself."""

    def __init__(self, what: str, site: Site, in_model: bool = False) -> None:
        mend = "Take shapes, dtypes and devices alone, or open a trace instead: with model.trace(inputs): ..."
        if in_model:
            mend = "What this model does depends on its numbers. Open a trace instead: with model.trace(inputs): ..."
        super().__init__(
            f"{what}, but a scan has shapes, not numbers.\n{table([('at', site.source or 'this line', site)])}\n{mend}"
        )


class CopyError(NNsightError):
    """A module cannot be copied, so there is nothing that a dry run could run."""

    def __init__(self, module: str, reason: str, site: Site) -> None:
        super().__init__(
            f"{module} cannot be copied, and a scan runs a copy of the model: {reason}.\n"
            f"{table([('at', site.source or 'this line', site)])}\n"
            "Open a trace instead: with model.trace(inputs): ..."
        )


class SessionError(NNsightError):
    """A session was asked for what it cannot do: to be opened in another one or twice, to run elsewhere, to loop."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"{what}\nA session is opened once, around all the traces that belong together:\n"
            "    with model.session():\n        for prompt in prompts:\n            with model.trace(prompt): ..."
        )


class RowsError(NNsightError):
    """An invoke asked for, or changed, what cannot be divided among the inputs of its batch."""

    def __init__(self, what: str, site: Site) -> None:
        self.what = what
        super().__init__(
            f"{what}\n{table([('at', site.source or 'this line', site)])}\n"
            "Work on it in an invoke without input, which sees the whole batch, or in a trace of this input alone."
        )


class NoSuchModuleError(NNsightError, AttributeError):
    """A name was asked for that the module tree does not hold.

    Args:
        name: the name.
        parent: what was asked for it, in words.
        known: the modules that it has.
        others: what else it answers to.
        place: where a module of that name stands, if there is one below.
    """

    def __init__(
        self, name: str, parent: str, known: Iterable[str], others: Iterable[str] = (), place: str = ""
    ) -> None:
        known = sorted(set(known))
        shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
        hint = ELSEWHERE.get(name) or (f"A module of that name is at {place!r}." if place else "")
        hint = hint or did_you_mean(name, [*known, *(each for each in others if each[:1] != "_")])
        lines = [f"{parent} has no module or attribute {name!r}.", hint]
        lines.append(f"Its modules are: {shown}" if known else "It has no modules of its own.")
        super().__init__("\n".join(line for line in lines if line))


class NoSuchOperationError(NNsightError, AttributeError):
    """An operation was asked for that the module does not call."""

    def __init__(self, name: str, parent: str, known: Iterable[str], site: Site) -> None:
        known = list(dict.fromkeys(known))
        asked = f"{parent}.{name}"
        lines = [f"{asked} was asked for, but there is no such operation.", table([("asked for", asked, site)])]
        lines.append(did_you_mean(name, known))
        lines.append(f"In order, they are: {', '.join(known)}." if known else "The module calls none of its own.")
        if known:
            lines.append(f"print({parent}) shows them with their lines.")
        super().__init__("\n".join(line for line in lines if line))


class SourceError(NNsightError):
    """The operations inside a module cannot be seen, or not without an input to run on."""

    def __init__(self, label: str, why: str, mend: str, site: Site) -> None:
        super().__init__(f"{label}: {why}\n{table([('asked for', label, site)])}\n{mend}".rstrip())


class NoSuchEntryError(NNsightError, IndexError):
    """An index beyond the modules of a list was asked for."""

    def __init__(self, index: int, parent: str, count: int) -> None:
        has = f"has {count} modules, [0] to [{count - 1}]" if count else "has no modules of its own"
        super().__init__(f"{parent} {has}; [{index}] is not among them.")


class RenameError(NNsightError, ValueError):
    """A new name for a module fits no module, or belongs to something else."""

    def __init__(self, where: str, what: str, name: str = "", known: Iterable[str] = (), mend: str = "") -> None:
        lines = [f"{where}: {what}", did_you_mean(name, known), mend]
        super().__init__("\n".join(line for line in lines if line))


class OptionError(NNsightError, TypeError):
    """An option was given that nobody here knows, or that would do nothing."""

    def __init__(self, name: str, what: str, known: Iterable[str] = (), mend: str = "") -> None:
        lines = [f"{name}: {what}", did_you_mean(name, known), mend]
        super().__init__("\n".join(line for line in lines if line))


class RemoteError(NNsightError, NotImplementedError):
    """A trace was to run on another machine, which this package does not do."""

    def __init__(self) -> None:
        super().__init__(
            "remote=True: traces run in this process only, so nothing was sent and nothing was run.\n"
            "Leave remote out to run here. A model that is too large for one device can be spread over several, or\n"
            "kept on disk, when it is loaded: device_map='auto'."
        )
