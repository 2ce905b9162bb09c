"""The page in Chromium: `make bench PART=page`.

For a picture of 0.4 and one of 12 megapixels: milliseconds from the API's answer to the draft on
the screen, and the times between frames, as the browser stamps them, while the divider or realism
moves with every frame. Service, worker and browser share the machine.
"""

import io
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench import machine
from tests.support.browser import launch
from tests.support.data import PHOTO
from tests.support.service import run_service

SIZES = ((768, 512), (4000, 3000))
VIEWS = ((1280, 800), (2560, 1440))
FRAMES = 120
LONGEST = 600_000
MOVE = """async ([name, frames]) => {
    const knob = document.querySelector(name);
    const stamps = [];
    await new Promise((done) => requestAnimationFrame(function frame(now) {
        stamps.push(now);
        knob.value = 50 + 45 * Math.sin(stamps.length / 10);
        knob.dispatchEvent(new Event("input"));
        if (stamps.length > frames) done(); else requestAnimationFrame(frame);
    }));
    return stamps.slice(1).map((now, i) => now - stamps[i]);
}"""


def photograph(size: tuple[int, int]) -> bytes:
    out = io.BytesIO()
    Image.open(PHOTO).resize(size, Image.Resampling.LANCZOS).save(out, "jpeg", quality=92)
    return out.getvalue()


def frames(page: Page, knob: str) -> dict[str, float]:
    page.evaluate(MOVE, [knob, 10])
    ms = np.array(page.evaluate(MOVE, [knob, FRAMES]))
    return {
        "mean_ms": float(ms.mean()),
        "p95_ms": float(np.quantile(ms, 0.95)),
        "late": float((ms > 1.5 * 1000 / 60).mean()),  # a frame was left out
    }


def measure(browser: Browser, url: str, size: tuple[int, int], view: tuple[int, int]) -> Any:
    page = browser.new_page(viewport={"width": view[0], "height": view[1]})
    page.goto(url)
    expect(page.locator("[name=tier]")).to_have_value("perceptual")
    file = {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": photograph(size)}
    page.set_input_files("#chosen", files=[file])  # type: ignore[list-item]
    expect(page.locator("#right")).to_have_text("Perceptual", timeout=LONGEST)
    expect(page.locator("#ring")).to_be_hidden(timeout=LONGEST)
    expect(page.locator("#rows")).not_to_contain_text("…", timeout=LONGEST)
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
    told = ", ".join(f"{k} {v}" for k, v in about.items())
    table = [
        "| picture | window | draft, ms | divider, ms a frame | p95 | late | realism | p95 | late |"
    ]
    table.append("|" + "---|" * 9)
    for row in rows:
        cells = [row["picture"], row["view"], f"{row['draft_ms']:.0f}" if row["draft_ms"] else "–"]
        for knob in ("divider", "realism"):
            own = row[knob]
            cells += [f"{own['mean_ms']:.1f}", f"{own['p95_ms']:.1f}", f"{own['late']:.0%}"]
        table.append("| " + " | ".join(cells) + " |")
    head = f"# The page in Chromium\n\n{told}; drawn by the processor\n\n"
    machine.write("page", {"machine": about, "rows": rows}, head + "\n".join(table) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
