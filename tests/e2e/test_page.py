"""The page at `/`, in Chromium, over a running service."""

import base64
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, FilePayload, Page, Request, Route, expect

from models import image
from models.image import Pixels
from service.routes.page import files
from tests.e2e.conftest import VIEWPORT, window
from tests.support.service import Service
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.redis, pytest.mark.weights]

HEAVIEST = 60_000
"""Largest number of bytes that opening the page may load."""
SLOW = 30_000
"""Milliseconds a decode may take while other tests run."""


@pytest.fixture(scope="module")
def tab(browser: Browser) -> Iterator[Page]:
    """A tab that tests share: a new one takes twice as long to open the page."""
    with window(browser) as made:
        yield made.new_page()


@pytest.fixture
def opened(tab: Page, service: Service) -> Iterator[Page]:
    """The shared tab, with the page newly opened."""
    tab.set_viewport_size(VIEWPORT)
    tab.emulate_media(color_scheme="light", reduced_motion="reduce")
    tab.mouse.move(0, 0)
    visit(tab, service)
    yield tab
    tab.unroute_all(behavior="ignoreErrors")
    for other in tab.context.pages:
        if other is not tab:
            other.close()


def visit(page: Page, service: Service) -> None:
    """Open the page and wait for its tiers."""
    page.goto(str(service.client.base_url))
    expect(page.locator("[name=tier]")).to_have_value("perceptual")


@pytest.fixture(scope="module")
def tiny_png(tmp_path_factory: pytest.TempPathFactory, tiny: Pixels) -> Path:
    file = tmp_path_factory.mktemp("page") / "tiny.png"
    file.write_bytes(image.write(tiny, "png"))
    return file


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory, tiny_msh: bytes) -> Path:
    file = tmp_path_factory.mktemp("page") / "tiny.msh"
    file.write_bytes(tiny_msh)
    return file


def choose(page: Page, file: Path) -> None:
    with page.expect_file_chooser() as chooser:
        page.locator("#pick:visible, #other:visible").click()
    chooser.value.set_files(file)


def drawn(page: Page) -> None:
    """Wait until the page is idle."""
    expect(page.locator("#canvas")).to_have_attribute("aria-busy", "false", timeout=SLOW)


def draw(page: Page, file: Path) -> None:
    choose(page, file)
    drawn(page)


def screen(page: Page) -> Pixels:
    """The canvas's pixels, (H, W, 3)."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
    url = page.evaluate("document.querySelector('#canvas').toDataURL()")
    data = base64.b64decode(url.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def centre(pixels: Pixels, like: Pixels) -> Pixels:
    """The centre of a canvas, of the size of `like`: a picture shown at 1:1."""
    height, width = like.shape[:2]
    top, left = ((a - b + 1) // 2 for a, b in zip(pixels.shape, (height, width), strict=False))
    return pixels[top : top + height, left : left + width]


def only(page: Page, side: str, name: str) -> Pixels:
    """The canvas with one picture at 1:1, the divider at its edge."""
    page.locator(f"[name={side}]").select_option(name)
    page.locator("[data-do=one]").click()
    page.locator("#split").fill("100" if side == "left" else "0")
    return screen(page)


def job(page: Page) -> str:
    """The decode's id in the page's address."""
    return str(re.findall(r"decode=([0-9a-f]{32})", page.url)[0])


def api_image(service: Service, id: str, **params: Any) -> Pixels:
    answer = service.client.get(f"/v1/decodes/{id}/image", params=params)
    assert answer.status_code == 200
    return image.read(answer.content, 10**6)


def requests(page: Page) -> list[Request]:
    """List that collects the page's requests from now on."""
    sent: list[Request] = []
    page.on("request", lambda request: sent.append(request))
    return sent


# Files


def test_a_chosen_photograph_is_encoded_and_decoded_and_its_sizes_are_shown(
    opened: Page, service: Service, tiny: Pixels, tiny_png: Path
) -> None:
    draw(opened, tiny_png)
    coded = service.client.post("/v1/encodes?quality=2", content=tiny_png.read_bytes())
    rows = opened.locator("#rows tr")
    expect(rows).to_have_count(4)
    numbers = [row.split("\t") for row in rows.all_inner_texts()]
    size = len(coded.content)
    bpp = f"{8 * size / (tiny.shape[0] * tiny.shape[1]):.3f}"
    assert ["Bitstream", f"{size:,}", bpp] in numbers
    assert ["Original", f"{tiny_png.stat().st_size:,}"] in [row[:2] for row in numbers]
    np.testing.assert_array_equal(centre(only(opened, "left", "original"), tiny), tiny)


