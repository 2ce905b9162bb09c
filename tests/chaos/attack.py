"""Attack a running service: others must get their answers meanwhile, and memory must not grow.

make chaos ATTACK=1       all attacks
make chaos ATTACK=NAME    one of them

Each attack runs in a process of its own for `ATTACK_S`. Meanwhile `/livez` and instant decodes are
timed, and the memory of the API process is read. Exits with 1 if an expectation fails.
"""

import argparse
import itertools
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench import machine
from tests.chaos import attack_webhooks, attacks_http, attacks_work
from tests.support.attacks import Attack, Target
from tests.support.service import Service, run_service

ATTACKS: dict[str, Attack] = {
    **attacks_http.ATTACKS,
    **attacks_work.ATTACKS,
    **attack_webhooks.ATTACKS,
}
"""All attacks; a module with others adds its own table here."""
ATTACK_S = 20.0
END_S = 15.0
"""How long an attack may take to return after its time."""
LIVEZ_S, SLOWER, GROWTH = 0.5, 3.0, 1.3
"""The longest `/livez`; instant decodes, times their duration alone; memory, times idle."""
BITSTREAM = Path(__file__).parents[1] / "data/kodim23.msh"


class Watch:
    """Times requests in threads, and records the peak of the API's memory."""

    def __init__(self, service: Service) -> None:
        self._service, self._data = service, BITSTREAM.read_bytes()
        self._stopped = threading.Event()
        self.livez: list[float] = []
        self.decodes: list[float] = []
        self.peak_mb = 0.0
        self.failures: list[str] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch until the block ends; the requests that have begun then still count."""
        works = (self._livez, self._decode, self._memory)
        threads = [threading.Thread(target=self._repeat, args=(work,)) for work in works]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            for thread in threads:
                thread.join()

    def _repeat(self, work: Callable[[httpx.Client], None]) -> None:
        with httpx.Client(base_url=self._service.client.base_url, timeout=60) as client:
            while not self._stopped.wait(0.1):
                try:
                    work(client)
                except httpx.HTTPError as e:
                    self.failures.append(f"{work.__name__.strip('_')}: {e!r}")

    def _livez(self, client: httpx.Client) -> None:
        began = time.monotonic()
        client.get("/livez", headers={"Connection": "close"}).raise_for_status()
        self.livez.append(time.monotonic() - began)

    def _decode(self, client: httpx.Client) -> None:
        began = time.monotonic()
        client.post("/v1/decodes", content=self._data).raise_for_status()
        self.decodes.append(time.monotonic() - began)

    def _memory(self, _client: httpx.Client) -> None:
        self.peak_mb = max(self.peak_mb, machine.resident_mb(self._service.process.pid))


def watch(service: Service, seconds: float) -> Watch:
    """Watch the service for so long without an attack."""
    result = Watch(service)
    with result.running():
        time.sleep(seconds)
    return result


def run(name: str, attack: Attack, service: Service, alone: Watch) -> bool:
    """Run one attack and print its figures; returns whether the expectations hold."""
    port = service.client.base_url.port
    assert port is not None
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    target = Target(port, time.monotonic() + ATTACK_S)
    process = context.Process(target=lambda: results.put(attack.run(target)), daemon=True)
    seen = Watch(service)
    with seen.running():
        process.start()
        process.join(ATTACK_S + END_S)
        process.kill()
    what = "" if results.empty() else results.get()
    livez = max(seen.livez, default=60.0)
    slower = statistics.median(seen.decodes or [60.0]) / statistics.median(alone.decodes)
    most_mb = GROWTH * alone.peak_mb + attack.budget_mb
    holds = livez <= LIVEZ_S and slower <= SLOWER and seen.peak_mb <= most_mb
    holds = holds and bool(what) and not seen.failures
    figures = (
        what or "the attack failed",
        f"/livez at most {livez:.2f} s",
        f"instant decode {slower:.2f} times its duration alone",
        f"memory {alone.peak_mb:.0f} -> {seen.peak_mb:.0f} MB of {most_mb:.0f}",
        *seen.failures[:3],
    )
    print(f"{'' if holds else 'WRONG: '}{name}: {'; '.join(figures)}", flush=True)  # noqa: T201
    return holds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="attacks; default: all")
    names = parser.parse_args().names or list(ATTACKS)
    if unknown := set(names) - set(ATTACKS):
        parser.error(f"no attack {', '.join(unknown)}; choose {', '.join(ATTACKS)}")
    wrong = 0
    by_settings = sorted(names, key=lambda name: sorted(ATTACKS[name].settings.items()))
    for settings, group in itertools.groupby(by_settings, lambda name: ATTACKS[name].settings):
        with tempfile.TemporaryDirectory() as folder:
            environment = {"AFTERIMAGE_INSTANT_CACHE_BYTES": "0", **settings}
            with run_service(Path(folder), **environment) as service:
                watch(service, 3)  # memory grows during the first requests
                alone = watch(service, 5)
                wrong += sum(not run(name, ATTACKS[name], service, alone) for name in group)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
