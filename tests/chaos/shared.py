"""Three callers and a batch share the workers, while these, API processes and Redis are killed.

The callers have weights of 1, 2 and 4, and keep jobs queued in proportion to them. The batch reads
from and writes to an S3 server. At first nothing is killed: these jobs show how accurate
`Retry-After` is.
"""

import concurrent.futures
import contextlib
import itertools
import os
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import httpx
import redis

from models.pictures import signatures
from service import keys
from tests.chaos.faults import Api, Chaos
from tests.chaos.report import Report
from tests.chaos.work import Job, jobs
from tests.support.api_keys import TABLE
from tests.support.batches import counts, state
from tests.support.object_server import s3_server, s3_settings
from tests.support.rig import Rig, rig
from tests.support.service import connected
from tests.support.waiting import until
from worker.queue import object_stores
from worker.queue.line import Line
from worker.queue.object_stores import ObjectStores
from worker.queue.records import JobState
from worker.queue.references import Reference
from worker.settings import WorkerSettings

WEIGHTS = {"one": 1, "two": 2, "four": 4}
BATCH = "library"
WORKERS, APIS = 3, 2
QUEUED = 12
"""Jobs that a caller keeps queued per unit of its weight."""
TIERS = ("perceptual", "ddim-10")
PICTURES = 100
"""More than are queued at a time: no bitstream is drawn by two workers that are killed at once."""
ITEMS_A_MINUTE = 20
WARM = 60
"""Jobs that end before promises count: the cost model needs some of a busy machine."""
CALM_SHARE = 0.4
"""Part of the time in which nothing is killed."""
PROMISED_S = 2
"""Promises below this are rounded too much to be compared."""
ENOUGH = 50
"""Jobs whose promises are compared, at least."""
GAP_S = 2.0
"""Jobs that began so shortly before or after a caller had none queued do not count as shares."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A job that was accepted."""

    id: str
    at: float
    said_s: float


@dataclass(slots=True)
class Run:
    """A run, and when its parts began, in seconds since the epoch."""

    own: Rig
    apis: Sequence[Api]
    work: Sequence[Job]
    stopped: threading.Event = field(default_factory=threading.Event)
    sent: dict[str, list[Sent]] = field(default_factory=lambda: {name: [] for name in WEIGHTS})
    gaps: list[float] = field(default_factory=list)
    """Times at which a caller had no job queued."""
    warm_at: float = 0.0
    faults_at: float = 0.0
    stopped_at: float = 0.0

    def keep_queued(self, caller: str) -> None:
        """Submit jobs of a caller until the run is stopped."""
        numbers, wanted = itertools.count(WEIGHTS[caller] * 10**6), QUEUED * WEIGHTS[caller]
        with connected(*self.own.urls.values()) as store:  # the rig closes its own connections
            queue = Line(store, 0).queue("interactive", caller)
            while not self.stopped.wait(0.1):
                with contextlib.suppress(redis.RedisError):
                    queued = queue.count
                    if not queued and self.sent[caller]:
                        self.gaps.append(time.time())
                    for _ in range(wanted - queued):
                        self._submit(caller, next(numbers))

    def _submit(self, caller: str, number: int) -> None:
        """Submit a job, over and over until an API process accepts it or the run is stopped."""
        job = self.work[number % len(self.work)]
        asked, at = {**job.asked, "seed": number}, time.time()
        headers = {"Prefer": "respond-async", "Authorization": f"Bearer {token(caller)}"}
        for api in itertools.cycle(self.apis):
            if self.stopped.is_set():
                return
            with contextlib.suppress(httpx.TransportError):
                answer = api.client.post(
                    "/v1/decodes", params=asked, content=job.data, headers=headers
                )
                if answer.status_code in {200, 202}:
                    id = answer.headers["location"].rpartition("/")[2]
                    said_s = float(answer.headers.get("retry-after", 0))
                    self.sent[caller].append(Sent(id, at, said_s))
                    return
            time.sleep(0.1)
            at = time.time()

    def ended(self) -> int:
        """Number of jobs that have succeeded."""
        return int(self.own.store.queue.hget(self.own.store.key("metrics"), "ended:succeeded") or 0)