def test_a_truncated_photograph_is_decoded_with_a_warning(
    opened: Page, tiny: Pixels, tmp_path: Path
) -> None:
    data = image.write(tiny, "jpeg")
    (tmp_path / "half.jpg").write_bytes(data[: len(data) // 2])
    draw(opened, tmp_path / "half.jpg")
    expect(opened.locator("#problem")).to_contain_text("the picture is truncated")
    expect(opened.locator("#retry")).to_be_hidden()


def test_a_dropped_photograph_is_opened(opened: Page, tiny_png: Path) -> None:
    transfer(opened, tiny_png, "drop")
    expect(opened.locator("#file")).to_have_text("tiny.png")
    drawn(opened)


def test_the_first_of_several_dropped_files_is_opened(
    opened: Page, tiny_png: Path, tiny_file: Path
) -> None:
    transfer(opened, tiny_png, "drop", tiny_file)
    expect(opened.locator("#problem")).to_contain_text("Opened the first of 2 files")
    expect(opened.locator("#file")).to_have_text("tiny.png")
    drawn(opened)


def drop_address(page: Page, address: str) -> None:
    """Drop what browsers hand over for a picture of another page."""
    page.evaluate(
        """(address) => {
            const data = new DataTransfer();
            data.setData("text/uri-list", `# a comment\r\n${address}`);
            for (const kind of ["dragenter", "dragover", "drop"]) {
                const options = { dataTransfer: data, bubbles: true, cancelable: true };
                document.getElementById("stage").dispatchEvent(new DragEvent(kind, options));
            }
        }""",
        address,
    )


@pytest.mark.parametrize("kind", ["same origin", "data"])
def test_a_dropped_address_that_the_page_may_read_is_opened(
    opened: Page, tiny_png: Path, kind: str
) -> None:
    data = base64.b64encode(tiny_png.read_bytes()).decode()
    address, name = f"data:image/png;base64,{data}", "picture"
    if kind == "same origin":
        name = "parrots-small.webp"
        address = f"{opened.url}web/samples/{name}"
    drop_address(opened, address)
    expect(opened.locator("#file")).to_have_text(name)
    drawn(opened)
    expect(opened.locator("#problem")).to_be_hidden()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("https://elsewhere.example/a.png", "cannot read pictures of elsewhere.example"),
        ("file:///tmp/a.png", "Save the picture, then drop the file"),
        ("/web/samples/none.webp", "Cannot read the picture"),
        ("", "Drop a photograph or a bitstream"),
    ],
)
def test_a_dropped_address_that_the_page_cannot_read_is_refused(
    opened: Page, address: str, message: str
) -> None:
    drop_address(opened, address)
    expect(opened.locator("#problem")).to_contain_text(message)
    expect(opened.locator("#stage")).not_to_have_class(re.compile("over"))


def test_a_pasted_photograph_is_opened(opened: Page, tiny_png: Path) -> None:
    transfer(opened, tiny_png, "paste")
    expect(opened.locator("#file")).to_have_text("tiny.png")
    drawn(opened)


def transfer(page: Page, file: Path, kind: str, *others: Path) -> None:
    page.evaluate(
        """([files, kind]) => {
            const data = new DataTransfer();
            for (const [text, name] of files) {
                const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
                data.items.add(new File([bytes], name, { type: "image/png" }));
            }
            const event = kind === "drop"
                ? new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true })
                : new ClipboardEvent("paste", { clipboardData: data, bubbles: true });
            document.body.dispatchEvent(event);
        }""",
        [
            [(base64.b64encode(f.read_bytes()).decode(), f.name) for f in (file, *others)],
            kind,
        ],
    )


def test_a_bitstream_is_decoded_without_encoding(
    opened: Page, service: Service, tiny_file: Path
) -> None:
    sent = requests(opened)
    draw(opened, tiny_file)
    assert not any("/v1/encodes" in r.url for r in sent)
    expect(opened.locator("#qualities")).to_be_hidden()
    expect(opened.locator("#rows")).not_to_contain_text("JPEG")
    expected = api_image(service, job(opened), min_tier="perceptual")
    np.testing.assert_array_equal(centre(only(opened, "right", "drawn"), expected), expected)


@pytest.mark.parametrize("name", ["parrots", "girl", "lighthouse"])
def test_each_sample_can_be_opened(opened: Page, name: str) -> None:
    opened.locator("[name=tier]").select_option("instant")
    opened.locator(f"[data-sample={name}]").click()
    expect(opened.locator("#size")).to_have_text("768 × 512")
    expect(opened.locator("#times")).to_contain_text("Instant", timeout=SLOW)


