"""A real service whose clients ask for more than it can compute, or leave."""

import itertools
import re
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from models.codec import bitstream
from models.codec.bitstream import Bitstream
from tests.bench import machine
from tests.chaos import attacks_work
from tests.support.attacks import Target
from tests.support.service import Service, fork_service

pytestmark = [pytest.mark.redis, pytest.mark.weights, pytest.mark.slow]

ATTACK_S = 4.0
SLOWER = 3
"""Limit of an ordinary decode under attack, times its duration alone."""
SETTINGS = {"AFTERIMAGE_REQUEST_TIMEOUT_S": "20", "AFTERIMAGE_PICTURE_CPU_S": "60"}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("overload")
    with fork_service(folder, "--workers", "0", **SETTINGS) as service:
        yield service


@pytest.fixture(scope="module")
def ordinary() -> Iterator[bytes]:
    """Bitstreams of 768×512, of which none has been decoded before."""
    b = bitstream.parse((Path(__file__).parents[1] / "data/kodim23.msh").read_bytes())
    return attacks_work.variants(b)


def decode_s(service: Service, ordinary: Iterator[bytes], count: int = 3) -> float:
    """The median duration of decodes, all of which must succeed."""
    durations = []
    for data in itertools.islice(ordinary, count):
        began = time.perf_counter()
        assert service.client.post("/v1/decodes", content=data).status_code == 200
        durations.append(time.perf_counter() - began)
    return statistics.median(durations)


def target(service: Service, seconds: float) -> Target:
    port = service.client.base_url.port
    assert port is not None
    return Target(port, time.monotonic() + seconds)


def in_work(service: Service) -> float:
    """Processor seconds that the service has used."""
    found = re.search(
        r"^process_cpu_seconds_total (\S+)$", service.client.get("/metrics").text, re.MULTILINE
    )
    assert found
    return float(found[1])


@pytest.mark.parametrize("attack", [attacks_work.abandoned_decodes, attacks_work.abandoned_encodes])
def test_work_for_clients_that_leave_does_not_delay_others(
    running: Service, ordinary: Iterator[bytes], attack: attacks_work.Run
) -> None:
    alone = decode_s(running, ordinary)
    attacks_work.large_bitstream(), attacks_work.large_avif()  # made before the time runs
    with ThreadPoolExecutor(1) as pool:
        attacking = pool.submit(attack, target(running, ATTACK_S))
        time.sleep(4 * attacks_work.LEAVES_S)
        assert decode_s(running, ordinary) <= SLOWER * alone
        assert attacking.result()
    deadline = time.monotonic() + 30
    while True:  # soon nothing is computed any more
        before = in_work(running)
        time.sleep(0.5)
        if in_work(running) - before < 0.25:
            break
        assert time.monotonic() < deadline


def test_large_pictures_at_once_wait_or_are_refused_within_the_stated_memory(
    running: Service, ordinary: Iterator[bytes]
) -> None:
    alone = decode_s(running, ordinary)
    idle_mb = peak_mb = machine.resident_mb(running.process.pid)
    large = attacks_work.large_bitstream()

    def send(data: bytes) -> httpx.Response:
        return httpx.post(f"{running.client.base_url}/v1/decodes", content=data, timeout=60)

    with ThreadPoolExecutor(16) as pool:
        sent = [pool.submit(send, data) for data in itertools.islice(variants(large), 16)]
        time.sleep(1)
        assert decode_s(running, ordinary) <= SLOWER * alone
        while not all(answer.done() for answer in sent):
            peak_mb = max(peak_mb, machine.resident_mb(running.process.pid))
            time.sleep(0.05)
    answers = [answer.result() for answer in sent]
    refused = [answer for answer in answers if answer.status_code == 503]
    assert len(refused) >= 10
    assert {answer.status_code for answer in answers} <= {200, 503, 504}
    for answer in refused:
        assert int(answer.headers["retry-after"]) > 1
        assert answer.json()["type"] == "urn:afterimage:problem:busy"
    assert peak_mb <= 1.3 * (idle_mb + attacks_work.BUDGET_MB)
    assert "Traceback" not in running.log.read_text()


def variants(b: Bitstream) -> Iterator[bytes]:
    """As `attacks_work.variants`, of other sizes."""
    return attacks_work.variants(replace(b, height=b.height - 1))