def token(caller: str) -> str:
    return f"ai_{caller * 10}"


def write_keys(file: Path) -> None:
    more = {name: f"weight = {weight}" for name, weight in WEIGHTS.items()}
    more[BATCH] = 'priority = "batch"'
    tables = [
        TABLE.format(name=n, digest=keys.digest(token(n)), scopes='"decode"', more=text)
        for n, text in more.items()
    ]
    file.write_text("".join(tables))


@contextlib.contextmanager
def started(folder: Path) -> Iterator[tuple[Rig, list[Api], ObjectStores]]:
    """Redis, workers and API processes, and the stores that they use."""
    write_keys(folder / "keys.toml")
    with s3_server(folder / "s3") as port:
        stores = s3_settings(folder, port)
        settings = {
            "AFTERIMAGE_API_KEYS": str(folder / "keys.toml"),
            "AFTERIMAGE_MAX_BACKLOG_S": "10000",
        }
        with (
            mock.patch.dict(os.environ, stores),
            rig(folder / "rig", forked=False, **stores) as own,  # each worker has its own name
        ):
            objects = object_stores.connect(WorkerSettings())
            with contextlib.ExitStack() as stack:
                for _ in range(WORKERS):
                    own.worker().ready()
                apis = []
                for number in range(APIS):
                    apis.append(Api(own, f"api-{number}", **settings))
                    stack.callback(apis[-1].close)
                    apis[-1].ready()
                yield own, apis, objects


def submit_batch(api: Api, objects: ObjectStores, items: Sequence[Job]) -> str:
    """Write the sources, and submit a batch of them and of one that is missing."""
    for number, job in enumerate(items):
        ref = Reference("s3", f"in/{number}.msh")
        objects.write(ref, job.data, "application/octet-stream", {})
    numbered = [
        {"source": f"store:s3/in/{n}.msh", "target": f"store:s3/out/{n}.png"}
        for n in range(len(items) + 1)
    ]
    answer = api.client.post(
        "/v1/batches",
        json={"items": numbered, "tier": "ddim-10", "steps": 4},
        headers={"Authorization": f"Bearer {token(BATCH)}"},
    )
    answer.raise_for_status()
    return str(answer.headers["location"])


def run(folder: Path, minutes: float, report: Report) -> None:
    """Run for `minutes`, then wait until all jobs have ended, and report."""
    with started(folder) as (own, apis, objects):
        items = jobs(max(round(ITEMS_A_MINUTE * minutes), 10), 3, TIERS)
        this = Run(own, apis, jobs(PICTURES, 2, TIERS))
        batch = submit_batch(apis[0], objects, items)
        chaos = Chaos(own, 4, apis)
        with concurrent.futures.ThreadPoolExecutor(len(WEIGHTS)) as pool:
            queuing = [pool.submit(this.keep_queued, name) for name in WEIGHTS]
            try:
                until(lambda: this.ended() >= WARM, "the first jobs", 600)
                this.warm_at = time.time()
                time.sleep(60 * minutes * CALM_SHARE)
                this.faults_at = time.time()
                chaos.start()
                time.sleep(60 * minutes * (1 - CALM_SHARE))
                this.stopped_at = time.time()
            finally:
                this.stopped.set()
        for one in queuing:
            one.result()
        went_on = chaos.is_alive()  # False after an exception
        chaos.stopped.set()
        chaos.join()
        report.tell(
            f"three callers and a batch in {minutes:g} minutes: {chaos.kills} workers killed, "
            f"{chaos.drains} told to end, {chaos.api_kills} API processes killed, Redis killed "
            f"{chaos.restarts} times",
            went_on and chaos.kills > 0,
        )
        report_batch(this, batch, objects, len(items), report)
        report_callers(this, report)


