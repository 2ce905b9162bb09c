"""Content negotiation: the headers `Accept` (RFC 9110) and `Prefer` (RFC 7240)."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from models.image import MEDIA_TYPES, OutputFormat
from service.problems import NotAcceptable

PREFERENCE: Sequence[OutputFormat] = ("png", "webp", "avif", "jpeg", "npy")
"""The format that is chosen among those that a client accepts equally is the first of these.
Lossless and widely supported formats come first."""
MAX_WAIT_S = 60
"""The longest `Prefer: wait`, in seconds; longer values are reduced to this."""

_OUTSIDE_QUOTES = r'(?:[^{0}"]|"(?:\\.|[^"\\])*"?)+'
_ITEMS = re.compile(_OUTSIDE_QUOTES.format(","))
_PARTS = re.compile(_OUTSIDE_QUOTES.format(";"))
_WEIGHT = re.compile(r"0(\.\d{0,3})?|1(\.0{0,3})?")


@dataclass(frozen=True, slots=True)
class Preferences:
    """The preferences `respond-async` and `wait`; others are ignored."""

    respond_async: bool = False
    wait_s: int | None = None

    @property
    def applied(self) -> str:
        """The value of the header `Preference-Applied`."""
        wait = [] if self.wait_s is None else [f"wait={self.wait_s}"]
        return ", ".join((["respond-async"] if self.respond_async else []) + wait)


def picture_format(accept: str | None) -> OutputFormat:
    """Return the format that `Accept` prefers, PNG without the header. Raises `NotAcceptable`."""
    if accept is None or not accept.strip():
        return PREFERENCE[0]
    ranges = list(_ranges(accept))
    weights = {f: _weight(MEDIA_TYPES[f], ranges) for f in PREFERENCE}
    best = max(PREFERENCE, key=lambda f: weights[f])  # the first, if several are equal
    if not weights[best]:
        available = ", ".join(MEDIA_TYPES[f] for f in PREFERENCE)
        raise NotAcceptable(f"Accept is {accept!r}; choose one of {available}")
    return best


def preferences(prefer: str | None) -> Preferences:
    """Parse `Prefer`; if a preference is repeated, the first counts (RFC 7240)."""
    values: dict[str, str] = {}
    for item in _ITEMS.findall(prefer or ""):
        name, _, value = _parts(item)[0].partition("=")
        values.setdefault(name.strip().lower(), value.strip().strip('"'))
    wait = values.get("wait", "")
    seconds = min(int(wait), MAX_WAIT_S) if re.fullmatch(r"[0-9]{1,9}", wait) else None
    return Preferences("respond-async" in values, seconds)


def _parts(item: str) -> list[str]:
    return _PARTS.findall(item) or [""]


def _ranges(accept: str) -> Iterator[tuple[str, float]]:
    """Media ranges and their weights; ranges with an invalid weight are ignored."""
    for item in _ITEMS.findall(accept):
        name, *parameters = (part.strip().lower() for part in _parts(item))
        weight = next((p[2:].strip() for p in parameters if p.startswith("q=")), "1")
        if _WEIGHT.fullmatch(weight):
            yield name, float(weight)


def _weight(media_type: str, ranges: Sequence[tuple[str, float]]) -> float:
    """The weight of the most specific media range that matches; 0 if none does."""
    for name in (media_type, media_type.split("/")[0] + "/*", "*/*"):
        weights = [weight for media_range, weight in ranges if media_range == name]
        if weights:
            return max(weights)
    return 0.0
