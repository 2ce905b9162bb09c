"""`make demo`: send a photograph through the service and save the decoded pictures side by side."""

import argparse
import contextlib
import io
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from models import geometry, image
from service.cli.terminal import say

TIER = "perceptual"
START_TIMEOUT_S = 180.0
"""How long a service may take to start; the first start compiles code."""
TITLE_HEIGHT = 18
"""Pixels above each picture of a sheet."""


@dataclass(frozen=True, slots=True)
class Row:
    """One decoded picture, a row of the printed table."""

    quality: int
    tier: str
    bpp: float
    psnr: float
    seconds: float
    picture: Image.Image


def main() -> int:
    """Encode at qualities 1 to 3, decode each with both tiers, print a table, save the pictures."""
    parser = argparse.ArgumentParser(prog="python -m service.cli.demo", description=__doc__)
    parser.add_argument("photo", type=Path, help="photograph to encode")
    parser.add_argument("--url", help="a running service (default: start one for the demo)")
    parser.add_argument(
        "--out", type=Path, default=Path("demo-out"), help="output folder (default: demo-out)"
    )
    args = parser.parse_args()
    original = Image.fromarray(image.read(args.photo.read_bytes(), geometry.MAX_PIXELS))
    args.out.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        url = args.url or stack.enter_context(_service())
        client = stack.enter_context(httpx.Client(base_url=url, timeout=120))
        rows: list[Row] = []
        for quality in (1, 2, 3):
            rows += _decode_both(client, args.photo, original, quality)
            path = args.out / f"{args.photo.stem}-q{quality}.png"
            _side_by_side(original, rows[-2], rows[-1]).save(path)
            say(f"saved {path}: original | instant | {TIER}")
    say(f"\n{'quality':>7} {'tier':<10} {'bpp':>6} {'PSNR':>6} {'seconds':>8}")
    for r in rows:
        say(f"{r.quality:>7} {r.tier:<10} {r.bpp:6.3f} {r.psnr:6.2f} {r.seconds:8.2f}")
    return 0


def _decode_both(
    client: httpx.Client, photo: Path, original: Image.Image, quality: int
) -> list[Row]:
    """Encode the photograph; decode the bitstream with the instant tier and with `TIER`."""
    encoded = _checked(
        client.post("/v1/encodes", params={"quality": quality}, content=photo.read_bytes())
    )
    bpp = float(encoded.headers["x-afterimage-bpp"])
    start = time.monotonic()
    instant = _checked(client.post("/v1/decodes", content=encoded.content))
    instant_s = time.monotonic() - start
    start = time.monotonic()
    final = _checked(client.post("/v1/decodes", params={"tier": TIER}, content=encoded.content))
    if final.headers["x-cache"] == "hit":
        say(f"quality {quality}: the {TIER} picture was in the cache")
    else:
        location = str(final.url.join(final.headers["location"]))
        _wait(client, location, f"quality {quality}")
        final = _checked(client.get(f"{location}/image"))
    final_s = time.monotonic() - start
    rows = []
    for tier, response, seconds in (("instant", instant, instant_s), (TIER, final, final_s)):
        picture = Image.open(io.BytesIO(response.content)).convert("RGB")
        rows.append(Row(quality, tier, bpp, _psnr(original, picture), seconds, picture))
    return rows


def _wait(client: httpx.Client, location: str, title: str) -> None:
    """Show the progress of a decode until it has succeeded; `SystemExit` if it fails."""
    with tqdm(desc=title, unit="step") as bar:
        while True:
            state = _checked(client.get(location)).json()
            bar.total, bar.n = state["total"], state["step"]
            bar.set_postfix_str(state["status"])
            if state["status"] == "succeeded":
                return
            if state["status"] in {"failed", "canceled"}:
                raise SystemExit(f"the decode {location} {state['status']}: {state['error']}")
            time.sleep(0.1)


@contextlib.contextmanager
def _service() -> Iterator[str]:
    """Run a service on a free port; yields its URL."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-P", "-m", "service.cli", "serve", "--port", str(port)]
    process = subprocess.Popen(command)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_TIMEOUT_S
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/readyz").status_code == 200:
                    break
            time.sleep(0.2)
        else:
            status = process.poll()
            reason = "is not ready" if status is None else f"exited with status {status}"
            raise SystemExit(f"the service {reason}; see its output above")
        yield url
    finally:
        process.terminate()
        process.wait()


def _side_by_side(original: Image.Image, instant: Row, final: Row) -> Image.Image:
    """The original and both decoded pictures in a row, each under a title."""
    columns = (
        ("original", original),
        (f"instant  {instant.bpp:.3f} bpp  {instant.psnr:.2f} dB", instant.picture),
        (f"{TIER}  same bytes  {final.psnr:.2f} dB", final.picture),
    )
    sheet = Image.new("RGB", (3 * original.width, original.height + TITLE_HEIGHT), "white")
    for i, (title, picture) in enumerate(columns):
        sheet.paste(picture, (i * original.width, TITLE_HEIGHT))
        ImageDraw.Draw(sheet).text((i * original.width + 4, 3), title, fill="black")
    return sheet


def _psnr(a: Image.Image, b: Image.Image) -> float:
    mse = float(np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean())
    return 10 * float(np.log10(255**2 / mse)) if mse else float("inf")


def _checked(response: httpx.Response) -> httpx.Response:
    """The response; `SystemExit` unless its status is 200."""
    if response.status_code != 200:
        request = response.request
        raise SystemExit(f"{request.method} {request.url}: {response.status_code} {response.text}")
    return response


if __name__ == "__main__":
    sys.exit(main())
