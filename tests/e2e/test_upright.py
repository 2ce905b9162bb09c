"""The page turns a photo as the service does, whatever the browser thinks of Exif data."""

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, Route

from models import image
from service.routes.page import files
from tests.support.pictures import tiff

TURN = """async ({ photo, type }) => {
  const { toUpright } = await import("/upright.js");
  const bytes = Uint8Array.from(atob(photo), (c) => c.charCodeAt(0));
  const bitmap = await toUpright(new Blob([bytes], { type }));
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d");
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, bitmap.width, bitmap.height);
  return [bitmap.height, bitmap.width, btoa(String.fromCharCode(...data))];
}"""


@pytest.fixture
def opened(page: Page) -> Page:
    """A page that can import the scripts of the service's page."""

    def answer(route: Route) -> None:
        name = route.request.url.rsplit("/", 1)[1]
        script = Path(str(files.directory)) / name
        if script.is_file():
            route.fulfill(path=script, content_type="text/javascript")
        else:
            route.fulfill(body="<!doctype html>", content_type="text/html")

    page.route("**/*", answer)
    page.goto("http://localhost:9/start")
    return page


@pytest.mark.parametrize("kind", [1, 3], ids=["BYTE", "SHORT"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_photos_are_turned_as_the_service_turns_them(opened: Page, format: str, kind: int) -> None:
    pixels = np.kron(np.random.default_rng(0).integers(0, 255, (2, 3, 3)), np.ones((16, 16, 1)))
    options: dict[str, dict[str, Any]] = {
        "WEBP": {"lossless": True},
        "JPEG": {"quality": 95, "subsampling": 0},
    }
    for orientation in range(1, 9):
        for order in "<>":
            out = io.BytesIO()
            exif = b"Exif\0\0" + tiff({274: (kind, [orientation])}, b"", order)
            picture = Image.fromarray(pixels.astype(np.uint8))
            picture.save(out, format, exif=exif, **options.get(format, {}))
            photo = base64.b64encode(out.getvalue()).decode()
            media = f"image/{format.lower()}"
            height, width, seen = opened.evaluate(TURN, {"photo": photo, "type": media})
            shown = np.frombuffer(base64.b64decode(seen), np.uint8).reshape(height, width, 4)
            read = image.read(out.getvalue(), 10**6)
            assert shown[..., :3].shape == read.shape, orientation
            assert np.abs(shown[..., :3].astype(int) - read).max() <= 8, orientation
