"""Content negotiation: the headers `Accept` (RFC 9110) and `Prefer` (RFC 7240)."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from models.errors import PictureTooLarge
from models.image import MEDIA_TYPES, OutputFormat
from service.problems import NotAcceptable

PREFERENCE: Sequence[OutputFormat] = ("png", "webp", "avif", "jpeg", "npy")
"""Order of formats that a client accepts equally: lossless and widely supported ones first."""
MAX_SIDE: Mapping[OutputFormat, int] = {"webp": 16383}
"""Longest side, in pixels, of a picture in the formats that cannot hold `geometry.MAX_SIDE`."""
MAX_LENGTH, MAX_ITEMS = 8192, 64
"""Limits on the characters and the comma-separated items of a header."""
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


def picture_format(accept: str | None, width: int = 1, height: int = 1) -> OutputFormat:
    """Return the format that `Accept` prefers for a picture of this size; PNG without the header.

    Call it only before a picture is sent: other responses are JSON, whatever `Accept` is. Raises
    `NotAcceptable` if no format in `Accept` can hold the picture, and for a header above the limits
    `MAX_LENGTH` and `MAX_ITEMS`.
    """
    if accept is None or not accept.strip():
        return PREFERENCE[0]
    if _is_too_long(accept):
        limits = f"at most {MAX_LENGTH} characters and {MAX_ITEMS} media ranges are read"
        raise NotAcceptable(f"Accept has {len(accept)} characters; {limits}")
    ranges = list(_ranges(accept))
    side = max(width, height)
    available = [f for f in PREFERENCE if side <= MAX_SIDE.get(f, side)]
    weights = {f: _weight(MEDIA_TYPES[f], ranges) for f in available}
    best = max(available, key=lambda f: weights[f])  # the first, if several are equal
    if not weights[best]:
        types = ", ".join(MEDIA_TYPES[f] for f in available)
        reason = f" for {width}×{height} pixels" if len(available) < len(PREFERENCE) else ""
        raise NotAcceptable(f"Accept is {accept!r}; available formats{reason} are {types}")
    return best


def check_size(format: OutputFormat, width: int, height: int) -> None:
    """Raise `PictureTooLarge` if the format cannot hold a picture of this size."""
    limit = MAX_SIDE.get(format)
    if limit is not None and max(width, height) > limit:
        raise PictureTooLarge(
            f"{format} holds at most {limit} pixels per side, not {width}×{height}; choose png"
        )


def preferences(prefer: str | None) -> Preferences:
    """Parse `Prefer`; if a preference is repeated, the first counts (RFC 7240).

    A header above the limits `MAX_LENGTH` and `MAX_ITEMS` is ignored.
    """
    values: dict[str, str] = {}
    if _is_too_long(prefer or ""):
        return Preferences()
    for item in _ITEMS.findall(prefer or ""):
        name, _, value = _parts(item)[0].partition("=")
        values.setdefault(name.strip().lower(), value.strip().strip('"'))
    wait = values.get("wait", "")
    seconds = min(int(wait), MAX_WAIT_S) if re.fullmatch(r"[0-9]{1,9}", wait) else None
    return Preferences("respond-async" in values, seconds)


def _is_too_long(header: str) -> bool:
    return len(header) > MAX_LENGTH or header.count(",") >= MAX_ITEMS


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
