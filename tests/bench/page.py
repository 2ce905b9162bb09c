"""Benchmark of the web page in Chromium.

make bench PART=page

Measures pictures of 0.4 and 12 megapixels: the time from the API's response until the draft is on
the screen, and the browser's frame times while the divider or the realism slider moves in every
frame. Service, worker and browser share the machine.
"""

import io
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, FilePayload, Page, expect, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench import machine
from tests.support.browser import launch
from tests.support.data import PHOTO
from tests.support.service import run_service

SIZES = ((768, 512), (4000, 3000))
VIEWS = ((1280, 800), (2560, 1440))
FRAMES = 120
TIMEOUT_MS = 600_000
MOVE = """async ([name, frames]) => {
    const slider = document.querySelector(name);
    const stamps = [];
    await new Promise((done) => requestAnimationFrame(function frame(now) {
        stamps.push(now);
        slider.value = 50 + 45 * Math.sin(stamps.length / 10);
        slider.dispatchEvent(new Event("input"));
        if (stamps.length > frames) done(); else requestAnimationFrame(frame);
    }));
    return stamps.slice(1).map((now, i) => now - stamps[i]);
}"""


def photograph(size: tuple[int, int]) -> bytes:
    """The sample photograph, resized, as a JPEG."""
    out = io.BytesIO()
    Image.open(PHOTO).resize(size, Image.Resampling.LANCZOS).save(out, "jpeg", quality=92)
    return out.getvalue()


def frames(page: Page, slider: str) -> dict[str, float]:
    """Frame times while the slider with this selector moves."""
    page.evaluate(MOVE, [slider, 10])
    ms = np.array(page.evaluate(MOVE, [slider, FRAMES]))
    return {
        "mean_ms": float(ms.mean()),
        "p95_ms": float(np.quantile(ms, 0.95)),
        "late": float((ms > 1.5 * 1000 / 60).mean()),  # share of dropped frames
    }


def measure(browser: Browser, url: str, size: tuple[int, int], view: tuple[int, int]) -> Any:
    page = browser.new_page(viewport={"width": view[0], "height": view[1]})
    page.goto(url)
    expect(page.locator("[name=tier]")).to_have_value("perceptual")
    file: FilePayload = {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": photograph(size)}
    page.set_input_files("#chosen", files=[file])
    expect(page.locator("#right")).to_have_text("Perceptual", timeout=TIMEOUT_MS)
    expect(page.locator("#ring")).to_be_hidden(timeout=TIMEOUT_MS)
    expect(page.locator("#rows")).not_to_contain_text("…", timeout=TIMEOUT_MS)
    page.wait_for_timeout(1000)
    draft = page.evaluate("performance.getEntriesByName('draft').map((e) => e.duration)")
    row = {
        "picture": "×".join(map(str, size)),
        "view": "×".join(map(str, view)),
        "draft_ms": float(draft[0]) if draft else None,
        "divider": frames(page, "#split"),
        "realism": frames(page, "[name=realism]"),
    }
    page.close()
    return row


def main() -> int:
    rows = []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = launch(playwright)
        with run_service(Path(folder)) as service:
            for size in SIZES:
                for view in VIEWS:
                    rows.append(measure(browser, str(service.client.base_url), size, view))
                    print(rows[-1], flush=True)  # noqa: T201
        browser.close()
    about = machine.describe()
    environment = ", ".join(f"{k} {v}" for k, v in about.items())
    head = ["picture", "window", "draft, ms", "divider, ms per frame", "p95", "late"]
    head += ["realism", "p95", "late"]
    table = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["picture"], row["view"], f"{row['draft_ms']:.0f}" if row["draft_ms"] else "–"]
        for slider in ("divider", "realism"):
            ms = row[slider]
            cells += [f"{ms['mean_ms']:.1f}", f"{ms['p95_ms']:.1f}", f"{ms['late']:.0%}"]
        table.append("| " + " | ".join(cells) + " |")
    title = f"# The page in Chromium\n\n{environment}; rendered without a GPU\n\n"
    machine.write("page", {"machine": about, "rows": rows}, title + "\n".join(table) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
