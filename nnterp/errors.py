"""The tree of mistakes. Each class says what was asked, what is so, and how to mend it.

NnterpError
+-- SpecError                   a YAML specification is wrong
|   +-- SpecSyntaxError         ... is no YAML, or no mapping
|   +-- DuplicateKeyError       ... gives one key twice
|   +-- UnknownKeyError         ... has a key that means nothing
|   +-- MissingKeyError         ... lacks a key
|   +-- SpecValueError          ... gives a key a value that it cannot have
|   +-- DuplicateArchitectureError   two files serve one model type
+-- UnknownArchitectureError    no specification serves a model type
|   +-- ProbeError              ... and the model cannot be run to find its structure (nnterp/inference/errors.py)
|   +-- LayersNotFoundError     ... and its layers cannot be told from its other modules (likewise)
+-- RenamingError               names and model do not fit
    +-- ModulePathError         a specification or a user names a module that the model has not
    +-- AmbiguousNameError      a user's name fits several modules
    +-- AliasConflictError      a new name is taken by something else
    +-- UnknownNameError        a name that no module answers to
    +-- DimensionError          the configuration has no usable number for a dimension
    +-- ValidationError         the model gives other numbers than the specification promises
+-- UsageError                  a script asks for what cannot be
    +-- LayerIndexError         a layer that the model has not
    +-- MissingPartError        a part that the layer has not
    +-- CannotError             what cannot be had of this family of models
    +-- ShapeError              a value of the wrong shape for its place
    +-- RoutingError            experts that are not called with a routing
    +-- StackShapeError         a stack of contributions that does not fit the residual stream
    +-- SteeringVectorError     a vector that does not fit the residual stream
    +-- PositionError           a position or a prompt that is not there
    +-- PromptPairError         prompts that are to be compared token by token, and do not match
    +-- TopCountError           more of the most probable tokens than there are, or none
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = [
    "AliasConflictError",
    "AmbiguousNameError",
    "CannotError",
    "DimensionError",
    "DuplicateArchitectureError",
    "DuplicateKeyError",
    "LayerIndexError",
    "MissingKeyError",
    "MissingPartError",
    "ModulePathError",
    "NnterpError",
    "PositionError",
    "PromptPairError",
    "RenamingError",
    "RoutingError",
    "ShapeError",
    "SpecError",
    "SpecSyntaxError",
    "SpecValueError",
    "StackShapeError",
    "SteeringVectorError",
    "TopCountError",
    "UnknownArchitectureError",
    "UnknownKeyError",
    "UnknownNameError",
    "UsageError",
    "ValidationError",
]

#: How many names a message lists before it only counts the rest: a message should fit on one screen.
LISTED = 24


def nearest(name: str, options: Iterable[str], count: int = 3) -> tuple[str, ...]:
    """The options most like `name`, best first; equal last components count as alike.

    >>> nearest("atn", ["attn", "mlp"])
    ('attn',)
    """
    unique = sorted(set(options))
    tail = name.rpartition(".")[2]
    same_tail = [option for option in unique if option.rpartition(".")[2] == tail]
    alike = difflib.get_close_matches(name, unique, n=count, cutoff=0.6)
    return tuple(dict.fromkeys([*alike, *same_tail]))[:count]


def listed(names: Iterable[str], first: Iterable[str] = ()) -> str:
    """The names in one line, `first` before the others, cut to what fits on a screen."""
    ordered = list(dict.fromkeys([*first, *names]))
    if not ordered:
        return "nothing"
    rest = len(ordered) - LISTED
    return ", ".join(ordered[:LISTED]) + (f" and {rest} more" if rest > 0 else "")


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """`Did you mean 'a' or 'b'?`, or nothing where no option is near."""
    near = nearest(name, options)
    return f"Did you mean {' or '.join(repr(option) for option in near)}?" if near else ""


def _message(fact: str, table: Sequence[tuple[str, str]], mend: Iterable[str]) -> str:
    """The fact, a table of what was found and what was expected, and how to mend it."""
    rows = [
        textwrap.fill(
            text, width=110, initial_indent=f"  {label:<11}", subsequent_indent=" " * 13, break_long_words=False
        )
        for label, text in table
    ]
    return "\n".join([fact, *rows, *(line for line in mend if line)])


def _rebuilt(kind: type[NnterpError], args: tuple[Any, ...], state: dict[str, Any]) -> NnterpError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class NnterpError(Exception):
    """The root of what this package raises."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The subclasses compose their message from other arguments than they keep, which the default pickling
        # would call them with again; an error that cannot be unpickled hangs a multiprocessing pool.
        return _rebuilt, (type(self), self.args, self.__dict__)


