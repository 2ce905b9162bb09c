"""Screenshots of the page in three sizes, light and dark: `make screens`.

All are saved in `runs/screens`; those of the README also next to this file.
"""

import io
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.browser import launch
from tests.support.service import run_service

HERE = Path(__file__).parent
FOLDER = Path("runs/screens")
TIMEOUT_MS = 600_000
SIZES = {"phone": (390, 844), "laptop": (1280, 800), "desktop": (2560, 1440)}
IN_README = {("phone", "light"), ("laptop", "dark"), ("desktop", "light")}


def write(page: Page, file: Path) -> None:
    """Save a screenshot as WebP."""
    shot = Image.open(io.BytesIO(page.screenshot(animations="disabled"))).convert("RGB")
    shot.save(file, quality=80, method=6)


def take(browser: Browser, url: str, size: str, scheme: Any) -> None:
    """Screenshots of the start page and of a decoded sample."""
    width, height = SIZES[size]
    page = browser.new_page(
        viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce"
    )
    page.goto(url)
    expect(page.locator("[name=tier]")).to_have_value("perceptual")
    write(page, FOLDER / f"{size}-{scheme}-welcome.webp")
    page.locator("[data-sample=girl]" if size == "phone" else "[data-sample=parrots]").click()
    expect(page.locator("#canvas")).to_have_attribute("aria-busy", "false", timeout=TIMEOUT_MS)
    expect(page.locator("#rows")).not_to_contain_text("…", timeout=TIMEOUT_MS)
    page.locator("[name=left]").select_option("jpeg" if size == "laptop" else "instant")
    if size == "desktop":
        for _ in range(2):
            page.locator("[data-do=in]").click()
    write(page, FOLDER / f"{size}-{scheme}.webp")
    if (size, scheme) in IN_README:
        write(page, HERE / f"{size}.webp")
    page.close()


def main() -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = launch(playwright)
        with run_service(Path(folder)) as service:
            for size in SIZES:
                for scheme in ("light", "dark"):
                    take(browser, str(service.client.base_url), size, scheme)
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
