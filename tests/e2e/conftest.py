"""Chromium, and tabs of it that a test looks through."""

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, Error, Page, Playwright, sync_playwright

INSTALLED = ("chromium", "google-chrome")


def launch(playwright: Playwright) -> Browser:
    """The machine's own Chromium, else Playwright's."""
    own = next(filter(None, map(shutil.which, INSTALLED)), None)
    return playwright.chromium.launch(executable_path=own, args=["--no-sandbox"])


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