def test_changing_the_quality_encodes_again(opened: Page, tiny_png: Path) -> None:
    draw(opened, tiny_png)
    before = opened.locator("#rows tr", has_text="Bitstream").inner_text()
    first = job(opened)
    opened.locator("#qualities label", has_text="3").click()
    expect(opened.locator("#rows tr", has_text="Bitstream")).not_to_have_text(before)
    drawn(opened)
    assert job(opened) != first


def test_changing_the_tier_while_a_quality_is_encoded_keeps_the_quality(
    opened: Page, service: Service, tiny_png: Path
) -> None:
    draw(opened, tiny_png)
    late = Late(opened, "**/v1/encodes?quality=3")
    opened.locator("#qualities label", has_text="3").click()
    late.wait()
    opened.locator("[name=tier]").select_option("ddim-10")
    late.go_on()
    expect(opened.locator("#right")).to_have_text("DDIM-10", timeout=SLOW)
    coded = service.client.post("/v1/encodes?quality=3", content=tiny_png.read_bytes())
    expect(opened.locator("#rows tr", has_text="Bitstream")).to_contain_text(
        f"{len(coded.content):,}"
    )


class Late:
    """Holds back requests that match a pattern, until `go_on`."""

    def __init__(self, page: Page, pattern: str) -> None:
        self.page, self.pattern, self.routes = page, pattern, list[Route]()
        page.route(pattern, lambda route: self.routes.append(route))

    def wait(self) -> None:
        """Wait for the first request."""
        while not self.routes:
            self.page.wait_for_timeout(20)

    def go_on(self) -> None:
        for route in self.routes:
            route.continue_()
        self.page.unroute(self.pattern)


def test_a_photograph_without_a_media_type_is_encoded(opened: Page, tiny_png: Path) -> None:
    untyped: FilePayload = {"name": "photo", "mimeType": "", "buffer": tiny_png.read_bytes()}
    opened.set_input_files("#chosen", files=[untyped])
    expect(opened.locator("#right")).to_have_text("Perceptual", timeout=SLOW)
    expect(opened.locator("#qualities")).to_be_visible()


def test_the_browser_encodes_jpeg_and_webp_of_the_same_size(opened: Page) -> None:
    opened.locator("[name=tier]").select_option("instant")
    opened.locator("[data-sample=parrots]").click()
    rows = {n: opened.locator("#rows tr", has_text=n) for n in ("Bitstream", "JPEG", "WebP")}
    for row in rows.values():
        expect(row).to_contain_text(re.compile(r"\d"), timeout=SLOW)
        expect(row).not_to_contain_text("…", timeout=SLOW)
    sizes = {n: int(r.inner_text().split("\t")[1].replace(",", "")) for n, r in rows.items()}
    assert 0.9 * sizes["Bitstream"] < sizes["WebP"] <= sizes["Bitstream"]
    assert "lowest quality" in rows["JPEG"].inner_text() or sizes["JPEG"] <= sizes["Bitstream"]
    original = only(opened, "left", "original")
    webp = only(opened, "left", "webp")
    error = np.abs(webp.astype(int) - original).mean()
    assert 0 < error < 8


# Draft and final picture


def test_the_draft_is_shown_first_and_then_replaced_by_the_final_picture(
    opened: Page, service: Service, tiny_file: Path
) -> None:
    opened.emulate_media(reduced_motion="no-preference")
    opened.locator("[name=seed]").fill("31")
    late = Late(opened, "**/events")
    choose(opened, tiny_file)
    expect(opened.locator("#times")).to_contain_text(re.compile(r"Instant: \d+ ms"), timeout=SLOW)
    draft_ms = opened.evaluate("performance.getEntriesByName('draft').map((e) => e.duration)")
    assert len(draft_ms) == 1
    expect(opened.locator("#ring")).to_be_visible()
    opened.locator("[data-do=one]").click()
    opened.locator("#split").fill("0")
    draft = screen(opened)
    late.wait()
    late.go_on()
    expect(opened.locator("#times")).to_contain_text("final:", timeout=SLOW)
    expect(opened.locator("#ring")).to_be_hidden()
    opened.wait_for_timeout(400)
    after = screen(opened)
    instant = api_image(service, job(opened), realism=0)
    final = api_image(service, job(opened), min_tier="perceptual")
    np.testing.assert_array_equal(centre(draft, instant), instant)
    np.testing.assert_array_equal(centre(after, final), final)  # where the draft was


def test_previews_are_shown_while_the_status_counts_steps(
    opened: Page, tmp_path: Path, photo: Pixels
) -> None:
    (tmp_path / "a.png").write_bytes(image.write(photo[:60, :100].copy(), "png"))
    opened.locator("[name=tier]").select_option("ddim-100")
    choose(opened, tmp_path / "a.png")
    expect(opened.locator("#stand")).to_have_text(re.compile(r"step \d+ of 100"), timeout=SLOW)
    instant = only(opened, "left", "instant")
    with opened.expect_response(re.compile("/preview"), timeout=SLOW):
        opened.locator("#split").fill("0")
    opened.wait_for_timeout(200)
    preview = screen(opened)
    drawn(opened)
    assert len({pixels.tobytes() for pixels in (instant, preview, screen(opened))}) == 3


