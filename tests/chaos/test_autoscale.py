"""Workers that are started and stopped by the metric that KEDA reads."""

import math
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from models.tiers import Settings
from service import metrics
from tests.support.rig import Rig, Worker, rig
from tests.support.service import free_port
from tests.support.waiting import until

pytestmark = [pytest.mark.redis, pytest.mark.weights, pytest.mark.slow]

SCALED = Path(__file__).parents[2] / "deploy/kubernetes/overlays/keda/scaledobject.yaml"
MOST = 2
JOBS = 4
LONG = Settings("ddim", 20, beta=1.0)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Rig]:
    with rig(tmp_path / "rig", forked=True) as made:
        yield made


class Autoscaler(threading.Thread):
    """Keeps ceil(metric / threshold) workers; stops random ones if there are more."""

    def __init__(self, own: Rig, url: str) -> None:
        super().__init__(daemon=True)
        (trigger,) = yaml.safe_load(SCALED.read_text())["spec"]["triggers"]
        assert (
            trigger["metadata"]["query"] == "max(afterimage_queue_depth + afterimage_jobs_running)"
        )
        self.own, self.url = own, url
        self.threshold = float(trigger["metadata"]["threshold"])
        self.stopped = threading.Event()
        self.most = 0
        self.leaving: list[Worker] = []

    def metric(self) -> float:
        found = {
            sample.name: sample.value
            for family in text_string_to_metric_families(httpx.get(self.url).text)
            for sample in family.samples
        }
        return found["afterimage_queue_depth"] + found["afterimage_jobs_running"]

    def there(self) -> list[Worker]:
        return [w for w in self.own.alive() if w not in self.leaving]

    def run(self) -> None:
        while not self.stopped.wait(0.5):
            wanted, there = min(math.ceil(self.metric() / self.threshold), MOST), self.there()
            self.most = max(self.most, len(there))
            if wanted > len(there):
                self.own.worker()
            elif wanted < len(there):
                victim = random.choice(there)
                victim.process.send_signal(signal.SIGTERM)
                self.leaving.append(victim)


def test_autoscaling_interrupts_no_running_job(own: Rig, small_msh: bytes) -> None:
    port = free_port()
    stop = metrics.serve(port, own.jobs, "127.0.0.1")
    scaler = Autoscaler(own, f"http://127.0.0.1:{port}/metrics")
    scaler.start()
    try:
        time.sleep(1.5)
        assert not own.workers
        jobs = [own.submit(small_msh, LONG, seed) for seed in range(JOBS)]
        until(lambda: all(own.state(job).status == "succeeded" for job in jobs), "pictures", 400)
        until(lambda: not scaler.there(), "no worker is left", 60)
        assert scaler.most == MOST
        assert {own.commits(job) for job in jobs} == {1}
        assert {own.state(job).attempts for job in jobs} == {1}
        assert "afterimage_leases_lost_total 0.0" in httpx.get(scaler.url).text
        assert {worker.process.wait(60) for worker in own.workers} == {0}
    finally:
        scaler.stopped.set()
        scaler.join()
        stop()
