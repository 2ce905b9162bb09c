"""Kill workers and Redis for minutes: no job may be lost, none committed twice.

make chaos MINUTES=10

First all jobs run undisturbed, which gives the expected bytes and the accuracy of predictions. Then
they run again while workers and the queue's Redis are killed. Then the queue is flooded while
instant pictures are timed. At last three callers and a batch share the workers, while these, API
processes and Redis are killed (`tests.chaos.shared`). Exits with 1 if an expectation fails.
"""

import argparse
import concurrent.futures
import hashlib
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench import machine
from tests.chaos import shared
from tests.chaos.faults import Chaos
from tests.chaos.report import Report
from tests.chaos.work import PHOTO, Job, jobs
from tests.support.rig import Rig, rig
from tests.support.service import Service, run_service
from tests.support.waiting import until

WORKERS = 3
JOBS_A_MINUTE = 20
WARM, KNOWN = 36, 24
"""Jobs that are submitted first, and how many of them end before the others are submitted, whose
durations are predicted: the cost model needs jobs that ran while all workers were busy."""
INSTANT = 60
BACKLOG_S = 20


def connected(service: Service) -> httpx.Client:
    """A client without a limit of connections: each job is polled on one."""
    limits = httpx.Limits(max_connections=None)
    return httpx.Client(base_url=service.client.base_url, timeout=120, limits=limits)


def send(client: httpx.Client, job: Job) -> httpx.Response:
    headers = {"Prefer": "respond-async"}
    return client.post("/v1/decodes", params=job.asked, content=job.data, headers=headers)


def submit(client: httpx.Client, job: Job) -> None:
    """Submit a job; repeat until it is accepted, whatever Redis does."""
    while (answer := send(client, job)).status_code not in {200, 202}:
        time.sleep(0.5)
    job.began = time.monotonic()
    job.location, job.said_s = answer.headers["location"], float(answer.headers["retry-after"])


def follow(client: httpx.Client, job: Job) -> None:
    """Poll a job until it ends; store its duration and the digest of its picture."""
    while True:
        answer = client.get(job.location, headers={"Prefer": "wait=30"})
        if answer.status_code == 200 and answer.json()["status"] not in {"queued", "running"}:
            break
        time.sleep(0.1)
    job.took_s = time.monotonic() - job.began
    if answer.json()["status"] == "succeeded":
        until_there = {"min_tier": str(job.asked["tier"])}
        picture = client.get(f"{job.location}/image", params=until_there)
        job.picture = hashlib.sha256(picture.content).hexdigest()


def all_of(client: httpx.Client, wanted: list[Job], over_s: float) -> None:
    """Submit jobs evenly over so many seconds, and wait for the end of each."""
    with concurrent.futures.ThreadPoolExecutor(len(wanted)) as pool:
        followed = []
        for number, job in enumerate(wanted):
            began = time.monotonic()
            submit(client, job)
            followed.append(pool.submit(follow, client, job))
            if number + 1 < len(wanted):
                time.sleep(max(over_s / len(wanted) - (time.monotonic() - began), 0))
        for one in followed:
            one.result()


def undisturbed(own: Rig, client: httpx.Client, wanted: list[Job], report: Report) -> None:
    for _ in range(WORKERS):
        own.worker().ready()
    first, rest = wanted[:WARM], wanted[WARM:]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        warm = pool.submit(all_of, client, first, 0)
        until(lambda: sum(bool(job.picture) for job in first) >= KNOWN, "pictures", 300)
        all_of(client, rest, 0)
        warm.result()
    report.tell(f"undisturbed: {len(wanted)} jobs succeeded", all(job.picture for job in wanted))
    ratios = sorted(job.took_s / job.said_s for job in rest if job.said_s > 2)
    within = sum(0.7 <= r <= 1.3 for r in ratios) / len(ratios)
    report.tell(
        f"Retry-After of {len(ratios)} queued jobs: what then happened over it is "
        f"{statistics.median(ratios):.2f} in the median, {ratios[len(ratios) // 10]:.2f} to "
        f"{ratios[-len(ratios) // 10]:.2f} for four fifths; {within:.0%} within ±30 %",
        0.7 <= statistics.median(ratios) <= 1.3,
    )


