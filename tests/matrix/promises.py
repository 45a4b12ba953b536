"""What is promised of every family: one function for each promise, which raises where it does not hold.

    PROMISES["steer"](Case("llama"))

Each compares what a user of the standard names gets with what plain hooks on the untouched model give, bit for bit
where the two do the same sum. The names are those of `nnterp.spec.PROMISES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nnterp.additions import Addition
from nnterp.errors import MissingPartError
from nnterp.multipliers import times
from tests import leaks
from tests.matrix import attention, experts, heads, hooks, norms, rotations, states
from tests.matrix.models import Case

#: How these models' tensors look in the usual order, (batch, position, hidden) or (batch, position, stream, hidden).
VIEWS: dict[tuple[str, str], Callable[[torch.Tensor], torch.Tensor]] = {
    ("gemma3n_text", "layers"): lambda tensor: tensor.movedim(0, 2),
    ("qwen4_exp", "layers"): lambda tensor: tensor.unflatten(-1, (4, 64)),
    ("qwen4_exp_text", "layers"): lambda tensor: tensor.unflatten(-1, (4, 64)),
    **{("xlnet", each): lambda tensor: tensor.transpose(0, 1) for each in ("layers", "parts", "embeddings")},
    **{("cpmant", each): lambda tensor: tensor[:, 32:] for each in ("layers", "parts", "embeddings")},
}


def view(case: Case, what: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as accessors show it, on the same memory."""
    seen = VIEWS.get((case.model_type, what), lambda each: each)(tensor)
    return seen.view(*case.ids.shape, -1) if seen.ndim == 2 else seen


def noise(like: torch.Tensor, seed: int = 7) -> torch.Tensor:
    """Something to add, the same every time."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)) * 0.5


def same(seen: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Bit for bit."""
    assert seen.shape == expected.shape, f"{what}: {tuple(seen.shape)} where {tuple(expected.shape)} is right"
    assert torch.equal(seen, expected), f"{what}: off by {float((seen - expected).abs().max()):.3g}"


