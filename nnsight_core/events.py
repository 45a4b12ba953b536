"""A value at the moment at which the model hands it over, and where a part of it stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nnsight_core.errors import OutOfOrderError
from nnsight_core.operations import Memory, is_call
from nnsight_core.rows import Rows
from nnsight_core.sites import Site, user_site
from nnsight_core.values import Pair


class Event:
    """One value at the moment at which the model hands it over: a module's call (``input``) or result (``output``).

    It is itself the origin of a proxy that shows all of it. Without a ``label`` it is called by its line, which is
    looked up only if an error is to show it.
    """

    __slots__ = (
        "call",
        "current",
        "is_copied",
        "kind",
        "label",
        "memory",
        "module",
        "replaced",
        "rows",
        "site",
        "value",
    )

    def __init__(
        self,
        module: Any,
        kind: str,
        label: str,
        value: Any,
        site: Site,
        rows: Rows | None = None,
        memory: Memory | None = None,
        call: Pair | None = None,
    ) -> None:
        self.module = module
        self.kind = kind
        self.label = label
        self.value = value
        self.site = site
        self.replaced = False
        #: The rows of the batch that it is cut to already; None if it is of all of them.
        self.rows = rows
        #: Of the value of an operation inside a module.
        self.memory = memory
        #: Of a module's result: the call that gave it, as long as it is under way.
        self.call = call
        #: The model may write into the value later, and cannot do so in a copy: clients get copies.
        self.is_copied = False
        #: The model waits at this event; once it has gone on, nothing can be changed here any more.
        self.current = True

    @property
    def is_call(self) -> bool:
        """Whether it is what something is called with, and not what it gives."""
        return is_call(self.kind)

    @property
    def event(self) -> Event:
        """Itself: of which event it is the origin."""
        return self

    def read(self) -> Any:
        """The value as it stands now."""
        return self.value

    def write(self, value: Any) -> None:
        """Let the model go on with ``value`` in place of its own."""
        if self.memory == "in place" and getattr(value, "shape", None) != self.value.shape:
            given = f"shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"{value!r:.80}"
            raise ValueError(
                f"{self.label} is a tensor that was changed in place, and what it is set to is written into it:\n"
                f"that takes a tensor of its own shape, {tuple(self.value.shape)}, and this is {given}."
            )
        self.value = value
        self.replaced = True

    def origin(self, rows: Rows | None = None) -> Origin | Event:
        """The value as a place to read and write: all of it, or the rows of one input of the batch."""
        if rows is None:
            return self
        place = (self.module, self.kind, ())
        return Origin(
            self, lambda: rows.take(self.value, place), lambda part: self.write(rows.put(self.value, part, place))
        )

    def check_writable(self) -> None:
        """Raises:
        OutOfOrderError: the model has gone on.
        """
        if not self.current:
            label = self.label or self.site.source or "a gradient"
            raise OutOfOrderError(label, user_site(), label, self.site, setting=True)


class PastEvent(Event):
    """A value of a call that a script has made itself: it can be read, and not changed any more."""

    __slots__ = ("step",)

    def __init__(self, module: Any, kind: str, value: Any, site: Site, rows: Rows | None, step: int | None) -> None:
        super().__init__(module, kind, kind, value, site, rows)
        self.current = False
        #: The run of the model in which the call was made.
        self.step = step

    def check_writable(self) -> None:
        """Raises:
        OutOfOrderError: always.
        """
        raise self.too_late(user_site())

    def too_late(self, site: Site) -> OutOfOrderError:
        """What is wrong with setting it at the line ``site``."""
        mend = "The call with hook=True is over: make it in an edit or in another invoke, and set the value here."
        return OutOfOrderError(self.label, site, "the call", self.site, setting=True, mend=mend)


class Origin:
    """Which part of which event a proxy shows.

    Args:
        event: the event.
        read: what stands at that part now.
        write: let the model go on with something else there.
    """

    __slots__ = ("event", "read", "write")

    def __init__(self, event: Event, read: Callable[[], Any], write: Callable[[Any], None]) -> None:
        self.event = event
        self.read = read
        self.write = write
