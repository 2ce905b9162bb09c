"""Chromium, and tabs of it that a test looks through; a service with API keys."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, Error, Page, sync_playwright

from tests.support.api_keys import guarded_settings
from tests.support.browser import launch
from tests.support.service import Service, fork_service


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Not for the whole session: Playwright's event loop, while it is there, is in others' way."""
    with sync_playwright() as playwright:
        try:
            made = launch(playwright)
        except Error:
            pytest.fail("the tests of the page need Chromium: `make browser`", pytrace=False)
        yield made
        made.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A window of its own, of one who likes no motion; what the console says, or a script throws,
    fails the test."""
    size = {"width": 1280, "height": 800}
    made = browser.new_context(viewport=size, reduced_motion="reduce")  # type: ignore[arg-type]
    said: list[str] = []
    made.on("console", lambda m: said.append(f"{m.type}: {m.text}"))
    made.on("weberror", lambda e: said.append(str(e.error)))
    yield made
    made.close()
    expected = "Failed to load resource"  # the browser's own line for each refusal of the API
    assert [line for line in said if expected not in line] == []


@pytest.fixture
def page(context: BrowserContext) -> Page:
    return context.new_page()


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with the API keys `TOKENS`, and a queue that never refuses."""
    folder = tmp_path_factory.mktemp("guarded")
    with fork_service(folder, **guarded_settings(folder)) as running:
        yield running
