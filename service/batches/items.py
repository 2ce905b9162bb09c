"""Begins the items of batches: each becomes an ordinary decode with a source and a target."""

import logging
import time
from dataclasses import dataclass, replace
from functools import partial

import anyio.to_thread

from models import tiers
from models.codec import bitstream
from models.errors import AfterimageError, ParameterError, Quarantined
from service import negotiate, object_writes, sources, submission
from service.auth import Caller
from service.drafts import read_bitstream
from service.object_writes import PictureTarget
from service.problems import Busy, DeadlineExceeded, QueueFull, TooManyRequests
from service.services import Services
from service.submission import DecodeParams, ParsedBitstream
from worker.queue import recall, submitters
from worker.queue.batches.leases import BatchTaken, Lease
from worker.queue.batches.records import Active, Batch, Item, ItemStatus
from worker.queue.jobs import MAX_SUBSCRIPTION_S
from worker.queue.records import DecodeRequest, Priority
from worker.queue.references import Reference, StoreAway
from worker.queue.store import RedisError
from worker.queue.targets import TooManyTargets

MAX_PAUSE_S = 60.0
"""Longest pause between two tries to read a source."""
FULL_PAUSE_S = 2.0
"""Pause of an item whose decode has as many targets as a caller may have at a time."""
_TRANSIENT = (StoreAway, Busy, DeadlineExceeded, QueueFull)
"""Errors after which an item is tried again, until the time limit of jobs."""

log = logging.getLogger(__name__)

Change = tuple[int, ItemStatus, dict[str, str] | None]
"""Number, new status and problem of an item."""


def subscriber(batch_id: str) -> str:
    """The name under which a batch subscribes to its jobs, beside its caller."""
    return f"batch:{batch_id}"


def problem(e: AfterimageError) -> dict[str, str]:
    """What is kept of the error of an item."""
    return {"type": f"urn:afterimage:problem:{e.kind}", "detail": str(e)[:500]}


def target_of(batch: Batch, item: Item) -> PictureTarget:
    """The target of an item. Raises `ParameterError`."""
    reference = Reference.parse(item.target, "target")
    format = batch.spec.format or object_writes.format_of(reference)
    return PictureTarget(reference, format, batch.spec.realism)


def priority_of(batch: Batch, caller: Caller) -> Priority:
    """The priority of a batch: at most that of its caller's key."""
    return "batch" if caller.priority == "batch" else batch.spec.priority


@dataclass(frozen=True, slots=True)
class Beginner:
    """Begins items of one batch, under its lease."""

    services: Services
    lease: Lease
    batch: Batch
    caller: Caller

    async def begin(self, number: int, item: Item, known: Active) -> Change | None:
        """Queue the decode of an item; returns its change if it has ended or must wait again.

        `known` has an id if an earlier call has queued it. Raises `RedisError`, `BatchTaken`.
        """
        try:
            return await self._begin(number, item, known)
        except TooManyRequests:  # the caller's quota of jobs
            return number, "waiting", None
        except TooManyTargets:  # many items have the same bitstream and seed
            later = replace(known, at=time.time() + FULL_PAUSE_S)
            await anyio.to_thread.run_sync(self.lease.note, number, later)
            return None
        except _TRANSIENT as e:
            return await self._postpone(number, known, e)
        except (RedisError, BatchTaken):
            raise
        except AfterimageError as e:
            return number, "failed", problem(e)
        except Exception:
            log.exception("batch %s: item %d could not be begun", self.batch.id, number)
            return number, "failed", problem(AfterimageError("internal error"))

    async def _begin(self, number: int, item: Item, known: Active) -> Change | None:
        target = target_of(self.batch, item)
        self.services.objects.check(target.reference, self.caller.name, "write")
        if known.id and await self._holds(target, known.id):
            return number, "succeeded", None
        skips = self.batch.spec.on_existing == "skip"
        if not known.id and skips and await object_writes.exists(self.services, target.reference):
            return number, "skipped", None
        with self.services.uploads.upload() as reserve:
            data = await sources.read(
                None, self.services, self.caller, item.source, reserve, sources.check_header
            )
            b = await read_bitstream(self.services, data)
            upload = ParsedBitstream(data, b, bitstream.digest(data), 0)
            spec = self.batch.spec
            params = DecodeParams(tiers.find(spec.tier), spec.settings, item.seed, 0, ())
            decode = submission.build_decode(self.services, upload, params, spec.settings)
            negotiate.check_size(target.format, decode.width, decode.height)
            if not skips and decode.id != known.id and await self._holds(target, decode.id):
                return number, "succeeded", None
            active = replace(known, id=decode.id, sent=False)
            submit = partial(self._submit, number, active, decode, data, target)
            await anyio.to_thread.run_sync(submit)
        return None

    async def _holds(self, target: PictureTarget, job_id: str) -> bool:
        name = self.caller.name
        return await object_writes.holds(self.services, target, name, job_id) is not None

    def _submit(
        self, number: int, active: Active, decode: DecodeRequest, data: bytes, target: PictureTarget
    ) -> None:
        """Queue the job and the write, as `Submission` does for requests."""
        jobs, name = self.services.jobs, self.caller.name
        recall.find_or_restore(jobs, decode)
        self.services.quotas.job(self.caller, decode.id)
        if self.services.settings.private:
            submitters.add(self.services.store, decode.id, name)
        if not self.lease.note(number, active):  # first, so that the job is found after a kill
            return
        jobs.subscribe(decode.id, subscriber(self.batch.id), MAX_SUBSCRIPTION_S)
        wanted = target.of(name)
        jobs.targets.add(decode.id, wanted)
        try:
            priority = priority_of(self.batch, self.caller)
            jobs.submit(decode, data, name, 0, priority, self.caller.weight)
        except (ParameterError, Quarantined):
            jobs.targets.drop(decode.id, wanted)
            raise
        self.lease.note(number, replace(active, sent=True))

    async def _postpone(self, number: int, known: Active, e: AfterimageError) -> Change | None:
        """Record when to try again; after the time limit of jobs, the item has failed."""
        now, limit = time.time(), self.services.settings.job_timeout_s
        began = known.began or now
        if now - began > limit:
            detail = f"{e}; gave up after {now - began:.0f} s"
            return number, "failed", {**problem(e), "detail": detail[:500]}
        pause_s = min(2.0**known.tries, MAX_PAUSE_S)
        later = replace(known, began=began, tries=known.tries + 1, at=now + pause_s)
        await anyio.to_thread.run_sync(self.lease.note, number, later)
        return None
