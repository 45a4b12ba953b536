"""Where the values of one layer's attention stand in what the model computes, whatever computes it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from nnsight_core.envoy import Envoy
from nnterp.accessors import Place
from nnterp.rename_plan import join


@dataclass(frozen=True)
class Attention:
    """The attention of one layer, which is to be opened.

    Args:
        envoy: its module.
        path: the module's full path.
        groups: how many heads of queries there are to each head of keys.
        heads: how many heads of queries there are; 0 if nobody knows.
    """

    envoy: Envoy
    path: str
    groups: int
    heads: int


@dataclass(frozen=True)
class AttentionPlaces:
    """The values in the order in which a layer makes them: for each its place, or the reason why it has none.

    What stands at a place, or what its ``get`` makes of that, has the shape that the accessor promises; the labels are
    the accessors' to give.

    Args:
        queries: (batch, head, position, head_dim), as they are multiplied with keys.
        keys: likewise, with a head for each of ``num_kv_heads``.
        values: likewise.
        scores: (batch, head, query, key), what the softmax takes.
        probabilities: (batch, head, query, key), what the values are multiplied by.
        heads_output: (batch, head, position, head_dim), what comes of that.
    """

    queries: Place | str
    keys: Place | str
    values: Place | str
    scores: Place | str
    probabilities: Place | str
    heads_output: Place | str

    @property
    def counted(self) -> set[str]:
        """The modules whose operations are meant."""
        places = (getattr(self, each.name) for each in fields(self))
        return {each.path for each in places if isinstance(each, Place) and each.kind.startswith("source.")}

    def below(self, path: str) -> AttentionPlaces:
        """The same places, with paths that begin with ``path``."""
        moved: dict[str, Place | str] = {}
        for each in fields(self):
            place = getattr(self, each.name)
            if isinstance(place, Place):
                place = replace(place, path=join(path, place.path) if place.path else path)
            moved[each.name] = place
        return AttentionPlaces(**moved)

    @classmethod
    def closed(cls, why: str) -> AttentionPlaces:
        """None of them, for one reason.

        >>> AttentionPlaces.closed("it is compiled.").keys
        'it is compiled.'
        """
        return cls(**{each.name: why for each in fields(cls)})
