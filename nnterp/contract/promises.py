"""The promises: each is a question, and a function that raises `Broken` with what it saw where the answer is no."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nnsight_core.copies import hooked
from nnsight_core.input_errors import InputError
from nnterp.accessors import Place, logits_of, read, write
from nnterp.contract.subject import ACCESSES, Broken, CannotTell, Subject, difference

__all__ = ["Promise", "PROMISES"]

NEW_TOKENS = 3


@dataclass(frozen=True)
class Promise:
    """One promise.

    Args:
        name: what it is called in tables and by `--json`.
        question: what is promised, in half a sentence.
        check: raises `Broken` or `CannotTell`.
        cannot: the names under `cannot` of a specification that excuse it.
    """

    name: str
    question: str
    check: Callable[[Subject], None]
    cannot: tuple[str, ...] = ()


def _by_numbers(*kinds: str) -> Callable[[Subject], None]:
    """The rows of the validation that belong to some of its kinds."""

    def check(subject: Subject) -> None:
        for row in subject.model._promised():
            wrong = row.disagreement() if row.kind in kinds else None
            if wrong is not None:
                raise Broken(f"{row.promise}: {wrong} ({row.origin})")

    return check


def _reads(subject: Subject) -> None:
    places = subject.places()
    expected = subject.seen(places)
    for group in _in_one_order(places):
        with subject.model.trace(subject.ids):
            kept = {name: read(subject.model, places[name]).save() for name in group}
        for name, proxy in kept.items():
            if not subject.same(proxy, expected[name]):
                raise Broken(f"{name}: {difference(proxy, expected[name])}")


def _in_one_order(places: dict[str, Place]) -> Iterator[list[str]]:
    """Names that one trace can ask for in this order: of one access, layer by layer."""
    for _, names in itertools.groupby(sorted(places, key=lambda name: name.partition("[")[0]), _access):
        yield list(names)


def _access(name: str) -> str:
    return name.partition("[")[0]


def _writing_back(subject: Subject) -> None:
    plain = logits_of(subject.run())
    places = subject.places()
    for group in _in_one_order(places):
        with subject.model.trace(subject.ids):
            for name in group:
                write(subject.model, places[name], read(subject.model, places[name]).clone())
            logits = subject.model.logits.save()
        if not subject.same(logits, plain):
            raise Broken(f"after {group[0].partition('[')[0]} was set to what was read, {difference(logits, plain)}")


def _writes(subject: Subject) -> None:
    places = subject.places()
    for name, place in places.items():
        expected = subject.logits_with({name: _changed}, places)
        with subject.model.trace(subject.ids):
            write(subject.model, place, _changed(read(subject.model, place)))
            logits = subject.model.logits.save()
        if not subject.same(logits, expected):
            raise Broken(f"with {name} set, {difference(logits, expected)}")


def _changed(value: Any) -> Any:
    return value * 1.25 + 0.5


def _steer(subject: Subject) -> None:
    model, layer = subject.model, subject.chosen[len(subject.chosen) // 2]
    vector = torch.linspace(-1, 1, model.hidden_size, device=subject.ids.device)
    name = f"layers_output[{layer}]"
    expected = subject.logits_with({name: lambda value: value + (2 * vector).to(value.dtype)}, subject.places("layers"))
    with model.trace(subject.ids):
        model.steer(layer, vector, factor=2)
        logits = model.logits.save()
    if not subject.close(logits, expected):
        raise Broken(f"steered at layer {layer}, {difference(logits, expected)}")


def _skip(subject: Subject) -> None:
    model, layer = subject.model, subject.chosen[len(subject.chosen) // 2]
    places = subject.places("layers")
    given = subject.seen(places)[f"layers_input[{layer}]"]
    expected = subject.logits_with({f"layers_output[{layer}]": lambda value: given}, places)
    with model.trace(subject.ids):
        model.skip_layer(layer)
        logits = model.logits.save()
    if not subject.same(logits, expected):
        raise Broken(f"without layer {layer}, {difference(logits, expected)}")


def _generate(subject: Subject) -> None:
    model, module = subject.model, subject.module
    if not hasattr(module, "generate"):
        raise CannotTell("the model has no method `generate`.")
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    more = {"return_dict_in_generate": True, "output_logits": True}
    mask = torch.ones_like(subject.ids)
    plain: Any = module.generate(input_ids=subject.ids, attention_mask=mask, **options, **more)  # type: ignore[operator]
    with model.generate(subject.ids, **options) as tracer:
        steps = [model.logits[:, -1].save() for _ in tracer.iter[:]]
        tokens = model.generator.output.save()
    if not torch.equal(tokens, plain.sequences):
        raise Broken(f"watched, it generates {tokens[0].tolist()}, and else {plain.sequences[0].tolist()}")
    for index, (seen, expected) in enumerate(zip(steps, plain.logits, strict=True)):
        if not subject.same(seen.float(), expected.float()):
            raise Broken(f"at step {index}, {difference(seen, expected)}")


def _cache(subject: Subject) -> None:
    places = {name: place for name, place in subject.places("layers").items() if name.startswith("layers_output")}
    expected = subject.seen(places)
    with subject.model.trace(subject.ids) as tracer:
        cache = tracer.cache().save()
    for name, place in places.items():
        index = name.partition("[")[2].rstrip("]")
        for key in (place.path, f"layers.{index}"):
            value = place.shape.view(place.get(cache[key].output))
            if not subject.same(value, expected[name]):
                raise Broken(f"cache['{key}']: {difference(value, expected[name])}")


def _gradients(subject: Subject) -> None:
    if not any(parameter.requires_grad for parameter in subject.module.parameters()):
        raise CannotTell("no parameter of the model takes a gradient.")
    model, places = subject.model, subject.places("layers")
    for index in subject.chosen:
        name, kept = f"layers_output[{index}]", dict[str, torch.Tensor]()

        def with_leaf(value: torch.Tensor, kept: dict[str, torch.Tensor] = kept) -> torch.Tensor:
            kept["leaf"] = torch.zeros_like(value, requires_grad=True)
            return value + kept["leaf"]

        with torch.enable_grad():
            logits = subject.logits_with({name: with_leaf}, places)
            (expected,) = torch.autograd.grad(logits.square().sum(), kept["leaf"])
            with model.trace(subject.ids):
                gradient = read(model, places[name]).grad.save()
                model.logits.square().sum().backward()
        subject.module.zero_grad()
        if not subject.close(gradient, expected):
            raise Broken(f"at {name}, {difference(gradient, expected)}")


def _padding(subject: Subject) -> None:
    long, short = subject.ids[0].tolist(), subject.ids[1, 2:].tolist()
    alone = [logits_of(subject.model.trace([each], trace=False))[0] for each in (long, short)]
    try:
        together = logits_of(subject.model.trace([long, short], trace=False))
    except InputError as error:
        raise CannotTell(str(error).partition("\n")[0]) from error
    for row, expected in zip(together, alone, strict=True):
        own = row[len(row) - len(expected) :]
        if not subject.close(own, expected):
            raise Broken(f"beside a longer prompt, {difference(own, expected)}")


def _nothing_left(subject: Subject) -> None:
    left = [path for path in hooked(subject.module) if path not in subject.hooked_before]
    if left:
        raise Broken(f"hooks or another forward are left on {left[0] or 'the model'}")


VALUES = dict.fromkeys(name.partition("_")[0] for name in ACCESSES)

#: Every promise, in the order in which they are asked; what a later one needs, an earlier one asks about.
PROMISES: tuple[Promise, ...] = (
    Promise("shapes", "values have the shapes that they should", _by_numbers("token_embeddings", "logits", *VALUES)),
    Promise("chain", "each layer's output is the next one's input", _by_numbers("chain"), ("chain",)),
    Promise("sum", "a layer's parts add up to what it changes", _by_numbers("contributions"), ("contributions",)),
    Promise("logits", "the unembedding makes the logits", _by_numbers("project_on_vocab"), ("project_on_vocab",)),
    Promise("reads", "every name reads what a hook reads, bit for bit", _reads),
    Promise("writing back", "setting a value to itself changes nothing", _writing_back),
    Promise("writes", "what is set reaches the logits as a hook's change does", _writes),
    Promise("steer", "steering adds to the residual stream", _steer, ("steer",)),
    Promise("skip", "a layer can be skipped", _skip, ("skip",)),
    Promise("generate", "generation is watched without being changed", _generate, ("generate",)),
    Promise("cache", "the cache has every layer under both of its names", _cache, ("cache",)),
    Promise("gradients", "gradients are those of autograd", _gradients, ("gradients",)),
    Promise("padding", "a prompt gives the same in a padded batch", _padding, ("padding",)),
    Promise("nothing left", "afterwards the model is as it was", _nothing_left),
)
