"""What stands in a tracer for the model once its block is over: the tracer may live on, and keeps nothing alive."""

from __future__ import annotations

from typing import Any

from nnsight_core.errors import NoTraceError
from nnsight_core.sites import user_site


class _Gone:
    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise NoTraceError(f"model.{name}", user_site())


#: In the place of envoys, and of all else that holds the model.
GONE: Any = _Gone()