def test_the_queue_position_is_shown_and_a_job_can_be_cancelled_and_retried(
    opened: Page, service: Service, tiny_file: Path, tiny_msh: bytes
) -> None:
    blocker = service.client.post(
        "/v1/decodes",
        params={"tier": "ddpm-1000", "seed": 77},
        content=tiny_msh,
        headers={"Prefer": "respond-async"},
    )
    opened.locator("[name=seed]").fill("78")
    choose(opened, tiny_file)
    expect(opened.locator("#stand")).to_have_text(re.compile("(ahead|next) in the queue"))
    opened.locator("#cancel").click()
    expect(opened.locator("#problem")).to_contain_text("Cancelled", timeout=SLOW)
    state = service.client.get(f"/v1/decodes/{job(opened)}").json()
    assert state["status"] == "canceled"
    service.client.delete(f"/v1/decodes/{blocker.json()['id']}")
    opened.locator("#retry").click()
    drawn(opened)
    expect(opened.locator("#problem")).to_be_hidden()
    expect(opened.locator("#times")).to_contain_text("final")


def test_a_copied_link_opens_the_same_decode(
    opened: Page, service: Service, tiny_file: Path
) -> None:
    opened.locator("[name=seed]").fill("5")
    draw(opened, tiny_file)
    id = job(opened)
    expected = only(opened, "right", "drawn")
    opened.context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened.locator("#link").click()
    expect(opened.locator("#link")).to_have_text("Copied")
    assert opened.evaluate("() => navigator.clipboard.readText()") == opened.url
    for other in (opened.context.new_page(), opened):  # elsewhere, and again
        sent = requests(other)
        if other is opened:
            other.reload()
        else:
            other.goto(opened.url)
        expect(other.locator("#right")).to_have_text("Perceptual")
        np.testing.assert_array_equal(only(other, "right", "drawn"), expected)
        assert not any(r.method == "POST" for r in sent)
        assert job(other) == id
        expect(other.locator("[name=tier]")).to_be_disabled()
        expect(other.locator("[name=seed]")).to_have_value("5")
        expect(other.locator("#rows")).to_contain_text("Bitstream")


def test_seeds_of_2_to_the_53_and_more_are_exact(opened: Page, tiny_file: Path) -> None:
    seed = 2**53 + 1
    opened.locator("[name=seed]").fill(str(seed))
    draw(opened, tiny_file)
    other = opened.context.new_page()
    other.goto(opened.url)
    expect(other.locator("[name=seed]")).to_have_value(str(seed))
    for value, following in ((seed, seed + 1), (2**64 - 1, 0)):
        opened.locator("[name=seed]").fill(str(value))
        with opened.expect_request(re.compile(rf"tier=perceptual&seed={following}$")):
            opened.locator("#again").click()
        expect(opened.locator("[name=seed]")).to_have_value(str(following))


def test_opening_another_file_cancels_the_running_decode(
    opened: Page, service: Service, tiny_file: Path, tiny_png: Path
) -> None:
    opened.locator("[name=tier]").select_option("ddpm-1000")
    choose(opened, tiny_file)
    expect(opened.locator("#stand")).to_have_text(re.compile("step"), timeout=SLOW)
    first = job(opened)
    opened.locator("[name=tier]").evaluate("e => e.value = 'perceptual'")
    draw(opened, tiny_png)
    assert wait_for(service.client, f"/v1/decodes/{first}")["status"] == "canceled"


def test_a_decode_that_is_replaced_before_its_response_is_cancelled(
    opened: Page, service: Service, tiny_file: Path, tiny_png: Path
) -> None:
    opened.locator("[name=tier]").select_option("ddpm-1000")
    late = Late(opened, "**/v1/decodes?*")
    choose(opened, tiny_file)
    late.wait()
    opened.locator("[name=tier]").evaluate("e => e.value = 'perceptual'")
    choose(opened, tiny_png)
    with opened.expect_response(re.compile("tier=ddpm-1000")) as answer:
        late.go_on()
    expect(opened.locator("#right")).to_have_text("Perceptual", timeout=SLOW)
    first = wait_for(service.client, answer.value.headers["location"])
    assert first["status"] == "canceled"


