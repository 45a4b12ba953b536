"""Calls with ``hook=True``: a client runs a module, and its values are handed over as if the model had run it."""

from __future__ import annotations

from typing import Any

import torch

from nnsight_core.asked import Asked, Client
from nnsight_core.events import Event, PastEvent
from nnsight_core.interleaver import Interleaver
from nnsight_core.sites import on_behalf_of, user_site
from nnsight_core.twin import Twin


def call_hooked(
    interleaver: Interleaver, client: Client, twin: Twin | None, module: torch.nn.Module, args: Any, kwargs: Any
) -> Any:
    """Let ``client`` run ``module`` as the model would: whoever waits for a value inside gets it, and the client itself
    may ask for it afterwards.
    """
    site = user_site()
    runs = module
    if twin is not None:
        # Values are known by the modules that the twins stand for.
        module, runs = twin.original(module), twin.of(module)

    def note(module: torch.nn.Module, kind: str, value: Any) -> None:
        client.given[module, kind] = PastEvent(module, kind, value, site, client.rows, interleaver.run_of_now)

    places = [(each, kind) for each in module.modules() for kind in ("input", "output")]
    kept = [(each, kind) for each, kind in places if client.keeps(each, kind)]
    for each, kind in kept:
        interleaver.observe(each, kind, (), note)
    try:
        with interleaver.calling(module, client.rows), on_behalf_of(None):
            return runs(*args, **kwargs)
    finally:
        for each, kind in kept:
            interleaver.ignore(each, kind, note)


def given_before(interleaver: Interleaver, client: Client, asked: Asked) -> Event | None:
    """What a call gave that ``client`` made itself, if that is what it asks for.

    Raises:
        OutOfOrderError: it is asked for to be set, and the call is over.
    """
    past = client.given.get((asked.module, asked.kind))
    # The calls that have numbers are the model's own.
    if past is None or asked.call is not None or not asked.is_answered_by(asked.module, asked.kind, past.step):
        return None
    past.label = asked.label
    if asked.setting:
        raise past.too_late(asked.site)
    return past