class SpecError(NnterpError, ValueError):
    """A YAML specification is wrong. `source` and `line` say where."""

    def __init__(self, source: str, line: int, fact: str, *, found: str, expected: str, mend: str) -> None:
        self.source = source
        self.line = line
        super().__init__(_message(f"{source}:{line}: {fact}", [("found", found), ("expected", expected)], [mend]))


class SpecSyntaxError(SpecError):
    """The text is not YAML, or not a mapping of keys to values."""


class DuplicateKeyError(SpecError):
    """One mapping gives the same key twice; YAML would keep the last one in silence."""

    def __init__(self, source: str, line: int, where: str, key: str, first_line: int) -> None:
        super().__init__(
            source,
            line,
            f"{where} gives the key '{key}' twice.",
            found=f"'{key}' on line {first_line} and again on line {line}",
            expected="each key once",
            mend=f"Remove line {first_line} or line {line}.",
        )


class UnknownKeyError(SpecError):
    """A key that this place does not know, with the nearest one that it does."""

    def __init__(self, source: str, line: int, where: str, key: str, known: Sequence[str]) -> None:
        super().__init__(
            source,
            line,
            f"{where} has no key '{key}'.",
            found=key,
            expected="one of " + listed(known, nearest(key, known)),
            mend=did_you_mean(key, known) or "Remove the key; architectures/README.md explains those there are.",
        )


class MissingKeyError(SpecError):
    """A key that has to be there is not."""

    def __init__(self, source: str, line: int, where: str, key: str, found: Sequence[str], meaning: str) -> None:
        super().__init__(
            source,
            line,
            f"{where} lacks the key '{key}'.",
            found="only " + listed(found) if found else "no key at all",
            expected=f"{key}: {meaning}",
            mend=f"Add '{key}' to {where}; architectures/README.md explains it.",
        )


class SpecValueError(SpecError):
    """A key has a value that it cannot have."""


class DuplicateArchitectureError(SpecError):
    """Two files claim one model type, and nothing says which of them is right."""

    def __init__(self, source: str, line: int, model_type: str, other: str) -> None:
        super().__init__(
            source,
            line,
            f"the model type '{model_type}' is served twice.",
            found=f"'{model_type}' here and in {other}",
            expected="each model type in one file",
            mend=f"Take '{model_type}' out of `model_types` in one of the two files.",
        )


class UnknownArchitectureError(NnterpError, LookupError):
    """No specification serves a model type; says which types are served."""

    def __init__(self, model_type: str, served: Sequence[str]) -> None:
        self.model_type = model_type
        near = nearest(model_type, served)
        super().__init__(
            _message(
                f"no architecture specification serves the model type '{model_type}'.",
                [("asked for", model_type), ("served", listed(sorted(served), near))],
                [
                    did_you_mean(model_type, near),
                    "Write a YAML file for it (architectures/README.md shows how; if it is laid out like a served type,"
                    " a copy of that file with other `model_types` will do), and load it: spec_from_file('mine.yaml').",
                ],
            )
        )


class RenamingError(NnterpError, ValueError):
    """Names and model do not fit each other."""


class ModulePathError(RenamingError):
    """A module that a specification or a user names is not in the model."""

    def __init__(self, origin: str, asked: str, what: str, near: Sequence[str], mend: str) -> None:
        self.origin = origin
        super().__init__(
            _message(
                f"{origin}: the model has no module '{asked}'.",
                [("asked for", f"'{asked}' as {what}"), ("nearest", listed(near))],
                [mend],
            )
        )


class AmbiguousNameError(RenamingError):
    """A user's name fits several modules equally well."""

    def __init__(self, origin: str, name: str, found: Sequence[str]) -> None:
        super().__init__(
            _message(
                f"{origin}: '{name}' could be any of {len(found)} modules.",
                [("asked for", name), ("found", listed(found))],
                [f"Give the full path, for example '{found[0]}'."],
            )
        )


class AliasConflictError(RenamingError):
    """A new name already belongs to another module of the same parent."""

    def __init__(self, origin: str, parent: str, alias: str, target: str, taken_by: str, mend: str) -> None:
        super().__init__(
            _message(
                f"{origin}: '{alias}' under '{parent or 'the root'}' is taken.",
                [("asked for", f"'{alias}' for {target}"), ("but it is", taken_by)],
                [mend],
            )
        )


class UnknownNameError(RenamingError, KeyError):
    """A name that no module of the model answers to."""

    def __init__(self, name: str, fact: str, near: Sequence[str], mend: str = "") -> None:
        self.name = name
        super().__init__(_message(fact, [("asked for", name), ("nearest", listed(near))], [mend]))

    def __str__(self) -> str:
        # KeyError would show the repr of the message, all on one line.
        return str(self.args[0])


class DimensionError(RenamingError):
    """The configuration has no usable number where the specification or the user says to look."""

    def __init__(self, origin: str, dimension: str, fact: str, asked: str, near: Sequence[str], mend: str) -> None:
        self.dimension = dimension
        super().__init__(_message(f"{origin}: {fact}", [("asked for", asked), ("config has", listed(near))], [mend]))


