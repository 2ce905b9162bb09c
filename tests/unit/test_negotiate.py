"""Parsing of the headers `Accept` and `Prefer`."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import geometry, image
from models.errors import PictureError
from models.image import MEDIA_TYPES, OutputFormat
from service.negotiate import (
    MAX_SIDE,
    MAX_WAIT_S,
    PREFERENCE,
    Preferences,
    picture_format,
    preferences,
)
from service.problems import NotAcceptable

WEIGHTS = st.sampled_from(["0", "0.0", "0.001", "0.5", "0.75", "1", "1.000"])
RANGES = st.sampled_from([*MEDIA_TYPES.values(), "image/*", "application/*", "*/*", "text/html"])


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (None, "png"),
        ("", "png"),
        ("*/*", "png"),
        ("image/*", "png"),
        ("image/avif,image/webp,image/png,*/*;q=0.8", "png"),  # sent by a browser
        ("image/webp, image/png;q=0.5", "webp"),
        ("image/*;q=0.5, image/jpeg", "jpeg"),
        ("IMAGE/WEBP", "webp"),
        ("image/png;q=0, */*;q=0.1", "webp"),
        ("application/x-npy", "npy"),
        ('image/webp;note="a, b;c", text/html', "webp"),
        ("image/png;q=much, image/avif;q=0.1", "avif"),
    ],
)
def test_the_preferred_format_is_chosen(accept: str | None, chosen: str) -> None:
    assert picture_format(accept) == chosen


@pytest.mark.parametrize("accept", ["text/html", "image/*;q=0", "image/tiff", ",", ";", "png"])
def test_an_unavailable_format_is_refused_with_a_list_of_the_others(accept: str) -> None:
    with pytest.raises(NotAcceptable, match="image/png, image/webp"):
        picture_format(accept)


@pytest.mark.parametrize(
    ("accept", "width", "height", "chosen"),
    [
        ("image/webp, image/png;q=0.5", 16383, 1, "webp"),
        ("image/webp, image/png;q=0.5", 1, 16384, "png"),
        ("image/png;q=0, */*", 16384, 1, "avif"),
        ("image/jpeg", 1, 16384, "jpeg"),
    ],
)
def test_a_format_that_cannot_hold_the_picture_is_not_chosen(
    accept: str, width: int, height: int, chosen: str
) -> None:
    assert picture_format(accept, width, height) == chosen


@pytest.mark.parametrize("format", PREFERENCE)
def test_a_format_holds_pictures_up_to_its_longest_side(format: OutputFormat) -> None:
    longest = MAX_SIDE.get(format, geometry.MAX_SIDE)
    assert image.write(np.zeros((1, longest, 3), np.uint8), format)
    if longest < geometry.MAX_SIDE:
        with pytest.raises(PictureError, match="choose another format"):
            image.write(np.zeros((1, longest + 1, 3), np.uint8), format)


@pytest.mark.parametrize("header", ["a" * 8193, "image/png" + ", image/png" * 64])
def test_longer_headers_are_not_parsed(header: str) -> None:
    with pytest.raises(NotAcceptable, match="at most 8192 characters and 64 media ranges"):
        picture_format(header)
    assert preferences(f"respond-async, {header}") == Preferences()
    assert picture_format("image/png" + ", image/png" * 63) == "png"


@given(st.lists(st.tuples(RANGES, WEIGHTS), min_size=1, max_size=6))
def test_no_other_format_has_a_higher_weight_than_the_chosen_one(
    items: list[tuple[str, str]],
) -> None:
    def weight(media_type: str) -> float:
        for name in (media_type, media_type.split("/")[0] + "/*", "*/*"):
            weights = [float(q) for media_range, q in items if media_range == name]
            if weights:
                return max(weights)
        return 0

    accept = ", ".join(f"{name};q={q}" for name, q in items)
    best = max(weight(MEDIA_TYPES[f]) for f in PREFERENCE)
    if best:
        assert weight(MEDIA_TYPES[picture_format(accept)]) == best
    else:
        with pytest.raises(NotAcceptable):
            picture_format(accept)


@given(st.text() | st.text('a/*;,="q01. '))
def test_the_parser_never_fails_on_arbitrary_headers(text: str) -> None:
    try:
        assert picture_format(text) in PREFERENCE
    except NotAcceptable:
        assert text.strip()
    wait_s = preferences(text).wait_s
    assert wait_s is None or 0 <= wait_s <= MAX_WAIT_S


@pytest.mark.parametrize(
    ("prefer", "expected"),
    [
        (None, Preferences()),
        ("respond-async", Preferences(True)),
        ("respond-async, wait=10", Preferences(True, 10)),
        ('Respond-Async; foo="a,b", wait="7"', Preferences(True, 7)),
        ("wait=10, wait=20", Preferences(False, 10)),
        ("wait=99999", Preferences(False, MAX_WAIT_S)),
        ("wait=-1", Preferences()),
        (",;,", Preferences()),
        ("wait=1.5, return=minimal", Preferences()),
    ],
)
def test_preferences_are_parsed(prefer: str | None, expected: Preferences) -> None:
    assert preferences(prefer) == expected


def test_applied_preferences_are_listed() -> None:
    assert preferences("wait=10, respond-async").applied == "respond-async, wait=10"
    assert Preferences().applied == ""
