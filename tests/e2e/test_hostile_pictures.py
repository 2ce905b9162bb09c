"""A real service that hostile photographs attack while others use it, and while it stops."""

import contextlib
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from models import image
from tests.support import hostile
from tests.support.service import fork_service

pytestmark = [pytest.mark.redis, pytest.mark.weights, pytest.mark.slow]

GRACE_S = 30
"""Between SIGTERM and SIGKILL of the API, in deploy/kubernetes."""


def readers(pid: int) -> list[int]:
    """Process ids of the service's readers of pictures."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            with contextlib.suppress(FileNotFoundError):
                if b"models.pictures.process" in Path(f"/proc/{child}/cmdline").read_bytes():
                    found.append(int(child))
    return found


def test_a_service_under_attack_works_and_stops(
    tmp_path: Path, small: image.Pixels, small_msh: bytes
) -> None:
    limits = {"AFTERIMAGE_PICTURE_CPU_S": "1", "AFTERIMAGE_ENCODES_AT_ONCE": "2"}
    with (
        fork_service(tmp_path, "--workers", "0", **limits) as running,
        ThreadPoolExecutor() as pool,
    ):
        client, photo = running.client, image.write(small, "png")
        attacks = [
            pool.submit(client.post, "/v1/encodes", content=make())
            for make in hostile.FILES.values()
        ]
        assert client.post("/v1/decodes", content=small_msh).status_code == 200
        assert client.post("/v1/encodes", content=photo).status_code == 200
        assert [attack.result().status_code for attack in attacks] == [422] * len(attacks)

        def attack() -> None:
            with contextlib.suppress(httpx.TransportError):  # the service stops
                client.post("/v1/encodes", content=hostile.comments())

        for _ in range(8):
            pool.submit(attack)
        time.sleep(1)
        pid = running.process.pid
        left = readers(pid)
        assert left
        began = time.monotonic()
        running.process.send_signal(signal.SIGTERM)
        running.process.wait(2 * GRACE_S)
        assert time.monotonic() - began < GRACE_S
        assert not [reader for reader in left if Path(f"/proc/{reader}").exists()]
