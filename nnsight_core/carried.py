"""A tensor that a module makes early and uses late, shown and set in between: together with the call of an operation.

Attention makes its values before it multiplies queries by keys, and uses them after the softmax. Whoever wants to see
all three at one moment asks for the call of the product with the values as one more keyword argument. What is set there
takes the tensor's place in every operation of the module's from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from nnsight_core.errors import SourceError
from nnsight_core.operations import PREFIX
from nnsight_core.sites import user_site
from nnsight_core.values import map_tensors

#: Stands between the call and what makes the tensor, and is the name of the argument that the tensor is shown as.
MARK = "&"


@dataclass(frozen=True)
class Carried:
    """The call of an operation, and a tensor that was made before it.

    Args:
        at: the operation's name.
        makers: the operations that may make the tensor, of which the last that comes counts: each one's name, and the
            entry of its result, None for the whole.
    """

    at: str
    makers: tuple[tuple[str, int | None], ...]

    @property
    def kind(self) -> str:
        """What it is called among the values of a module.

        >>> Carried("matmul_0", (("split_0", 2), ("cat_1", None))).kind
        'source.matmul_0.input&split_0:2&cat_1'
        """
        made = (name if entry is None else f"{name}:{entry}" for name, entry in self.makers)
        return MARK.join([f"{PREFIX}{self.at}.input", *made])

    @classmethod
    def of(cls, kind: str) -> Carried | None:
        """What is called so.

        >>> Carried.of("source.matmul_0.input&split_0:2")
        Carried(at='matmul_0', makers=(('split_0', 2),))
        """
        call, *made = kind.split(MARK)
        if not made:
            return None
        pairs = (each.partition(":") for each in made)
        makers = tuple((name, int(entry) if entry else None) for name, _, entry in pairs)
        return cls(call.removeprefix(PREFIX).removesuffix(".input"), makers)

    def of_maker(self, kind: str, value: Any) -> torch.Tensor | None:
        """The tensor, if ``value`` of this kind is what an operation that makes it gives."""
        for name, entry in self.makers:
            if kind == f"{PREFIX}{name}.output":
                found = value if entry is None else value[entry]
                return found if isinstance(found, torch.Tensor) else None
        return None


class Carrier:
    """Carries tensors through one call of a module."""

    def __init__(self) -> None:
        self._held: dict[Carried, torch.Tensor] = {}
        #: What has been shown: the tensor, what takes its place, and whether an operation has taken it since.
        self._shown: dict[Carried, tuple[torch.Tensor, Any, bool]] = {}

    @property
    def is_on_its_way(self) -> bool:
        """Whether a tensor was shown, and the call of the module is not over."""
        return bool(self._shown)

    def made(self, wanted: Iterable[Carried], kind: str, value: Any) -> None:
        """An operation has given ``value``."""
        for each in wanted:
            tensor = each.of_maker(kind, value)
            if tensor is not None:
                self._held[each] = tensor

    def replaced(self, call: Any) -> Any:
        """The call of an operation with what was set in the place of the tensors that were shown."""
        for shown, (tensor, new, _) in list(self._shown.items()):
            if any(each is tensor for each in _tensors(call)):
                self._shown[shown] = tensor, new, True
                call = call if new is tensor else map_tensors(partial(_instead, tensor, new), call)
        return call

    def shown(
        self, wanted: Iterable[Carried], kind: str, call: Any, show: Callable[[str, Any], tuple[Any] | None]
    ) -> Any:
        """An operation is about to be called: ``show`` it with the tensors that are carried to it.

        Args:
            wanted: what is listened for.
            kind: which operation's input it is.
            call: its arguments and keyword arguments.
            show: gives a changed call in a one-tuple, or None.
        """
        for each in wanted:
            if kind == f"{PREFIX}{each.at}.input":
                held = self._held.get(each)
                if held is not None:
                    # At once, for whoever is shown it may be the last to look at anything.
                    self._shown[each] = held, held, False
                changed = show(each.kind, (call[0], {**call[1], MARK: held}))
                if changed is not None:
                    kwargs = dict(changed[0][1])
                    new = kwargs.pop(MARK)
                    call = (changed[0][0], kwargs)
                    if held is not None:
                        self._shown[each] = held, new, False
        return call

    def ended(self) -> None:
        """The call of the module is over.

        Raises:
            SourceError: no operation has taken a tensor that was shown.
        """
        shown, self._shown = self._shown, {}
        for each, (_, _, was_taken) in shown.items():
            if not was_taken:
                made = " or ".join(name for name, _ in each.makers)
                why = f"what {made} made was shown at {each.at}, and no operation took it afterwards."
                mend = "The module computes otherwise here than where its operations were looked up; see its .source."
                raise SourceError(each.at, why, mend, user_site())


def standing(place: tuple[torch.nn.Module, str, tuple[Any, ...]]) -> list[tuple[torch.nn.Module, str, tuple[Any, ...]]]:
    """Where a tensor stands in a run in which nothing is carried: of a module, the kind of a value of its, and the way
    to the tensor in that. Of several, the first that there is.
    """
    module, kind, path = place
    carried = Carried.of(kind)
    if carried is None:
        return [place]
    if path != (1, MARK):
        return [(module, f"{PREFIX}{carried.at}.input", path)]
    made = [(module, f"{PREFIX}{name}.output", () if at is None else (at,)) for name, at in carried.makers]
    return made[::-1]


def _instead(old: torch.Tensor, new: Any, tensor: torch.Tensor) -> Any:
    return new if tensor is old else tensor


def _tensors(call: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_tensors(found.append, call)
    return found
