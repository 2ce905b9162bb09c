"""Reads the JSON document that asks for a batch, a slice of its items at a time.

A list of 100,000 items takes tens of megabytes as Python objects, which the process would keep.
"""

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError

from service import parameters
from service.batches.request_schemas import BatchItem, BatchRequest
from worker.queue.batches.records import MAX_ITEMS

SLICE = 1000
"""Items that are objects at a time."""

_SPACE = re.compile(r"[ \t\n\r]*")


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no number of JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse)
_SLICES = TypeAdapter(list[BatchItem])


class Document:
    """A request for a batch. `request` has no more than the first of the items."""

    def __init__(self, data: bytes) -> None:
        """Raises `RequestValidationError`."""
        try:
            self._text = data.decode()
            fields = self._read()
        except (ValueError, RecursionError) as e:
            raise _invalid("", f"no valid JSON: {e}") from None
        if self.count > MAX_ITEMS:
            raise _invalid("items", f"there are {self.count}; a batch has at most {MAX_ITEMS}")
        try:
            self.request = BatchRequest.model_validate(fields)
        except ValidationError as e:
            raise _faults(e) from None

    def _read(self) -> dict[str, Any]:
        """The fields, with the first of the items; finds and counts these. Raises `ValueError`."""
        cursor, fields = _Cursor(self._text, 0), dict[str, Any]()
        self.count = self._begin = 0
        cursor.expect("{")
        for _ in cursor.elements("}"):
            name, _ = cursor.value(), cursor.expect(":")
            if name == "items" and cursor.peek() == "[":
                self._begin = cursor.at
                cursor.expect("[")
                self.count = sum(1 for _ in map(cursor.value_at, cursor.elements("]")))
                fields["items"] = [*itertools.islice(self._values(), 1)]
            else:
                fields[str(name)] = cursor.value()
        if cursor.peek():
            raise ValueError(f"there is more after the object, at character {cursor.at}")
        return fields

    def _values(self) -> Iterator[Any]:
        cursor = _Cursor(self._text, self._begin)
        cursor.expect("[")
        return map(cursor.value_at, cursor.elements("]"))

    def items(self) -> Iterator[BatchItem]:
        """The items, each checked. Raises `RequestValidationError`."""
        values, begun = self._values() if self.count else iter(()), 0
        while part := list(itertools.islice(values, SLICE)):
            try:
                yield from _SLICES.validate_python(part)
            except ValidationError as e:
                raise _faults(e, begun) from None
            begun += len(part)


class _Cursor:
    """A place in a JSON text. All methods but `peek` raise `ValueError`."""

    def __init__(self, text: str, at: int) -> None:
        self._text, self.at = text, at

    def peek(self) -> str:
        """The next character that is no space; empty at the end."""
        match = _SPACE.match(self._text, self.at)
        self.at = match.end() if match else self.at
        return self._text[self.at : self.at + 1]

    def expect(self, symbols: str) -> str:
        """Go behind the next character, which is one of `symbols`, and return it."""
        found = self.peek()
        if not found or found not in symbols:
            choice = " or ".join(symbols)
            raise ValueError(f"there is {found!r} in place of {choice} at character {self.at}")
        self.at += 1
        return found

    def value(self) -> Any:
        """Go behind the next value, and return it."""
        self.peek()
        value, self.at = _DECODER.raw_decode(self._text, self.at)
        return value

    def value_at(self, _: None) -> Any:
        """As `value`, for an element."""
        return self.value()

    def elements(self, end: str) -> Iterator[None]:
        """Go before each element of an array or object in turn, and at last behind its `end`."""
        if self.peek() == end:
            self.at += 1
            return
        while True:
            yield
            if self.expect(f",{end}") == end:
                return


def _faults(e: ValidationError, begun: int = 0) -> RequestValidationError:
    """The error for the client; numbers of items count from `begun`."""
    faults = []
    for x in e.errors()[: parameters.MAX_FAULTS]:
        place = x["loc"]
        if begun or (place and isinstance(place[0], int)):
            place = ("items", begun + int(place[0]), *place[1:])
        faults.append(parameters.fault("body", ".".join(map(str, place)), x["msg"]))
    return RequestValidationError(faults)


def _invalid(name: str, message: str) -> RequestValidationError:
    return RequestValidationError([parameters.fault("body", name, message)])