def disturbed(
    own: Rig, client: httpx.Client, wanted: list[Job], minutes: float, report: Report
) -> None:
    expected = [job.picture for job in wanted]
    own.store.queue.flushall()
    own.store.cache.flushall()
    for job in wanted:
        job.picture = ""
    chaos = Chaos(own, 1)
    chaos.start()
    all_of(client, wanted, minutes * 60)
    went_on = chaos.is_alive()  # False after an exception
    chaos.stopped.set()
    chaos.join()
    report.tell(
        f"{len(wanted)} jobs in {minutes:g} minutes, {chaos.kills} workers killed, {chaos.drains} "
        f"told to end, Redis killed {chaos.restarts} times",
        went_on and chaos.kills > 0,
    )
    names = [job.location.rpartition("/")[2] for job in wanted]
    states = [own.state(name) for name in names]
    ended = sum(s.status == "succeeded" for s in states)
    report.tell(f"{ended} succeeded", ended == len(wanted))
    same = sum(job.picture == was for job, was in zip(wanted, expected, strict=True))
    report.tell(f"{same} with the bytes of the undisturbed run", same == len(wanted))
    once = sum(own.commits(name) == 1 for name in names)
    report.tell(f"{once} committed exactly once", once == len(wanted))
    again = [s.attempts for s in states if s.attempts > 1]
    report.tell(f"{len(again)} needed more than one attempt, at most {max(again, default=1)}")


def flooded(own: Rig, client: httpx.Client, report: Report) -> None:
    """Submit ten times more jobs than the queue accepts, and time instant pictures meanwhile."""
    data = (PHOTO.parent / "kodim23.msh").read_bytes()

    def p99() -> float:
        spent = []
        for _ in range(INSTANT):
            began = time.monotonic()
            client.post("/v1/decodes", content=data).raise_for_status()
            spent.append(time.monotonic() - began)
        return statistics.quantiles(spent, n=100, method="inclusive")[98]

    try:
        until(lambda: not own.jobs.running and not own.jobs.line.job_ids(), "an empty queue", 120)
    except TimeoutError:
        left = {*own.jobs.running, *own.jobs.line.job_ids()}
        report.tell(f"left behind: {own.jobs.running}, {own.jobs.line.job_ids()}", False)
        report.tell(f"their records: {[own.jobs.record(name) for name in left]}", False)
        for worker in own.workers:
            if worker.process.poll() is None:
                report.tell(f"{worker.log}: {worker.log.read_text()[-1500:]}", False)
        return
    p99()
    calm = p99()
    flood = jobs(400, 7)
    for job in flood:
        job.asked["tier"] = "ddim-100"
    answers: list[httpx.Response] = []
    stop = threading.Event()

    def pour() -> None:
        for job in flood:
            if stop.wait(0.05):
                return
            answers.append(send(client, job))

    pouring = threading.Thread(target=pour)
    pouring.start()
    until(lambda: any(a.status_code == 503 for a in answers), "jobs are refused")
    busy = p99()
    stop.set()
    pouring.join()
    refused = [a for a in answers if a.status_code == 503]
    report.tell(
        f"flooded: {len(answers) - len(refused)} jobs taken, {len(refused)} refused; instant p99 "
        f"{busy * 1e3:.0f} ms, unloaded {calm * 1e3:.0f}: {busy / calm:.2f} times",
        busy <= 2 * calm,
    )
    late = flood[-1]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        load = pool.submit(p99)  # the same load as while the prediction was made
        while (answer := send(client, late)).status_code != 503:
            late = flood.pop()
        said = float(answer.headers["retry-after"])
        took = until(lambda: send(client, late).status_code == 202, "a job is taken again", 120)
        ended = load.done()
    report.tell(
        f"refused for {said:.0f} s; a job was taken after {took:.1f} s"
        + (" (without the instant pictures at the end)" if ended else "")
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    minutes = parser.parse_args().minutes / 2  # for each of the two runs under faults
    wanted, report = jobs(max(round(JOBS_A_MINUTE * minutes), WARM + 24), 0), Report()
    with tempfile.TemporaryDirectory() as folder, rig(Path(folder) / "rig") as own:
        settings = {"AFTERIMAGE_MAX_BACKLOG_S": "10000", "AFTERIMAGE_INSTANT_CACHE_BYTES": "0"}
        with run_service(own.folder, "--workers", "0", **own.urls, **settings) as service:
            with connected(service) as client:
                undisturbed(own, client, wanted, report)
                disturbed(own, client, wanted, minutes, report)
        settings["AFTERIMAGE_MAX_BACKLOG_S"] = str(BACKLOG_S)
        with run_service(own.folder, "--workers", "0", **own.urls, **settings) as service:
            with connected(service) as client:
                flooded(own, client, report)
    with tempfile.TemporaryDirectory() as folder:
        shared.run(Path(folder), minutes, report)
    about = machine.describe()
    described = ", ".join(f"{k} {v}" for k, v in about.items())
    text = (
        "\n".join([f"# Chaos, {2 * minutes:g} minutes\n", f"{described}\n", *report.lines]) + "\n"
    )
    machine.write("chaos", {"machine": about, "wrong": report.wrong}, text)
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
