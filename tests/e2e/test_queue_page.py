"""The operators' view of the queue at `/queue`, in Chromium."""

from collections.abc import Iterator

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import BrowserContext, Page, expect

from tests.support.api_keys import TOKENS
from tests.support.service import Service

pytestmark = [pytest.mark.redis, pytest.mark.weights]

SLOW = 30_000
"""Milliseconds within which a request is answered while other tests run."""


@pytest.fixture
def url(guarded: Service) -> str:
    return str(guarded.client.base_url)


@pytest.fixture
def withdrawn(guarded: Service, small_msh: bytes) -> Iterator[str]:
    """The id of a long decode of the key `decoder`."""
    headers = {"Authorization": f"Bearer {TOKENS['decoder']}"}
    asked: dict[str, str | int] = {"tier": "ddim-100", "steps": 900, "seed": 77}
    answer = guarded.client.post("/v1/decodes", params=asked, content=small_msh, headers=headers)
    location = answer.headers["location"]
    yield location.rpartition("/")[2]
    guarded.client.delete(location, headers=headers)


def enter_key(page: Page, name: str) -> None:
    page.locator("[name=key]").fill(TOKENS[name])
    page.get_by_role("button", name="Use key").click()


def test_the_footer_links_the_queue_for_keys_that_may_see_it(page: Page, url: str) -> None:
    link = page.get_by_role("link", name="Queue")
    for name, visible in (("decoder", False), ("operator", True)):
        page.goto(url)
        page.evaluate("key => sessionStorage.setItem('key', key)", TOKENS[name])
        with page.expect_response("**/v1/queue", timeout=SLOW):
            page.reload()
        expect(link).to_be_visible(visible=visible, timeout=SLOW)
    link.click()
    expect(page).to_have_title("Queue – Afterimage")
    expect(page.locator("#workers tbody tr")).to_have_count(1, timeout=SLOW)


def test_the_view_needs_a_key_and_shows_what_runs(page: Page, url: str, withdrawn: str) -> None:
    page.goto(f"{url}/queue")
    expect(page.locator("#problem")).to_contain_text("key", timeout=SLOW)
    expect(page.locator("#queue")).to_be_hidden()
    enter_key(page, "decoder")
    expect(page.locator("#problem")).to_contain_text("lacks the scope operate", timeout=SLOW)
    enter_key(page, "operator")
    running = page.locator("#running tbody tr")
    expect(running).to_contain_text(withdrawn, timeout=SLOW)
    expect(running).to_contain_text("of 900")
    expect(running).to_contain_text("150 × 100")
    expect(page.locator("#workers")).to_contain_text("cpu")
    expect(page.locator("#quarantined")).to_have_text("none")
    expect(page.locator("#summary")).to_contain_text("1 run")
    expect(page.locator("#problem")).to_be_hidden()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    found = Axe().run(page).response["violations"]
    assert not found, [(fault["id"], fault["nodes"][0]["html"]) for fault in found]


def test_names_are_shown_as_text(context: BrowserContext, page: Page, url: str) -> None:
    """A name with markup makes no element; the view keeps its last state while Redis is away."""
    view = {
        "interactive": 1, "batch": 0, "running": [], "quarantined": [], "workers": [],
        "waiting": [{"priority": "interactive", "caller": "<img src=x onerror=alert(1)>",
                     "jobs": 1, "unserved_s": 100.0}],
    }  # fmt: skip
    away = False

    def answer(route: object) -> None:
        problem = {"title": "Queue away", "detail": "Redis does not respond."}
        if away:
            route.fulfill(status=503, json=problem)  # type: ignore[attr-defined]
        else:
            route.fulfill(json=view)  # type: ignore[attr-defined]

    page.route("**/v1/queue", answer)
    page.goto(f"{url}/queue")
    row = page.locator("#waiting tbody tr")
    expect(row).to_contain_text("<img src=x onerror=alert(1)>", timeout=SLOW)
    expect(row).to_contain_text("2 min")
    away = True
    expect(page.locator("#problem")).to_contain_text("Redis does not respond.", timeout=SLOW)
    expect(row).to_be_visible()
    away = False
    expect(page.locator("#problem")).to_be_hidden(timeout=SLOW)
