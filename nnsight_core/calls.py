"""The calls of a module that a pass makes several times, by number."""

from __future__ import annotations

from typing import Any, Protocol


class Module(Protocol):
    """What is needed of the envoy of a module."""

    @property
    def path(self) -> str:
        """Its path from the root."""

    def read(self, kind: str, label: str | None = None, *, call: int | None = None) -> Any:
        """A value of the module, of one of its calls."""

    def write(self, kind: str, value: Any, label: str | None = None, call: int | None = None) -> None:
        """Let the model go on with another value."""

    def skip_call(self, value: Any, label: str, call: int | None = None) -> None:
        """Do not make the call."""

    def count_calls(self, label: str) -> None:
        """Count the calls of the module from here on."""


class Calls:
    """``module.calls``: takes the number of a call, counted from 0 in the pass, or in the generation step."""

    def __init__(self, envoy: Module) -> None:
        self._envoy = envoy

    def counted(self) -> Calls:
        """Itself, with the calls being counted from here on."""
        self._envoy.count_calls(f"{self._envoy.path or 'model'}.calls")
        return self

    def __getitem__(self, number: int) -> OneCall:
        if type(number) is not int or number < 0:
            raise ValueError(f"Calls are counted from 0, forwards, and asked for one by one; not {number!r}.")
        return OneCall(self._envoy, number)

    def __iter__(self) -> Any:
        # Nobody knows the last call before the pass is over, and then it is too late for what comes after it.
        raise TypeError("How many calls there are is not known beforehand. Ask by number: for i in range(n): calls[i]")


class OneCall:
    """One call of a module: what it takes and gives, read and set.

    Args:
        envoy: the module.
        number: the call, counted from 0.
    """

    def __init__(self, envoy: Module, number: int) -> None:
        object.__setattr__(self, "_envoy", envoy)
        object.__setattr__(self, "_number", number)

    def _label(self, what: str) -> str:
        return f"{self._envoy.path or 'model'}.calls[{self._number}].{what}"

    @property
    def output(self) -> Any:
        """What the call gives; set it to replace it."""
        return self._envoy.read("output", self._label("output"), call=self._number)

    @output.setter
    def output(self, value: Any) -> None:
        self._envoy.write("output", value, self._label("output"), call=self._number)

    @property
    def input(self) -> Any:
        """The call itself, as the ``.input`` of a module."""
        return self._envoy.read("input", self._label("input"), call=self._number)

    @input.setter
    def input(self, value: Any) -> None:
        self._envoy.write("input", value, self._label("input"), call=self._number)

    inputs = input

    def skip(self, value: Any) -> None:
        """Do not make the call; ``value`` is what it gives."""
        self._envoy.skip_call(value, self._label("skip(...)"), self._number)

    def __getattr__(self, name: str) -> Any:
        path = f"{self._envoy.path or 'model'}.{name}.calls[...]"
        raise AttributeError(
            f"A call has .output, .input, .inputs and .skip(value). Inside modules have calls too: {path}."
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if not hasattr(type(self), name):
            self.__getattr__(name)
        object.__setattr__(self, name, value)