def close(seen: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Up to rounding."""
    assert seen.shape == expected.shape, f"{what}: {tuple(seen.shape)} where {tuple(expected.shape)} is right"
    error = float((seen - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    assert error < 1e-4, f"{what}: off by {error:.3g} of its size"


def changes(seen: torch.Tensor, case: Case, what: str) -> None:
    """A change that changes nothing would prove nothing."""
    assert not torch.equal(seen, case.logits), f"{what}: nothing came of it"


def values_of(accessor: str) -> Callable[[Case], None]:
    """``layers_input`` and ``layers_output``, and their kin: read, written, and written back."""

    def check(case: Case) -> None:
        places = {
            (index, kind): place
            for index in range(case.num_layers)
            for kind in ("input", "output")
            if (place := case.place(accessor, index, kind))
        }
        _missing(case, accessor, [index for index in range(case.num_layers) if (index, "input") not in places])
        _read(case, accessor, places)
        for (index, kind), place in places.items():
            _write(case, accessor, index, kind, place)
        values = getattr(case.model, f"{accessor}_output")
        with torch.no_grad(), case.model.trace(case.ids):
            for index, kind in places:
                if kind == "output":
                    values[index] = values[index]
            back = case.model.logits.save()
        same(back, case.logits, f"writing back {accessor}_output")

    return check


def _what(accessor: str) -> str:
    return "layers" if accessor == "layers" else "parts"


def _missing(case: Case, accessor: str, layers: list[int]) -> None:
    for index in layers:
        with torch.no_grad(), case.model.trace(case.ids) as tracer:
            try:
                getattr(case.model, f"{accessor}_output")[index]
            except MissingPartError as error:
                assert f"{accessor}_output[{index}]" in str(error)
                if accessor == "attentions":
                    assert f"mixers_output[{index}]" in str(error) or case.spec.absent.get("attention"), str(error)
            else:
                raise AssertionError(f"{accessor}_output[{index}] can be read, where the layer has no such part")
            tracer.stop()


def _read(case: Case, accessor: str, places: dict[tuple[int, str], hooks.Place]) -> None:
    truth = hooks.read(case.module, places.values(), case.ids)
    found: dict[tuple[int, str], Any] = {}
    with torch.no_grad(), case.model.trace(case.ids):
        for index, kind in places:
            found[index, kind] = getattr(case.model, f"{accessor}_{kind}")[index].save()
    for (index, kind), place in places.items():
        seen = found[index, kind].value
        same(seen, view(case, _what(accessor), truth[place]), f"{accessor}_{kind}[{index}] is not that of {place[0]}")


def _write(case: Case, accessor: str, index: int, kind: str, place: hooks.Place) -> None:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        part = view(case, _what(accessor), tensor)
        part += noise(part)
        return tensor

    truth = hooks.changed_logits(case.module, place, change, case.ids)
    values = getattr(case.model, f"{accessor}_{kind}")
    with torch.no_grad(), case.model.trace(case.ids):
        values[index] += noise(values[index])
        seen = case.model.logits.save()
    same(seen, truth, f"logits after a change of {accessor}_{kind}[{index}]")
    changes(seen, case, f"{accessor}_{kind}[{index}]")


def token_embeddings(case: Case) -> None:
    """What the embedding gives, read and written."""
    place = (case.facts["embedding"], "output")
    truth = view(case, "embeddings", hooks.read(case.module, [place], case.ids)[place])

    def change(tensor: torch.Tensor) -> torch.Tensor:
        part = view(case, "embeddings", tensor)
        part += noise(part)
        return tensor

    with torch.no_grad(), case.model.trace(case.ids):
        seen = case.model.token_embeddings.save()
    same(seen, truth, "token_embeddings")
    with torch.no_grad(), case.model.trace(case.ids):
        case.model.token_embeddings += noise(truth)
        seen = case.model.logits.save()
    same(seen, hooks.changed_logits(case.module, place, change, case.ids), "logits after a change of token_embeddings")
    changes(seen, case, "token_embeddings")


def logits(case: Case) -> None:
    """The model's logits, read and written, and the probabilities that they make."""
    with torch.no_grad(), case.model.trace(case.ids):
        seen = case.model.logits.save()
        probabilities = case.model.next_token_probs.save()
    same(seen, case.logits, "logits")
    close(probabilities, case.logits[:, -1].softmax(-1), "next_token_probs")
    assert seen.shape == (*case.ids.shape, case.model.vocab_size)
    with torch.no_grad(), case.model.trace(case.ids) as tracer:
        case.model.logits = case.model.logits * 2
        result = tracer.result.save()
    same(hooks.logits_of(result.value), case.logits * 2, "logits that were set")


def chain(case: Case) -> None:
    """Each layer's output is the next one's input."""
    places = [case.layer(index, kind) for index in range(case.num_layers) for kind in ("input", "output")]
    found = hooks.read(case.module, places, case.ids)
    for index in range(case.num_layers - 1):
        seen, expected = found[case.layer(index + 1, "input")], found[case.layer(index)]
        same(seen, expected, f"layers_output[{index}] is not layers_input[{index + 1}]")


def contributions(case: Case) -> None:
    """What the parts of a layer contribute makes its output of its input, as the specification says."""
    for layer in case.model._plan.layers:
        places = [(layer.input, "input"), (layer.output, "output")]
        for part in layer.parts:
            given = (part.contribution, part.sum_norm, part.stream)
            places += [(path, "output") for path in given if path]
        found = hooks.read(case.module, places, case.ids)
        value, holder = found[layer.input, "input"], case.module.get_submodule(layer.path)
        for part in layer.parts:
            addition = Addition(part, case.module.config, holder)
            if part.stream:
                value = case.module.get_submodule(part.stream)(value).detach()
            added = found[part.contribution, "output"].reshape(value.shape)
            value = (addition.stream(value) + addition.contribution(added)).detach()
            if part.sum_norm:
                value = case.module.get_submodule(part.sum_norm)(value).detach()
        value = times(layer.multiplier, value, case.module.config, holder)
        close(found[layer.output, "output"], value, f"the sum of {layer.path}")


def project_on_vocab(case: Case) -> None:
    """The last layer's output gives the logits."""
    with torch.no_grad(), case.model.trace(case.ids):
        inside = case.model.project_on_vocab(case.model.layers_output[-1]).save()
        last = case.model.layers_output[-1].save()
    close(inside, case.logits, "project_on_vocab in a trace")
    with torch.no_grad():
        close(case.model.project_on_vocab(last.value), case.logits, "project_on_vocab after it")


def steer(case: Case) -> None:
    """A vector added to a layer's output, everywhere or at some positions."""
    vector = noise(torch.empty(case.model.hidden_size))
    index = case.num_layers // 2
    for positions in (None, [-1, 3]):

        def change(tensor: torch.Tensor, positions: Any = positions) -> torch.Tensor:
            part = view(case, "layers", tensor)
            if positions is None:
                part += 1.5 * vector
            else:
                part[:, positions] += 1.5 * vector
            return tensor

        truth = hooks.changed_logits(case.module, case.layer(index), change, case.ids)
        with torch.no_grad(), case.model.trace(case.ids):
            case.model.steer(index, vector, factor=1.5, positions=positions)
            seen = case.model.logits.save()
        same(seen, truth, f"logits after steering at {positions}")
        changes(seen, case, "steering")


def skip(case: Case) -> None:
    """A layer that changes nothing."""
    index = case.num_layers // 2
    came: list[torch.Tensor] = []
    with hooks.hooked(case.module, case.layer(index, "input"), lambda value: came.append(hooks.first(value).clone())):
        truth = hooks.changed_logits(case.module, case.layer(index), lambda tensor: came[0], case.ids)
    with torch.no_grad(), case.model.trace(case.ids):
        case.model.skip_layer(index)
        seen = case.model.logits.save()
    same(seen, truth, f"logits without layer {index}")
    changes(seen, case, "skipping")


def generate(case: Case) -> None:
    """Steering at every step of a generation."""
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    ids, index = case.ids[:1], case.num_layers // 2
    mask = torch.ones_like(ids)
    module: Any = case.module
    plain = module.generate(ids, attention_mask=mask, **options)

    def change(tensor: torch.Tensor) -> torch.Tensor:
        part = view(case, "layers", tensor)
        part += 2 * noise(torch.empty(part.shape[-1]))
        return tensor

    place = case.layer(index)
    with hooks.hooked(module, place, lambda value: hooks.with_first(value, change(hooks.first(value).clone())), True):
        truth = module.generate(ids, attention_mask=mask, **options)
    with case.model.generate(ids, **options) as tracer:
        for _ in tracer.iter[:]:
            hidden = case.model.layers_output[index]
            case.model.layers_output[index] = hidden + 2 * noise(torch.empty(hidden.shape[-1]))
        seen = case.model.generator.output.save()
    assert seen.tolist() == truth.tolist(), f"tokens {seen.tolist()} where hooks give {truth.tolist()}"
    with case.model.generate(ids, **options):
        seen = case.model.generator.output.save()
    assert seen.tolist() == plain.tolist(), "a generation that nobody changes is not the plain one"


def cache(case: Case) -> None:
    """A cache that answers to the model's own names and to the standard ones."""
    index = case.num_layers // 2
    path = case.layer(index)[0]
    truth = hooks.read(case.module, [case.layer(index)], case.ids)[case.layer(index)]
    with torch.no_grad(), case.model.trace(case.ids) as tracer:
        kept = tracer.cache(modules=[case.model.get(path)])
    same(hooks.first(kept[path].output), truth, "the cache")
    for name in (f"layers.{index}", f"model.layers.{index}") if case.facts["layers"] else ():
        assert kept[name] is kept[path], f"the cache does not know {name}"


def gradients(case: Case) -> None:
    """The gradient of a layer's output."""
    index = case.num_layers // 2
    held: list[torch.Tensor] = []

    def hold(value: Any) -> None:
        tensor = hooks.first(value)
        tensor.retain_grad()
        held.append(tensor)

    with hooks.hooked(case.module, case.layer(index), hold):
        hooks.logits_of(case.module(input_ids=case.ids)).square().sum().backward()
    case.module.zero_grad(set_to_none=True)
    assert held[0].grad is not None
    with case.model.trace(case.ids):
        hidden = case.model.layers_output[index]
        gradient = hidden.grad.save()
        case.model.logits.square().sum().backward()
    case.module.zero_grad(set_to_none=True)
    close(gradient, view(case, "layers", held[0].grad), "the gradient")
    assert float(gradient.abs().max()) > 0


def padding(case: Case) -> None:
    """A batch of prompts of several lengths gives what each of them gives alone."""
    index = case.num_layers // 2
    prompts = [case.ids[0].tolist(), case.ids[1, :7].tolist()]
    with torch.no_grad(), case.model.trace(prompts):
        hidden = case.model.layers_output[index].save()
        together = case.model.logits.save()
    for row, prompt in enumerate(prompts):
        alone = torch.tensor([prompt])
        close(together[row, -len(prompt) :], hooks.logits(case.module, alone)[0], f"logits of prompt {row}")
        place = case.layer(index)
        truth = hooks.read(case.module, [place], alone)[place]
        close(hidden[row, -len(prompt) :], view(case, "layers", truth)[0], f"layers_output of prompt {row}")


def invokes(case: Case) -> None:
    """Two inputs in one pass: each sees and changes what is its own."""
    index = case.num_layers // 2
    place, rows = case.layer(index), [case.ids[:1], case.ids[1:]]

    def change(tensor: torch.Tensor) -> torch.Tensor:
        part = view(case, "layers", tensor)
        part += noise(part)
        return tensor

    truth = view(case, "layers", hooks.read(case.module, [place], rows[0])[place])
    added = noise(truth)
    with torch.no_grad(), case.model.trace() as tracer:
        with tracer.invoke(rows[0]):
            hidden = case.model.layers_output[index].save()
            first = case.model.logits.save()
        with tracer.invoke(rows[1]):
            case.model.layers_output[index] += added
            second = case.model.logits.save()
    assert tracer.forward_passes == 1
    close(hidden, truth, "layers_output in an invoke")
    close(first, hooks.logits(case.module, rows[0]), "logits in an invoke")
    close(second, hooks.changed_logits(case.module, place, change, rows[1]), "logits in an invoke that changes a layer")


def restored(case: Case) -> None:
    """The plain model is what it was, to the bit, and nothing hangs on it."""
    assert not leaks.hooks_on([case.module])
    for name, tensor in case.module.state_dict().items():
        same(tensor, case.state[name], f"the weight {name}")
    same(hooks.logits(case.module, case.ids), case.logits, "the logits afterwards")


PROMISES: dict[str, Callable[[Case], None]] = {
    **{name: values_of(name) for name in ("layers", "attentions", "mlps", "mixers")},
    "token_embeddings": token_embeddings,
    "logits": logits,
    "chain": chain,
    "contributions": contributions,
    "project_on_vocab": project_on_vocab,
    "steer": steer,
    "skip": skip,
    "generate": generate,
    "cache": cache,
    "gradients": gradients,
    "padding": padding,
    "invokes": invokes,
    **norms.PROMISES,
    **heads.PROMISES,
    **rotations.PROMISES,
    **experts.PROMISES,
    **states.PROMISES,
    **attention.PROMISES,
}
