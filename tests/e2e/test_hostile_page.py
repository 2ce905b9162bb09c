"""Hostile texts on the page, and the policies of all pages, in Chromium over a running service."""

import json
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from tests.support.service import Service

pytestmark = [pytest.mark.redis, pytest.mark.weights]

HTML = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
NAME = "<img src=x onerror=document.title='run'>.msh"


@pytest.fixture
def opened(page: Page, service: Service) -> Page:
    page.goto(str(service.client.base_url))
    expect(page.locator("[name=tier]")).to_have_value("perceptual")
    return page


def nothing_ran(page: Page) -> None:
    """Check that no hostile element was made and no script of its has run."""
    page.wait_for_timeout(200)
    assert page.title() != "run"
    assert page.locator("[onerror], script:not([src])").count() == 0


def test_a_file_name_is_shown_as_text(opened: Page, tmp_path: Path, tiny_msh: bytes) -> None:
    file = tmp_path / NAME
    file.write_bytes(tiny_msh)
    with opened.expect_file_chooser() as chooser:
        opened.locator("#pick").click()
    chooser.value.set_files(file)
    expect(opened.locator("#file")).to_have_text(NAME)
    nothing_ran(opened)


def test_the_texts_of_a_problem_are_shown_as_text(
    opened: Page, tmp_path: Path, tiny_msh: bytes
) -> None:
    def refuse(route: Route) -> None:
        problem = {"type": HTML, "title": HTML, "status": 422, "detail": HTML}
        route.fulfill(status=422, body=json.dumps(problem), content_type="application/problem+json")

    opened.route("**/v1/decodes?*", refuse)
    file = tmp_path / "tiny.msh"
    file.write_bytes(tiny_msh)
    with opened.expect_file_chooser() as chooser:
        opened.locator("#pick").click()
    chooser.value.set_files(file)
    expect(opened.locator("#problem p")).to_have_text(f"{HTML} {HTML}")
    nothing_ran(opened)


def test_texts_in_a_job_s_status_and_in_the_address_are_shown_as_text(
    page: Page, service: Service
) -> None:
    id = "a" * 32

    def answer(route: Route) -> None:
        job = {
            "id": id, "status": "failed", "tier": HTML, "seed": 0, "seed_text": "0", "step": 1,
            "total": 4, "position": None, "eta_s": None, "attempts": 1, "width": 10, "height": 10,
            "error": HTML, "webhooks": [f"https://example.com/{HTML}"],
        }  # fmt: skip
        route.fulfill(body=json.dumps(job), content_type="application/json")

    page.route(f"**/v1/decodes/{id}*", answer)
    page.goto(f"{service.client.base_url}#decode={id}&bytes={HTML}")
    expect(page.locator("#problem, #stand").filter(visible=True).first).not_to_be_empty()
    nothing_ran(page)
    page.goto(f"{service.client.base_url}#decode={HTML}&bytes={HTML}")
    page.reload()
    expect(page.locator("[name=tier]")).to_have_value("perceptual")
    nothing_ran(page)


@pytest.mark.parametrize(("path", "ready"), [("/docs", ".opblock"), ("/redoc", "[role=menuitem]")])
def test_the_reference_works_under_its_policy(
    browser: Browser, service: Service, path: str, ready: str
) -> None:
    with browser.new_context() as context:
        reported: list[str] = []
        context.on("console", lambda message: reported.append(message.text))
        page = context.new_page()
        page.goto(str(service.client.base_url.join(path)))
        expect(page.locator(ready).first).to_be_visible(timeout=30_000)
        page.wait_for_timeout(200)
    # Redoc's logo, which it would load from another host
    assert [text for text in reported if "cdn.redoc.ly" not in text] == []