def test_a_request_over_the_quota_is_retried(opened: Page, tiny_file: Path) -> None:
    refused: list[Route] = []

    def once(route: Route) -> None:
        if refused:
            return route.continue_()
        refused.append(route)
        route.fulfill(status=429, headers={"Retry-After": "1"}, json={"title": "Too many requests"})

    opened.route("**/image?*", once)
    draw(opened, tiny_file)
    assert len(refused) == 1
    expect(opened.locator("#right")).to_have_text("Perceptual")
    expect(opened.locator("#problem")).to_be_hidden()


def test_the_old_picture_is_removed_when_another_file_is_opened(
    opened: Page, tiny_file: Path, tiny_png: Path
) -> None:
    draw(opened, tiny_png)
    late = Late(opened, "**/v1/decodes?*")
    choose(opened, tiny_file)
    late.wait()
    expect(opened.locator("#file")).to_have_text("tiny.msh")
    assert np.ptp(screen(opened).reshape(-1, 3), axis=0).max() == 0
    late.go_on()
    drawn(opened)


def test_the_instant_picture_is_shown_if_the_tier_is_too_expensive(opened: Page) -> None:
    opened.locator("[name=tier]").select_option("ddpm-1000")
    opened.locator("[data-sample=parrots]").click()
    expect(opened.locator("#problem")).to_contain_text("megapixel", timeout=SLOW)
    expect(opened.locator("#times")).to_contain_text("Instant")
    opened.locator("[name=tier]").select_option("perceptual")
    expect(opened.locator("#right")).to_have_text("Perceptual", timeout=SLOW)
    expect(opened.locator("#problem")).to_be_hidden()


# Comparison


def test_mouse_and_keyboard_move_the_divider(opened: Page, tiny_file: Path) -> None:
    draw(opened, tiny_file)
    left, right = only(opened, "left", "instant"), only(opened, "right", "drawn")
    split = opened.locator("#split")

    def check() -> None:
        now, at = screen(opened), int(float(split.input_value()) / 100 * left.shape[1] + 0.5)
        np.testing.assert_array_equal(now[:, :at], left[:, :at])
        np.testing.assert_array_equal(now[:, at:], right[:, at:])

    split.fill("50")
    check()
    split.focus()
    opened.keyboard.press("ArrowLeft")
    assert float(split.input_value()) < 50
    check()
    box = opened.locator("#stage").bounding_box()
    assert box is not None
    x, y = box["x"] + float(split.input_value()) / 100 * box["width"], box["y"] + box["height"] / 2
    opened.mouse.move(x, y)
    opened.mouse.down()
    opened.mouse.move(x + 60, y, steps=4)
    opened.mouse.up()
    assert float(split.input_value()) == pytest.approx(50 + 100 * 60 / box["width"], abs=1)
    check()


def test_zoom_and_pan_move_both_pictures_and_show_single_pixels(
    opened: Page, tiny: Pixels, tiny_png: Path
) -> None:
    draw(opened, tiny_png)
    only(opened, "left", "original")
    canvas = opened.locator("#canvas")
    for _ in range(20):
        opened.locator("[data-do=in]").click()
    expect(opened.locator("#zoom")).to_have_text("3200 %")
    before = screen(opened)
    blocks = before[before.shape[0] // 2 - 64 :, before.shape[1] // 2 - 64 :][:128, :128]
    colours = {tuple(c) for c in blocks.reshape(-1, 3)}
    assert colours <= {tuple(c) for c in tiny.reshape(-1, 3)}  # no interpolation
    assert len(colours) <= 5 * 5
    canvas.focus()
    opened.keyboard.press("ArrowRight")
    np.testing.assert_array_equal(screen(opened)[:, :-64], before[:, 64:])
    box = canvas.bounding_box()
    assert box is not None
    opened.mouse.move(box["x"] + 200, box["y"] + 200)
    opened.mouse.down()
    opened.mouse.move(box["x"] + 264, box["y"] + 200, steps=4)
    opened.mouse.up()
    np.testing.assert_array_equal(screen(opened), before)
    opened.mouse.wheel(0, 200)
    expect(opened.locator("#zoom")).to_have_text("1600 %")
    opened.locator("#split").fill("50")
    opened.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 3)
    opened.mouse.wheel(0, 200)  # on the divider
    expect(opened.locator("#zoom")).to_have_text("800 %")
    canvas.focus()
    opened.keyboard.press("0")
    expect(canvas).to_have_class("fitted")
    opened.keyboard.press("1")
    expect(opened.locator("#zoom")).to_have_text("100 %")


