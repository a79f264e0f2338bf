"""Known fields of a JSON body, strictly typed: each getter returns a valid value or names the field at fault. Pure.

Unknown fields are ignored, `null` counts as left out. orjson already refuses what is not JSON: invalid UTF-8, lone
surrogates, NaN, more than 1024 levels, trailing bytes; whole numbers beyond 64 bits arrive as floats.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, Final

import orjson

from bus.chat_request import kind_of
from gateway.errors import ApiError

SHOWN_MAX: Final = 40  # of a bad value, in an error message


def parse_json(raw: bytes) -> Any:
    """Raises ApiError `invalid_json`, with the place of the fault."""
    if not raw.strip():
        raise ApiError("invalid_json", "the request body is empty; send a JSON body")
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ApiError("invalid_json", f"the request body is not valid JSON: {error}") from error


def parse_object(raw: bytes) -> dict[str, Any]:
    value = parse_json(raw)
    if not isinstance(value, dict):
        raise ApiError("invalid_request", f"the request body must be a JSON object, not {kind_of(value)}")
    return value


def invalid(field: str, must: str, value: object = None) -> ApiError:
    """`field` must ...; the value is shown where it is short, so that the sender recognises it."""
    got = ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        got = f", not {str(value)[:SHOWN_MAX]}"
    elif isinstance(value, str) and must.startswith("be "):
        got = f", not {value[:SHOWN_MAX]!r}"
    elif value is not None:
        got = f", not {kind_of(value)}"
    return ApiError("invalid_request", f"`{field}` must {must}{got}", param=field)


def missing(field: str) -> ApiError:
    return ApiError("invalid_request", f"`{field}` is required", param=field)


class Fields:
    """The fields of one object. `path` is what stands before a name in messages: `capabilities.`."""

    def __init__(self, values: Mapping[str, Any], path: str = "") -> None:
        self._values = values
        self._path = path

    def name(self, field: str) -> str:
        return self._path + field

    def raw(self, field: str) -> Any:
        return self._values.get(field)

    def text(self, field: str, *, longest: int) -> str | None:
        """Text without NUL, which no tokenizer, terminal or C library treats as a character."""
        value = self.raw(field)
        if value is None:
            return None
        if not isinstance(value, str):
            raise invalid(self.name(field), "be a string", value)
        if not value:
            raise invalid(self.name(field), "not be empty")
        if len(value) > longest:
            raise invalid(self.name(field), f"have at most {longest} characters; it has {len(value)}")
        if "\x00" in value:
            raise invalid(self.name(field), "not contain the NUL character")
        return value

    def integer(self, field: str, low: int, high: int) -> int | None:
        value = self.raw(field)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise invalid(self.name(field), f"be a whole number from {low} to {high}", value)
        return value

    def number(self, field: str, low: float, high: float, *, above_low: bool = False) -> float | None:
        value = self.raw(field)
        if value is None:
            return None
        fits = (
            not isinstance(value, bool)
            and isinstance(value, int | float)
            and math.isfinite(value)
            and low <= value <= high
        )
        if not fits or (above_low and value == low):
            words = f"above {low:g} and at most {high:g}" if above_low else f"from {low:g} to {high:g}"
            raise invalid(self.name(field), f"be a number {words}", value)
        return float(value)

    def object(self, field: str) -> "Fields | None":
        value = self.raw(field)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise invalid(self.name(field), "be an object", value)
        return Fields(value, f"{self._path}{field}.")

    def integers(self, field: str, low: int, high: int, *, most: int) -> tuple[int, ...] | None:
        """A list of whole numbers, sorted, repeats dropped."""
        value = self.raw(field)
        if value is None:
            return None
        if not isinstance(value, list):
            raise invalid(self.name(field), "be a list of whole numbers", value)
        if len(value) > most:
            raise invalid(self.name(field), f"have at most {most} entries; it has {len(value)}")
        for at, item in enumerate(value):
            if isinstance(item, bool) or not isinstance(item, int) or not low <= item <= high:
                raise invalid(f"{self.name(field)}[{at}]", f"be a whole number from {low} to {high}", item)
        return tuple(sorted(set(value)))

    def words(self, field: str, known: Collection[str]) -> tuple[str, ...] | None:
        """A list of words out of `known`, sorted, repeats dropped."""
        value = self.raw(field)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) and item in known for item in value):
            raise invalid(self.name(field), f"be a list of: {', '.join(sorted(known))}", value)
        return tuple(sorted(set(value)))
