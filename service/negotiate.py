"""What a client would like, by its headers: `Accept` (RFC 9110) and `Prefer` (RFC 7240)."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from models.image import MEDIA_TYPES, OutputFormat
from service.problems import NotAcceptable

PREFERENCE: Sequence[OutputFormat] = ("png", "webp", "avif", "jpeg", "npy")
"""Ours, where a client likes several as much: without loss and read everywhere first."""
MAX_WAIT_S = 60
"""The longest `wait` that is granted."""

_OUTSIDE_QUOTES = r'(?:[^{0}"]|"(?:\\.|[^"\\])*"?)+'
_ITEMS = re.compile(_OUTSIDE_QUOTES.format(","))
_PARTS = re.compile(_OUTSIDE_QUOTES.format(";"))
_WEIGHT = re.compile(r"0(\.\d{0,3})?|1(\.0{0,3})?")


@dataclass(frozen=True, slots=True)
class Preferences:
    """`respond-async` and `wait` of `Prefer`; what is not understood is left out."""

    respond_async: bool = False
    wait_s: int | None = None

    @property
    def applied(self) -> str:
        """For `Preference-Applied`."""
        wait = [] if self.wait_s is None else [f"wait={self.wait_s}"]
        return ", ".join((["respond-async"] if self.respond_async else []) + wait)


def picture_format(accept: str | None) -> OutputFormat:
    """The format that `Accept` likes best; PNG without one. Raises `NotAcceptable`."""
    if accept is None or not accept.strip():
        return PREFERENCE[0]
    ranges = list(_ranges(accept))
    weights = {f: _weight(MEDIA_TYPES[f], ranges) for f in PREFERENCE}
    best = max(PREFERENCE, key=lambda f: weights[f])  # the first of several
    if not weights[best]:
        known = ", ".join(MEDIA_TYPES[f] for f in PREFERENCE)
        raise NotAcceptable(f"none of {accept!r} can be made; known are {known}")
    return best


def preferences(prefer: str | None) -> Preferences:
    """What `Prefer` asks for; the first of each name counts, as RFC 7240 has it."""
    found: dict[str, str] = {}
    for item in _ITEMS.findall(prefer or ""):
        name, _, value = _parts(item)[0].partition("=")
        found.setdefault(name.strip().lower(), value.strip().strip('"'))
    wait = found.get("wait", "")
    seconds = min(int(wait), MAX_WAIT_S) if re.fullmatch(r"[0-9]{1,9}", wait) else None
    return Preferences("respond-async" in found, seconds)


def _parts(item: str) -> list[str]:
    return _PARTS.findall(item) or [""]


def _ranges(accept: str) -> Iterator[tuple[str, float]]:
    """Media ranges and their weights; ranges with a weight that is none are left out."""
    for item in _ITEMS.findall(accept):
        name, *parameters = (part.strip().lower() for part in _parts(item))
        weight = next((p[2:].strip() for p in parameters if p.startswith("q=")), "1")
        if _WEIGHT.fullmatch(weight):
            yield name, float(weight)


def _weight(media_type: str, ranges: Sequence[tuple[str, float]]) -> float:
    """By the most specific range that matches; 0 where none does."""
    for name in (media_type, media_type.split("/")[0] + "/*", "*/*"):
        found = [weight for of, weight in ranges if of == name]
        if found:
            return max(found)
    return 0.0
