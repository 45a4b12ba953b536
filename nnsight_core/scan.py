"""A trace for the shapes alone: nothing is computed, no weights are needed, and the model is left as it is."""

from __future__ import annotations

from nnsight_core.shapes import ShapesOnly
from nnsight_core.tracer import Tracer
from nnsight_core.twin import Twin


class Scan(Tracer):
    """What ``with model.scan(...) as tracer`` gives: a trace of the model's twin, whose values are fake tensors.

    Raises:
        ScanError: the script, or the model, asks for numbers.
    """

    def _make_ready(self) -> None:
        tree = self._model._tree
        self._twin = Twin(tree.root, ShapesOnly.here(), tree.home, with_hooks=True)
