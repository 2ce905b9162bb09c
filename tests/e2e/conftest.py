"""Chromium, and tabs of it that a test looks through; a service with API keys."""

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, Error, Page, Playwright, sync_playwright

from service import keys
from tests.conftest import Service, run_service

INSTALLED = ("chromium", "google-chrome")
TABLE = """
[[keys]]
name = "{name}"
sha256 = "{digest}"
scopes = [{scopes}]
{more}
"""
TOKENS = {name: f"ai_{name * 10}" for name in ("both", "decoder", "hasty", "single")}
"""Of the guarded service's keys; `both` may decode and encode, without limits."""


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


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with these keys, and a queue that never refuses."""
    folder = tmp_path_factory.mktemp("guarded")
    more = {"hasty": "requests_per_minute = 3", "single": "jobs_at_once = 1"}
    tables = [
        TABLE.format(
            name=name,
            digest=keys.digest(token),
            scopes='"decode", "encode"' if name == "both" else '"decode"',
            more=more.get(name, ""),
        )
        for name, token in TOKENS.items()
    ]
    (folder / "keys.toml").write_text("".join(tables))
    environment = {
        "AFTERIMAGE_API_KEYS": str(folder / "keys.toml"),
        "AFTERIMAGE_LINK_SECRET": "s" * 40,
        "AFTERIMAGE_CORS_ORIGINS": '["https://gallery.example"]',
        "AFTERIMAGE_MAX_PIXELS": "1000000",
        "AFTERIMAGE_MAX_BACKLOG_S": "1000000",
    }
    with run_service(folder, **environment) as running:
        yield running