def test_gestures_without_effect_leave_the_picture_fitted(opened: Page, tiny_png: Path) -> None:
    draw(opened, tiny_png)
    box = opened.locator("#canvas").bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 3, box["y"] + box["height"] / 2
    opened.mouse.move(x, y)
    opened.mouse.wheel(200, 0)
    opened.mouse.down(button="right")
    opened.mouse.move(x - 50, y)
    opened.mouse.up(button="right")
    opened.mouse.move(x, y)
    opened.locator("#canvas").press("ArrowLeft")
    expect(opened.locator("#split")).to_have_value("50")
    expect(opened.locator("#zoom")).to_have_text("200 %")
    opened.mouse.dblclick(x, y)
    expect(opened.locator("#zoom")).to_have_text("100 %")


def test_one_finger_moves_the_divider_and_two_fingers_zoom(
    browser_touch: Page, service: Service, tiny_file: Path
) -> None:
    page = browser_touch
    page.goto(str(service.client.base_url))
    draw(page, tiny_file)
    box = page.locator("#canvas").bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    touch = page.context.new_cdp_session(page)

    def fingers(kind: str, *at: tuple[float, float]) -> None:
        points = [{"x": a, "y": b, "id": i} for i, (a, b) in enumerate(at)]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    fingers("touchStart", (x, y + 100))
    for d in (20, 40, 60, 80):
        fingers("touchMove", (x + d, y + 100))
    fingers("touchEnd")
    moved = 50 + 100 * 80 / box["width"]
    assert float(page.locator("#split").input_value()) == pytest.approx(moved, abs=2)

    before = page.locator("#zoom").inner_text()
    page.locator("[data-do=in]").tap()  # zoomed in, gestures pan and zoom the picture
    middle = page.locator("#zoom").inner_text()
    fingers("touchStart", (x - 30, y), (x + 30, y))
    for d in (40, 50, 60):
        fingers("touchMove", (x - d, y), (x + d, y))
    fingers("touchEnd")
    after = page.locator("#zoom").inner_text()
    b, m, a = (int(text.split()[0]) for text in (before, middle, after))
    assert b < m < a
    assert a == pytest.approx(2 * m, rel=0.1)


@pytest.fixture
def browser_touch(browser: Any) -> Any:
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True
    )
    yield context.new_page()
    context.close()


def test_the_difference_is_amplified_four_times(opened: Page, tiny_file: Path) -> None:
    draw(opened, tiny_file)
    left, right = only(opened, "left", "instant"), only(opened, "right", "drawn")
    opened.locator("[data-do=difference]").click()
    expect(opened.locator("[data-do=difference]")).to_have_attribute("aria-pressed", "true")
    expected = np.minimum(4 * np.abs(left.astype(int) - right), 255)
    np.testing.assert_array_equal(screen(opened), expected)
    opened.locator("#canvas").press("d")
    expect(opened.locator("[data-do=difference]")).to_have_attribute("aria-pressed", "false")


# Settings


def test_realism_is_mixed_in_the_browser_without_a_request(
    opened: Page, service: Service, tiny_file: Path
) -> None:
    draw(opened, tiny_file)
    only(opened, "right", "drawn")
    sent = requests(opened)
    opened.locator("[name=realism]").fill("40")
    expect(opened.locator("#right")).to_have_text("Perceptual at 40 %")
    expect(opened.locator("#percent")).to_have_text("40 %")
    mixed = screen(opened)
    assert [r.url for r in sent if "readyz" not in r.url] == []
    expected = api_image(service, job(opened), min_tier="perceptual", realism=0.4)
    assert np.abs(centre(mixed, expected).astype(int) - expected).max() <= 2


def test_changing_tier_or_seed_decodes_again_and_shows_the_tier(
    opened: Page, tiny_file: Path
) -> None:
    draw(opened, tiny_file)
    ids = [job(opened)]
    with opened.expect_request(re.compile(r"tier=perceptual&seed=1$")):
        opened.locator("#again").click()
    expect(opened.locator("[name=seed]")).to_have_value("1")
    drawn(opened)
    ids.append(job(opened))
    with opened.expect_request(re.compile(r"tier=ddim-10&seed=1$")):
        opened.locator("[name=tier]").select_option("ddim-10")
    expect(opened.locator("#about")).to_contain_text("DDIM, 10 steps")
    drawn(opened)
    expect(opened.locator("#right")).to_have_text("DDIM-10")
    assert len({*ids, job(opened)}) == 3
    with opened.expect_response(re.compile(r"tier=perceptual&seed=1$")) as again:
        opened.locator("[name=tier]").select_option("perceptual")
    assert again.value.headers["x-cache"] == "hit"  # at once, and nothing is queued
    expect(opened.locator("#right")).to_have_text("Perceptual")


def test_a_note_says_that_detail_is_synthesised(opened: Page) -> None:
    expect(opened.locator("#note")).to_contain_text("synthesised")
    expect(opened.locator("#note")).to_contain_text("not recorded by a camera")


