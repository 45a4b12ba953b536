"""``with model.session():`` traces that belong together: values of one may be used in the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

from nnsight_core.arguments import apply
from nnsight_core.current import open_session, session_closed, session_opened
from nnsight_core.errors import SessionError
from nnsight_core.old_spellings import ELSEWHERE, explain
from nnsight_core.scope import Scope
from nnsight_core.sites import user_frame

T = TypeVar("T")


class Session:
    """What ``with model.session() as session`` gives.

    Values of the traces inside need no saving to be used in later ones; those that were not saved are let go when the
    session ends.
    """

    def __init__(self) -> None:
        self._scopes: list[Scope] = []
        self._limit = 64
        self._is_over = False

    def __enter__(self) -> Session:
        if self._is_over:
            raise SessionError("This session is over. Call .session() again for another one.")
        if open_session() is not None:
            raise SessionError("A session is open here already.")
        session_opened(self, user_frame())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        explain(error)
        self._is_over = True
        session_closed(self)
        scopes, self._scopes = self._scopes, []
        for scope in scopes:
            scope.release()

    def apply(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call ``function`` on the values of proxies, as :func:`nnsight_core.apply`."""
        return apply(function, *args, **kwargs)

    def iter(self, values: Iterable[T]) -> _Loop[T]:
        """The ``values`` themselves, for scripts that write their loops as ``for each in session.iter(values)``."""
        return _Loop(values)

    def __getattr__(self, name: str) -> Any:
        hint = ELSEWHERE.get(name, "")
        raise AttributeError(f"A session has no {name!r}." + (f"\n{hint}" if hint else ""))

    def keep(self, scope: Scope) -> None:
        """Let the values of a trace that is over live as long as the session does."""
        if self._is_over:
            scope.release()
            return
        self._scopes.append(scope)
        if len(self._scopes) > self._limit:
            self._scopes = [each for each in self._scopes if each.has_values()]
            self._limit = max(64, 2 * len(self._scopes))


class _Loop(Generic[T]):
    def __init__(self, values: Iterable[T]) -> None:
        self._values = values

    def __iter__(self) -> Iterator[T]:
        return iter(self._values)

    def __enter__(self) -> T:
        raise SessionError("A block is run once, so it cannot be a loop. Write: for each in values: ...")

    def __exit__(self, *exception: object) -> None:
        return None
