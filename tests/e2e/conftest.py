"""Fixtures: Chromium, its windows and tabs; a tiny picture; a service with API keys."""

import contextlib
from collections.abc import Iterator

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    Error,
    Page,
    ViewportSize,
    sync_playwright,
)

from models import image
from models.codec import bitstream, codec
from models.codec.codec import Codec
from tests.support.api_keys import guarded_settings
from tests.support.browser import launch
from tests.support.service import Service, fork_service

VIEWPORT: ViewportSize = {"width": 1280, "height": 800}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, for one module: Playwright's event loop would block those of other tests."""
    with sync_playwright() as playwright:
        try:
            made = launch(playwright)
        except Error:
            pytest.fail("the tests of the page need Chromium: `make browser`", pytrace=False)
        yield made
        made.close()


@contextlib.contextmanager
def window(browser: Browser) -> Iterator[BrowserContext]:
    """A new window with reduced motion. Messages on its console and uncaught errors of its scripts
    are an error."""
    made = browser.new_context(viewport=VIEWPORT, reduced_motion="reduce")
    said: list[str] = []
    made.on("console", lambda m: said.append(f"{m.type}: {m.text}"))
    made.on("weberror", lambda e: said.append(str(e.error)))
    yield made
    made.close()
    expected = "Failed to load resource"  # the browser's own line for each refusal of the API
    assert [line for line in said if expected not in line] == []


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    with window(browser) as made:
        yield made


@pytest.fixture
def page(context: BrowserContext) -> Page:
    return context.new_page()


@pytest.fixture(scope="session")
def tiny(photo: image.Pixels) -> image.Pixels:
    """A cut of the photograph, (60, 62, 3): a step of its diffusion takes a third of the time that
    one of `small` takes."""
    return photo[100:160, 200:262].copy()


@pytest.fixture(scope="session")
def tiny_msh(shipped: Codec, tiny: image.Pixels) -> bytes:
    return bitstream.serialize(shipped.encode(codec.to_tensor(tiny), "msh", "exact"))


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with the API keys `TOKENS`, and a queue that never refuses."""
    folder = tmp_path_factory.mktemp("guarded")
    with fork_service(folder, **guarded_settings(folder)) as running:
        yield running