# Errors, accessibility, layout


def test_errors_are_shown_with_the_api_s_title_and_detail(
    opened: Page, service: Service, tmp_path: Path, tiny_msh: bytes
) -> None:
    broken = tmp_path / "broken.msh"
    broken.write_bytes(tiny_msh[:-1] + bytes([tiny_msh[-1] ^ 1]))
    wide = tmp_path / "wide.png"
    Image.new("RGB", (1200, 1000)).save(wide)
    text = tmp_path / "text.png"
    text.write_bytes(b"no picture")
    for file, path in ((broken, "decodes"), (wide, "encodes"), (text, "encodes")):
        problem = service.client.post(f"/v1/{path}", content=file.read_bytes()).json()
        choose(opened, file)
        expect(opened.locator("#problem")).to_have_attribute("role", "alert")
        expect(opened.locator("#problem p")).to_have_text(f"{problem['title']} {problem['detail']}")
        expect(opened.locator("#retry")).to_be_hidden()
        opened.locator("#dismiss").press("Enter")
        expect(opened.locator("#problem")).to_be_hidden()
        if file != wide:  # a valid picture, shown although it is too large to encode
            expect(opened.locator("#welcome")).to_be_visible()
            expect(opened.locator("#pick")).to_be_focused()  # the button is gone


def test_a_request_can_be_retried_when_the_service_is_back(opened: Page, tiny_file: Path) -> None:
    opened.route("**/v1/decodes?*", lambda route: route.abort())
    choose(opened, tiny_file)
    expect(opened.locator("#problem")).to_contain_text("cannot be reached")
    opened.unroute("**/v1/decodes?*")
    opened.locator("#retry").click()
    drawn(opened)
    expect(opened.locator("#right")).to_have_text("Perceptual", timeout=SLOW)
    expect(opened.locator("#welcome")).to_be_hidden()
    expect(opened.locator("#source")).to_be_visible()


def test_the_instant_picture_is_shown_if_the_queue_is_full(opened: Page, tiny_file: Path) -> None:
    problem = {
        "type": "urn:afterimage:problem:busy", "title": "Busy", "status": 503,
        "detail": "2000 s of work are queued",
    }  # fmt: skip
    full = "**/v1/decodes?tier=perceptual*"
    opened.route(full, lambda route: route.fulfill(
        status=503, content_type="application/problem+json", body=json.dumps(problem)
    ))  # fmt: skip
    choose(opened, tiny_file)
    expect(opened.locator("#problem")).to_contain_text("2000 s of work")
    expect(opened.locator("#times")).to_contain_text("Instant")
    expect(opened.locator("#welcome")).to_be_hidden()
    opened.unroute(full)
    opened.locator("#retry").press("Enter")
    expect(opened.locator("#canvas")).to_be_focused()  # the button is gone
    expect(opened.locator("#right")).to_have_text("Perceptual", timeout=SLOW)
    expect(opened.locator("#problem")).to_be_hidden()


def test_tiers_are_loaded_again_after_a_failure(
    page: Page, service: Service, tiny_file: Path
) -> None:
    page.route("**/v1/tiers", lambda route: route.abort())
    page.goto(str(service.client.base_url))
    expect(page.locator("#problem")).to_contain_text("cannot be reached")
    page.unroute("**/v1/tiers")
    choose(page, tiny_file)
    expect(page.locator("#right")).to_have_text("Perceptual", timeout=SLOW)


def test_the_second_of_two_quick_samples_is_shown(opened: Page) -> None:
    opened.locator("[name=tier]").select_option("instant")
    both = [Late(opened, f"**/samples/{name}.webp") for name in ("parrots", "girl")]
    for name, late in zip(("parrots", "girl"), both, strict=True):
        opened.locator(f"[data-sample={name}]").click()
        late.wait()
    expect(opened.locator("#ring")).to_be_visible()
    expect(opened.locator("#cancel")).to_be_hidden()  # nothing is drawn yet
    for late in both:
        with opened.expect_response(late.pattern):
            late.go_on()
    expect(opened.locator("#file")).to_have_text("A painted face")
    drawn(opened)


def test_the_second_of_two_quick_files_is_shown(
    opened: Page, photo: Pixels, tmp_path: Path
) -> None:
    cuts = [photo[:90, :120].copy(), photo[200:290, 200:320].copy()]
    for name, pixels in zip("ab", cuts, strict=True):
        (tmp_path / f"{name}.png").write_bytes(image.write(pixels, "png"))
    opened.evaluate(
        """() => {
          const original = createImageBitmap;
          let calls = 0;
          window.createImageBitmap = async (...args) => {
            if ((calls += 1) === 1) await new Promise((done) => setTimeout(done, 500));
            return original(...args);
          };
        }"""
    )
    for name in "ab":
        choose(opened, tmp_path / f"{name}.png")
    expect(opened.locator("#right")).to_have_text("Perceptual", timeout=SLOW)
    opened.wait_for_timeout(600)
    assert np.array_equal(centre(only(opened, "left", "original"), cuts[1]), cuts[1])