class ValidationError(RenamingError):
    """The model gives other numbers than the specification promises."""

    def __init__(self, origin: str, promise: str, seen: str, family: str) -> None:
        served = f" of family '{family}'" if family else ""
        super().__init__(
            f"{origin}: the model does not keep what this line promises.\n"
            f"  promised: {promise}\n"
            f"  seen:     {seen}\n"
            f"Mend that line, or write a specification for this model{served} and open it with spec='my_model.yaml'. "
            "To open it unchecked: check_renaming=False."
        )


class UsageError(NnterpError):
    """A script asks for what cannot be."""


class LayerIndexError(UsageError, IndexError):
    """A layer that the model has not."""

    def __init__(self, name: str, asked: int, count: int) -> None:
        super().__init__(
            f"{name}[{asked}] was asked for, but the model has {count} layers.\n"
            f"Give 0 to {count - 1}, or -1 to -{count} to count from the last layer."
        )


class MissingPartError(UsageError):
    """A part that the layer has not."""

    def __init__(self, asked: str, why_not: str) -> None:
        super().__init__(
            f"{asked} was asked for, but this layer has no such part: {why_not}\n"
            "What every layer has are layers_input, mixers_output and layers_output."
        )


class CannotError(UsageError):
    """What cannot be had of this family of models; the family's specification says why."""

    def __init__(self, asked: str, reason: str, origin: str) -> None:
        super().__init__(f"{asked} cannot be had of this model: {reason}\n{origin} says so.")


class ShapeError(UsageError, ValueError):
    """A value of the wrong shape for its place."""

    def __init__(self, place: str, given: Any, wanted: Any) -> None:
        got = f"value of shape {tuple(given.shape)}" if hasattr(given, "shape") else type(given).__name__
        super().__init__(
            f"{place} was set to a {got}, but what stands there is of shape {tuple(wanted.shape)}.\n"
            "Give a tensor of that shape (expand it if every prompt or position is to get the same), or a number."
        )


class RoutingError(UsageError):
    """Experts that are not called with whole numbers and their weights."""

    def __init__(self, seen: Sequence[Any]) -> None:
        super().__init__(
            f"No routing is to be found among what the experts are called with, {listed(map(str, seen))}.\n"
            "A routing is whole numbers (tokens, k) and weights of the same shape. Name the operations of the router "
            "that make them in a specification of your own, as `layer.expert_indices` and `layer.expert_weights`."
        )


class StackShapeError(UsageError, ValueError):
    """A stack of contributions that does not fit the residual stream."""

    def __init__(self, given: Any, wanted: Sequence[int]) -> None:
        got = f"of shape {tuple(given.shape)}" if hasattr(given, "shape") else f"a {type(given).__name__}"
        super().__init__(
            f"The stack is {got}, but the residual stream of this pass is {tuple(wanted)}.\n"
            f"Give a tensor of shape (..., {', '.join(map(str, wanted))}): all prompts and positions, in any number of "
            "contributions. For some positions, give `stream` at these positions, too."
        )


class SteeringVectorError(UsageError, ValueError):
    """A vector that does not fit the residual stream."""

    def __init__(self, given: Any, wanted: Sequence[int]) -> None:
        got = f"of shape {tuple(given.shape)}" if hasattr(given, "shape") else f"a {type(given).__name__}"
        axes = "(hidden)" if len(wanted) == 1 else "(prompt, position, hidden)"
        is_list = getattr(given, "ndim", 0) == 2 and given.shape[-1] == wanted[-1]
        each = "\nIf each row is for a prompt, give vector[:, None]; for a position, vector[None]." if is_list else ""
        super().__init__(
            f"The steering vector is {got}, but the residual stream has {wanted[-1]} entries at each position.\n"
            f"What fits here is a tensor of shape {tuple(wanted)}, that is {axes}; a vector for all prompts and "
            f"positions is of shape ({wanted[-1]},).{each}"
        )


class PositionError(UsageError, IndexError):
    """A position or a prompt that is not there."""


class PromptPairError(UsageError, ValueError):
    """Prompts that are to be compared token by token differ in number, or in their number of tokens."""

    def __init__(self, fact: str) -> None:
        super().__init__(
            f"{fact}\n"
            "Values are put from one run into the same position of another, so all prompts need the same number of "
            "tokens, and each clean prompt its corrupted one. Put words in the place of others that are as many tokens."
        )


class TopCountError(UsageError, ValueError):
    """More of the most probable tokens were asked for than there are, or none."""

    def __init__(self, k: int, vocab_size: int) -> None:
        super().__init__(f"The {k} most probable tokens were asked for.\nGive a number from 1 to {vocab_size}.")