def report_batch(
    this: Run, location: str, objects: ObjectStores, count: int, report: Report
) -> None:
    """Report counts and targets of the batch, once it has ended."""
    client = this.apis[0].ready().client
    client.headers["Authorization"] = f"Bearer {token(BATCH)}"
    until(lambda: state(client, location)["status"] == "ended", "the end of the batch", 900)
    found = counts(state(client, location))
    report.tell(f"the batch: {found}", found == {"succeeded": count, "failed": 1})
    ids = []
    for number in range(count):
        ref = Reference("s3", f"out/{number}.png")
        head = objects.head(ref)
        if head is not None and objects.read(ref, 10**7).startswith(signatures.PNG):
            ids.append(head.attributes["decode"])
    once = sum(this.own.commits(id) == 1 for id in ids)
    report.tell(
        f"{len(ids)} of its targets are there, {once} committed exactly once", once == count
    )


def report_callers(this: Run, report: Report) -> None:
    """Report what has become of the callers' jobs, shares and promises."""
    own = this.own
    until(lambda: not own.jobs.running and not own.jobs.line.job_ids(), "an empty queue", 900)
    states = {s.id: own.state(s.id) for sent in this.sent.values() for s in sent}
    ended = sum(s.status == "succeeded" for s in states.values())
    once = sum(own.commits(id) == 1 for id in states)
    again = sum(s.attempts > 1 for s in states.values())
    report.tell(
        f"{ended} of the callers' {len(states)} jobs succeeded, {once} committed exactly once, "
        f"{again} after more than one attempt",
        ended == once == len(states),
    )
    for what, since, until_ in (
        ("without faults", this.warm_at, this.faults_at),
        ("with faults", this.faults_at, this.stopped_at),
    ):
        report_shares(this, states, what, since, until_, report)
    report_promises(this, states, report)


def report_shares(
    this: Run, states: Mapping[str, JobState], what: str, since: float, until_: float,
    report: Report,
) -> None:  # fmt: skip
    """Report the work of the jobs that began between two times, while all callers had some."""
    drawn = dict.fromkeys(WEIGHTS, 0.0)
    for caller, sent in this.sent.items():
        for s in (states[one.id] for one in sent):
            in_gap = any(abs(s.started - gap) < GAP_S for gap in this.gaps)
            if since <= s.started <= until_ and not in_gap:
                drawn[caller] += s.decode.work
    total, weights = sum(drawn.values()), sum(WEIGHTS.values())
    shares = {c: work / total * weights / WEIGHTS[c] for c, work in drawn.items()}
    report.tell(
        f"shares of the work over those of the weights 1, 2 and 4, {what}: "
        + ", ".join(f"{share:.2f}" for share in shares.values()),
        all(0.9 <= share <= 1.1 for share in shares.values()),
    )


def report_promises(this: Run, states: Mapping[str, JobState], report: Report) -> None:
    """Report `Retry-After` against what then happened, of the jobs that ended before the faults."""
    rows = []
    for caller, sent in this.sent.items():
        found = [
            (states[s.id].ended - s.at) / s.said_s
            for s in sent
            if s.at > this.warm_at and states[s.id].ended < this.faults_at and s.said_s > PROMISED_S
        ]
        rows += found
        middle = statistics.median(found) if found else 0.0
        report.tell(f"Retry-After of {len(found)} jobs of {caller}: {middle:.2f} in the median")
    if len(rows) < ENOUGH:
        report.tell(f"Retry-After: only {len(rows)} jobs ended before the faults", False)
        return
    cuts = statistics.quantiles(rows, n=20)
    within = sum(0.7 <= r <= 1.3 for r in rows) / len(rows)
    report.tell(
        f"Retry-After of {len(rows)} jobs of three callers beside a batch: what then happened over "
        f"it is {statistics.median(rows):.2f} in the median, {cuts[0]:.2f} to {cuts[-1]:.2f} for "
        f"nine tenths; {within:.0%} within ±30 %",
        within >= 0.9,
    )