def test_transparent_pixels_are_white(opened: Page, tmp_path: Path) -> None:
    """In the original as in the decoded picture, although the page is dark."""
    opened.emulate_media(color_scheme="dark")
    Image.new("RGBA", (120, 90), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    draw(opened, tmp_path / "clear.png")
    white = np.full((90, 120, 3), 255, np.uint8)
    assert np.array_equal(centre(only(opened, "left", "original"), white), white)


def test_the_canvas_has_one_pixel_per_screen_pixel(opened: Page, tiny_file: Path) -> None:
    draw(opened, tiny_file)
    for width in (900, 1111):
        opened.set_viewport_size({"width": width, "height": 700})
        screen(opened)
        sides = opened.evaluate(
            """() => {
              const canvas = document.querySelector("#canvas");
              const box = canvas.getBoundingClientRect();
              return [canvas.width, canvas.height, box.width, box.height];
            }"""
        )
        assert sides[:2] == [round(side) for side in sides[2:]]


@pytest.fixture(scope="module")
def pages(browser: Browser, service: Service, tiny_png: Path) -> Iterator[tuple[Page, Page]]:
    """The page as it opens, and with a picture."""
    with window(browser) as made:
        found = made.new_page(), made.new_page()
        for page in found:
            visit(page, service)
        draw(found[1], tiny_png)
        yield found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(360, 640), (1280, 800), (3840, 2160)])
def test_the_page_is_accessible_in_both_colour_schemes_from_360_pixels_to_4k(
    pages: tuple[Page, Page], scheme: Any, size: tuple[int, int]
) -> None:
    axe = Axe()
    for page in pages:
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": size[0], "height": size[1]})
        dark = sum(map(int, re.findall(r"\d+", background(page))[:3])) < 3 * 128
        assert dark == (scheme == "dark")
        violations = axe.run(page, options={"resultTypes": ["violations"]}).response["violations"]
        assert [(v["id"], [n["target"] for n in v["nodes"]]) for v in violations] == []
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= size[0]


def background(page: Page) -> str:
    text: str = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return text


def test_the_focus_is_visible(opened: Page, tiny_file: Path) -> None:
    draw(opened, tiny_file)
    seen = set()
    for _ in range(40):
        opened.keyboard.press("Tab")
        name, outline, knob = opened.evaluate(
            """() => {
                const e = document.activeElement;
                if (e === document.body) return ["body", 0, ""];
                const at = e.type === "radio" ? e.nextElementSibling : e;
                const style = getComputedStyle(at);
                return [e.id || e.name || e.textContent, parseFloat(style.outlineWidth) *
                    (style.outlineStyle !== "none"), style.getPropertyValue("--knob")];
            }"""
        )
        if name == "body":
            continue
        seen.add(name)
        assert outline >= 2 or (name == "split" and knob == "#4fd8c8"), name
    assert {"canvas", "split", "left", "right", "tier", "seed", "again", "realism"} <= seen


def test_reduced_motion_disables_fades(opened: Page, tiny_file: Path) -> None:
    opened.locator("[name=seed]").fill("32")
    choose(opened, tiny_file)
    expect(opened.locator("#times")).to_contain_text("final:", timeout=SLOW)
    first = screen(opened)
    opened.wait_for_timeout(400)
    np.testing.assert_array_equal(screen(opened), first)
    arc = "getComputedStyle(document.querySelector('#arc')).transitionDuration"
    assert opened.evaluate(arc) == "0s"


def test_the_page_is_small_and_loads_nothing_from_other_origins(
    page: Page, service: Service
) -> None:
    answers: list[Any] = []
    page.on("response", lambda answer: answers.append(answer))
    url = str(service.client.base_url)
    page.goto(url)
    expect(page.locator("[name=tier]")).to_have_value("perceptual")
    loaded = [r for r in answers if "/v1/" not in r.url and "readyz" not in r.url]
    weights = {r.url: len(r.body()) for r in loaded}
    worker = (Path(str(files.directory)) / "rivals.js").stat().st_size  # is loaded later
    assert sum(weights.values()) + worker <= HEAVIEST, weights
    page.locator("[data-sample=parrots]").click()
    drawn(page)
    origin = urlsplit(url).netloc
    assert {urlsplit(r.url).netloc for r in answers if not r.url.startswith("blob:")} == {origin}
    policy = service.client.get("/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
