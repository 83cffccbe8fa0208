"""Reading the fields of a JSON object, each of the right type and within its bounds, and none that is unknown."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from vita_jax.serving.problems import invalid, not_supported

_REQUIRED: Any = object()
_TYPES = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}


def read_json(data: bytes | str) -> dict[str, Any]:
    """A JSON object. Raises `Problem` for anything else."""
    try:
        values = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise invalid(f"the request is not JSON: {reason}", code="invalid_json") from None
    if not isinstance(values, dict):
        raise invalid(f"the request is {type_name(values)}; expected a JSON object", code="invalid_json")
    return values


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def type_name(value: Any) -> str:
    """What a JSON value is, in words."""
    return _TYPES.get(type(value), "a number")


def whole_text(value: str, param: str) -> str:
    """The text, if all its characters are whole. Raises `Problem` for half of a surrogate pair."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise invalid(f"{param} holds half a character (surrogate) at position {error.start}", param) from None
    return value


def _shown(value: int | float) -> str:
    return f"{value:.6g}" if isinstance(value, float) or abs(value) < 10**6 else "too large a number"


class Fields:
    """The fields of one object; every one that is read is taken out, and `finish` refuses what is left.

    A field that is null counts as absent, as in the API. Every method raises `Problem`.
    """

    def __init__(self, values: Any, where: str = "") -> None:
        """
        Args:
          values: what should be an object.
          where: its place in the request, such as "messages[0]".
        """
        if not isinstance(values, dict):
            raise invalid(f"{where or 'the request'} is {type_name(values)}; expected an object", where or None)
        self._values, self._where = dict(values), where

    def param(self, name: str) -> str:
        """The place of a field in the request."""
        return f"{self._where}.{name}" if self._where else name

    def take(self, name: str, default: Any = _REQUIRED) -> Any:
        """Whatever it is."""
        value = self._values.pop(name, None)
        if value is None:
            if default is _REQUIRED:
                raise invalid(f"{self.param(name)} is missing", self.param(name), "missing_required_parameter")
            return default
        return value

    def has(self, name: str) -> bool:
        """Whether it is there, be it null."""
        return name in self._values

    def text(self, name: str, default: Any = _REQUIRED, choices: Sequence[str] = ()) -> Any:
        """Text, one of the choices if there are some."""
        value = self.take(name, default)
        if value is default:
            return value
        if not isinstance(value, str):
            raise self._wrong(name, value, "text")
        if choices and value not in choices:
            raise invalid(
                f"{self.param(name)} {value[:80]!r} is not supported; use one of {', '.join(choices)}",
                self.param(name),
            )
        return whole_text(value, self.param(name))

    def number(self, name: str, least: float, most: float, default: Any = _REQUIRED) -> Any:
        """A number within bounds."""
        value = self.take(name, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(name, value, "a number")
        if isinstance(value, float) and not math.isfinite(value) or not least <= value <= most:
            raise invalid(f"{self.param(name)} is {_shown(value)}; expected {least:g} to {most:g}", self.param(name))
        return value

    def whole(self, name: str, least: int, most: int, default: Any = _REQUIRED) -> Any:
        """A whole number within bounds."""
        value = self.take(name, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, value, "a whole number")
        if not least <= value <= most:
            raise invalid(f"{self.param(name)} is {_shown(value)}; expected {least} to {most}", self.param(name))
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def items(self, name: str, default: Any = _REQUIRED) -> Any:
        """A list."""
        value = self.take(name, default)
        if value is not default and not isinstance(value, list):
            raise self._wrong(name, value, "a list")
        return value

    def nested(self, name: str) -> Fields:
        """An object; an empty one if it is absent."""
        return Fields(self.take(name, {}), self.param(name))

    def ignore(self, *names: str) -> None:
        """Takes out fields that change nothing here."""
        for name in names:
            self._values.pop(name, None)

    def only(self, name: str, *allowed: Any) -> None:
        """A field that the API has and that may only have values that change nothing."""
        value = self._values.pop(name, None)
        if value is not None and value not in allowed:
            raise not_supported(
                f"{self.param(name)} is not supported here"
                + (f" other than as {' or '.join(repr(a) for a in allowed)}" if allowed else "; leave it out"),
                self.param(name),
            )

    def finish(self) -> None:
        """Refuses every field that has not been read."""
        for name, value in self._values.items():
            if value is not None:
                shown = self.param(name[:80])
                raise not_supported(f"the field {shown} is unknown or not supported here", shown)

    def _wrong(self, name: str, value: Any, expected: str) -> Exception:
        return invalid(f"{self.param(name)} is {type_name(value)}; expected {expected}", self.param(name))
