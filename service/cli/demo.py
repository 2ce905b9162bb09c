"""`make demo`: send a photograph through the service and save the decoded pictures side by side."""

import argparse
import contextlib
import io
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from PIL import Image
from tqdm import tqdm

from models import image
from models.errors import AfterimageError
from service.cli.sheet import jpeg_of_size, side_by_side
from service.cli.terminal import complain, say
from service.client import Client
from service.settings import ServiceSettings

TIER = "perceptual"
QUALITIES = (1, 2, 3)
START_TIMEOUT_S = 180.0
"""How long a service may take to start; the first start compiles code."""
LEGEND = f"""
bytes: size of the bitstream, or of the JPEG of about the same size. PSNR in dB: higher is closer to
the original, pixel by pixel. The {TIER} picture has a lower PSNR by design: it shows plausible
detail where the codec averages. Viewers prefer that, PSNR does not. Compare the pictures; other
measures are in tests/bench/README.md. seconds: until the picture has arrived."""


@dataclass(frozen=True, slots=True)
class Row:
    """One picture, a row of the printed table."""

    quality: int
    name: str
    size: int  # bytes of the file that it was decoded from
    psnr: float
    seconds: float | None  # None for the JPEG, which no service decodes
    picture: Image.Image


def main() -> int:
    """Encode at each quality, decode with both tiers, print a table, save the pictures."""
    parser = argparse.ArgumentParser(prog="python -m service.cli.demo", description=__doc__)
    parser.add_argument("photo", type=Path, help="photograph to encode")
    parser.add_argument("--url", help="a running service (default: start one for the demo)")
    parser.add_argument(
        "--out", type=Path, default=Path("demo-out"), help="output folder (default: demo-out)"
    )
    args = parser.parse_args()
    try:
        return _run(args.photo, args.url, args.out)
    except (httpx.TransportError, httpx.InvalidURL) as e:
        return complain(f"no service answers at {args.url}: {e}")
    except OSError as e:
        return complain(f"{e.filename or args.photo}: {e.strerror}")
    except AfterimageError as e:
        return complain(str(e))
    except KeyboardInterrupt:
        return 130


def _run(photo: Path, url: str | None, out: Path) -> int:
    settings = ServiceSettings()
    data = photo.read_bytes()
    try:
        original = Image.fromarray(image.read(data, settings.max_pixels))
    except AfterimageError as e:
        raise AfterimageError(f"{photo}: {e}") from e
    out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with contextlib.ExitStack() as stack:
        url = url or stack.enter_context(_service(settings.cache_dir, out / "service.log"))
        client = stack.enter_context(Client(url, os.environ.get("AFTERIMAGE_API_KEY", "")))
        for quality in QUALITIES:
            new = _decode_all(client, data, original, quality)
            path = out / f"{photo.stem}-q{quality}.png"
            titles = [("original", original)]
            titles += [(f"{r.name}, {r.size:,} bytes", r.picture) for r in new]
            side_by_side(titles).save(path)
            say(f"saved {path}: {' | '.join(title for title, _ in titles)}")
            rows += new
    say(f"\n{'quality':>7}  {'picture':<10} {'bytes':>9} {'PSNR':>6} {'seconds':>8}")
    for r in rows:
        seconds = "" if r.seconds is None else f" {r.seconds:8.2f}"
        say(f"{r.quality:>7}  {r.name:<10} {r.size:>9,} {r.psnr:6.2f}{seconds}")
    say(LEGEND)
    return 0


def _decode_all(client: Client, photo: bytes, original: Image.Image, quality: int) -> list[Row]:
    """A JPEG of the bitstream's size, and what both tiers decode from the bitstream."""
    bitstream = client.encode(photo, quality)
    jpeg = jpeg_of_size(original, len(bitstream))
    rows = [_row(quality, "JPEG", len(jpeg), None, original, jpeg)]
    for tier in ("instant", TIER):
        start = time.monotonic()
        picture = _decode(client, bitstream, tier, f"quality {quality}, {tier}")
        seconds = time.monotonic() - start
        rows.append(_row(quality, tier, len(bitstream), seconds, original, picture))
    return rows


def _decode(client: Client, bitstream: bytes, tier: str, title: str) -> bytes:
    """The picture file of this tier; shows the progress."""
    with tqdm(desc=title, unit="step", leave=False, disable=None) as bar:
        for update in client.decode(bitstream, tier, previews=False):
            bar.total = update.total or bar.total
            bar.update(max(update.step - bar.n, 0))
    assert update.picture is not None
    return update.picture


def _row(
    quality: int,
    name: str,
    size: int,
    seconds: float | None,
    original: Image.Image,
    file: bytes,
) -> Row:
    picture = Image.open(io.BytesIO(file)).convert("RGB")
    if picture.size != original.size:  # a JPEG that had to be shrunk
        picture = picture.resize(original.size, Image.Resampling.BICUBIC)
    return Row(quality, name, size, _psnr(original, picture), seconds, picture)


def _psnr(a: Image.Image, b: Image.Image) -> float:
    mse = float(np.square(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean())
    return 10 * float(np.log10(255**2 / mse)) if mse else float("inf")


@contextlib.contextmanager
def _service(cache: Path, log: Path) -> Iterator[str]:
    """Run a service on a free port that logs to a file; yields its URL.

    The service has its own queue, so that it does not run jobs that `make run` left in another one.
    Raises `AfterimageError` if it does not start.
    """
    from worker.queue import private_redis

    say("starting a service; the first start takes a minute, because code is compiled")
    with contextlib.ExitStack() as stack:
        queue = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="afterimage-demo-")))
        urls = stack.enter_context(private_redis.servers(queue))
        environment = {k: v for k, v in os.environ.items() if k != "AFTERIMAGE_API_KEYS"}
        environment |= {"REDIS_URL": urls[0], "CACHE_REDIS_URL": urls[1]}
        environment |= {"AFTERIMAGE_CACHE_DIR": str(cache / "demo")}
        environment["NUMBA_CACHE_DIR"] = os.environ.get("NUMBA_CACHE_DIR") or str(cache / "numba")
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        command = [sys.executable, "-P", "-m", "service.cli", "serve", "--port", str(port)]
        out = stack.enter_context(log.open("wb"))
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        stack.callback(process.wait)
        stack.callback(process.terminate)
        yield _ready(process, f"http://127.0.0.1:{port}", log)


def _ready(process: subprocess.Popen[bytes], url: str, log: Path) -> str:
    """Wait until the service is ready; returns its URL. Raises `AfterimageError`."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/readyz").status_code == 200:
                return url
        time.sleep(0.2)
    status = process.poll()
    why = "is not ready" if status is None else f"exited with status {status}"
    last = log.read_text(errors="replace").strip().rpartition("\n")[2]
    raise AfterimageError(f"the service {why}; see {log}, which ends with: {last}")


if __name__ == "__main__":
    sys.exit(main())
