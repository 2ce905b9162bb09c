"""`make demo` with a running service."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from models import image
from tests.support.service import Service

pytestmark = [pytest.mark.redis, pytest.mark.weights]


def test_the_demo_prints_a_table_and_saves_side_by_side_pictures(
    service: Service, small: image.Pixels, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated, as phones store portrait photographs
    Image.fromarray(small).save(tmp_path / "phone.jpg", exif=exif, quality=95)
    url = str(service.client.base_url)
    command = [sys.executable, "-P", "-m", "service.cli.demo", "phone.jpg", "--url", url]
    for _ in range(2):  # the second run uses the cache
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    rows = re.findall(r"([123]) (instant|perceptual) +([\d.]+) +([\d.]+) +([\d.]+)", done.stdout)
    assert [r[:2] for r in rows] == [(q, t) for q in "123" for t in ("instant", "perceptual")]
    assert all(20 < float(psnr) < 45 for *_, psnr, _ in rows)
    sheets = sorted((tmp_path / "demo-out").iterdir())
    assert [s.name for s in sheets] == [f"phone-q{q}.png" for q in (1, 2, 3)]
    with Image.open(sheets[0]) as sheet:
        assert sheet.width == 3 * 100
