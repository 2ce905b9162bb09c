"""The events of one feed."""

import json
from typing import Any, cast

import pytest

from service.feeds import Feed, Source


@pytest.fixture
def feed() -> Feed[None]:
    return Feed(cast(Source[None], None))


def entry(id: str, kind: str) -> tuple[bytes, dict[bytes, bytes]]:
    return id.encode(), {b"kind": kind.encode(), b"data": json.dumps({}).encode()}


def kinds(feed: Feed[Any], after: str) -> list[str]:
    return [event.kind for event in feed.after(after)]


def test_events_are_those_after_an_id_in_numeric_order(feed: Feed[None]) -> None:
    feed.add([entry("9-0", "queued"), entry("10-0", "started"), entry("10-11", "progress")])
    assert kinds(feed, "0") == ["queued", "started", "progress"]
    assert kinds(feed, "10-2") == ["progress"]
    assert kinds(feed, "10-11") == []


def test_events_that_are_read_twice_are_kept_once(feed: Feed[None]) -> None:
    assert not feed.add([entry("1-0", "queued"), entry("2-0", "started")])
    assert feed.add([entry("2-0", "started"), entry("3-0", "failed")])
    assert kinds(feed, "0") == ["queued", "started", "failed"]
    assert feed.newest == "3-0"


def test_events_of_an_earlier_run_are_dropped(feed: Feed[None]) -> None:
    feed.add([entry("1-0", "queued"), entry("2-0", "canceled"), entry("3-0", "queued")])
    assert kinds(feed, "0") == ["queued"]


def test_a_job_that_is_put_back_keeps_its_events(feed: Feed[None]) -> None:
    feed.add([entry("1-0", "queued"), entry("2-0", "started"), entry("3-0", "queued")])
    assert kinds(feed, "0") == ["queued", "started", "queued"]
