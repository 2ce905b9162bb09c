"""A real service under the memory limit of a container: a control group of the kernel."""

import contextlib
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from models import image
from models.codec import bitstream
from tests.bench import machine
from tests.chaos import attacks_work
from tests.support import memory_groups
from tests.support.data import DATA
from tests.support.memory_groups import MemoryGroup
from tests.support.service import Service, run_service

REASON = memory_groups.available()
pytestmark = [
    pytest.mark.redis,
    pytest.mark.weights,
    pytest.mark.slow,
    pytest.mark.skipif(bool(REASON), reason=REASON),
]

PIXELS_AT_ONCE = 2_000_000
STATED_MB = 1200 + 36 * PIXELS_AT_ONCE / 1e6 + 500
"""What an API process needs by OPERATING.md, with one encode at a time."""
REST_MB = 200
"""The private Redis and the reader of photographs, which belong to the same container here."""


@pytest.fixture(scope="module")
def group() -> Iterator[MemoryGroup]:
    with memory_groups.made() as made:
        yield made


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory, group: MemoryGroup) -> Iterator[Service]:
    """A service without workers, all of whose processes belong to the group."""
    settings = {
        "AFTERIMAGE_PIXELS_AT_ONCE": str(PIXELS_AT_ONCE),
        "AFTERIMAGE_MAX_PIXELS": "80000000",
        "AFTERIMAGE_ENCODES_AT_ONCE": "1",
    }
    started = run_service(tmp_path_factory.mktemp("limited"), "--workers", "0", **settings)
    with contextlib.ExitStack() as running:
        with group.joined():
            service = running.enter_context(started)
        yield service


def test_no_process_is_killed_within_the_stated_memory(
    limited: Service, group: MemoryGroup, small: image.Pixels
) -> None:
    group.limit(STATED_MB + REST_MB)
    photo, b = image.write(small, "png"), bitstream.parse((DATA / "kodim23.msh").read_bytes())
    sent = [("decodes", data) for data in itertools.islice(attacks_work.variants(b), 8)]
    sent += [("encodes", photo)] * 4

    def send(request: tuple[str, bytes]) -> int:
        url = f"{limited.client.base_url}/v1/{request[0]}"
        return httpx.post(url, content=request[1], timeout=120).status_code

    with ThreadPoolExecutor(8) as pool:
        answers = set(pool.map(send, sent))
    assert 200 in answers and answers <= {200, 503, 504}
    assert group.killed() == 0
    assert limited.process.poll() is None


def test_the_kernel_kills_a_reader_of_photographs_and_the_service_goes_on(
    limited: Service, group: MemoryGroup, small_msh: bytes, small: image.Pixels
) -> None:
    photo, url = image.write(small, "png"), f"{limited.client.base_url}/v1/encodes"
    assert httpx.post(url, content=photo, timeout=60).status_code == 200
    assert limited.client.post("/v1/decodes", content=small_msh).status_code == 200
    # the kernel counts the API's libraries, and for the reader the limit besides its memory
    group.limit(machine.resident_mb(limited.process.pid) + 20)
    too_large = image.write(np.zeros((8000, 9000, 3), np.uint8), "png")
    refused = httpx.post(url, content=too_large, timeout=60)
    assert refused.status_code in {422, 503}, refused.text
    assert group.killed() > 0
    assert limited.process.poll() is None
    assert limited.client.post("/v1/decodes", content=small_msh).status_code == 200
    group.limit(STATED_MB + REST_MB)
    assert httpx.post(url, content=photo, timeout=60).status_code == 200
