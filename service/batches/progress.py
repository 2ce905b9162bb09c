"""What has become of the active items of a batch: queued, running, ended, or to be begun again."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from models.errors import AfterimageError, Canceled, Quarantined
from service.auth import Caller
from service.batches.items import Change, problem, subscriber, target_of
from service.services import Services
from worker.queue.batches.records import Active, Batch, Item
from worker.queue.jobs import MAX_SUBSCRIPTION_S
from worker.queue.quarantine import QUARANTINED
from worker.queue.targets import Target


class DecodeFailed(AfterimageError):
    """The worker could not draw the picture."""

    kind = "decode-failed"


@dataclass(frozen=True, slots=True)
class Progress:
    """Changes of the active items, and the items without a decode, which have to be submitted."""

    changes: list[Change]
    to_submit: list[int]


def wanted(batch: Batch, item: Item, caller: str) -> Target:
    """The pending target of an item."""
    return target_of(batch, item).of(caller)


def look(
    services: Services, batch: Batch, caller: str, items: Mapping[int, Item],
    active: Mapping[int, Active],
) -> Progress:  # fmt: skip
    """Look at the jobs and targets of the active items, and renew the subscriptions to the jobs."""
    jobs, found = services.jobs, Progress([], [n for n, known in active.items() if not known.id])
    queued = [number for number, known in active.items() if known.id]
    until = jobs.now() + MAX_SUBSCRIPTION_S
    with services.store.queue.pipeline(transaction=False) as pipe:
        for number in queued:
            id, target = active[number].id, wanted(batch, items[number], caller)
            pipe.hmget(jobs.key(id), "status", "error")
            pipe.hget(jobs.targets.key(id), target.field)
            pipe.zadd(jobs.subscribers(id), {subscriber(batch.id): until}, xx=True, gt=True)
        replies = pipe.execute()
    for number, (job, target, _) in zip(
        queued, zip(*[iter(replies)] * 3, strict=True), strict=True
    ):
        change = _change(number, job, target)
        if change is None or (change[1] == "failed" and not active[number].sent):
            found.to_submit.append(number)
        else:
            found.changes.append(change)
    return found


def _change(
    number: int, job: tuple[bytes | None, bytes | None], value: bytes | None
) -> Change | None:
    """The change of an item, given its job's status and error, and its target.

    None if no status follows: the item has to be submitted.
    """
    target = None if value is None else Target.loads(value)
    if target is not None and target.status == "written":
        return number, "succeeded", None
    if target is not None and target.status == "failed":
        kind = f"urn:afterimage:problem:{target.kind}"
        return number, "failed", {"type": kind, "detail": target.error[:500]}
    status, error = ((field or b"").decode() for field in job)
    if status in {"failed", "canceled"}:
        return number, "failed", _problem_of_job(status, error)
    if status == "queued":
        return number, "queued", None
    if status == "running" or (status == "succeeded" and target is not None):
        return number, "running", None
    return None


def _problem_of_job(status: str, error: str) -> dict[str, str]:
    if status == "canceled":
        return problem(Canceled("the decode was canceled; retry the batch"))
    return problem(Quarantined(error) if error == QUARANTINED else DecodeFailed(error))


def withdraw(
    services: Services, batch: Batch, caller: Caller, items: Mapping[int, Item],
    active: Mapping[int, Active],
) -> list[Change]:  # fmt: skip
    """Cancel the active items whose drawing has not begun."""
    changes: list[Change] = []
    jobs = services.jobs
    for number, known in active.items():
        if known.id:
            state = jobs.record(known.id)
            if state is not None and state.status not in {"queued", "canceled"}:
                continue
            jobs.targets.drop(known.id, wanted(batch, items[number], caller.name))
            jobs.withdraw(known.id, subscriber(batch.id))
            services.quotas.release_job(caller, known.id)
        changes.append((number, "canceled", None))
    return changes


def unsubscribe(
    services: Services, batch: Batch, active: Mapping[int, Active], changes: list[Change]
) -> None:
    """End the subscriptions to the jobs of items that have ended."""
    pipe: Any
    with services.store.queue.pipeline(transaction=False) as pipe:
        for number, status, _ in changes:
            if status not in {"queued", "running"} and active[number].id:
                pipe.zrem(services.jobs.subscribers(active[number].id), subscriber(batch.id))
        pipe.execute()
