"""Submit a diffusion decode: queue a job, and respond with a picture or 202."""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from weakref import WeakValueDictionary

import anyio
import anyio.to_thread
from fastapi import Request, Response

from models.codec.bitstream import Bitstream
from models.errors import ParameterError, Quarantined
from models.image import OutputFormat
from models.tiers import Settings, Tier, decoder_for
from service import (
    admission,
    drafts,
    image_response,
    metrics,
    negotiate,
    object_writes,
    prefix,
    watching,
)
from service.auth import Caller
from service.instant import PictureFile
from service.negotiate import Preferences
from service.object_writes import PictureTarget
from service.problems import NotAcceptable
from service.services import Services
from service.waiter import Waiter
from worker.queue import estimates, outbox, recall, submitters
from worker.queue.estimates import Outlook
from worker.queue.jobs import MAX_SUBSCRIPTION_S
from worker.queue.order import Place
from worker.queue.records import ENDED, DecodeRequest, JobState
from worker.queue.store import RedisError
from worker.webhooks.settings import check_url

RESOLVERS_PER_CALLER = 2
"""Webhook hosts of one caller that are resolved at once. So a slow name server delays only the
requests of callers whose webhooks use it."""
_RESOLVER_THREADS = anyio.CapacityLimiter(32)
"""Threads that resolve webhook hosts; separate, so that slow DNS does not block other requests."""
_RESOLVERS: WeakValueDictionary[str, anyio.CapacityLimiter] = WeakValueDictionary()
"""Caller -> its limiter, while it has hosts resolved."""


@dataclass(frozen=True, slots=True)
class ParsedBitstream:
    """An uploaded bitstream and its parsed header."""

    data: bytes
    bitstream: Bitstream
    digest: str  # SHA-256, hex
    parse_ms: float

    def server_timing(self, picture: PictureFile) -> dict[str, str]:
        """The header `Server-Timing`: parsing, then the picture's stages."""
        spans = {"parse": self.parse_ms, **picture.stages_ms}
        return {"Server-Timing": ", ".join(f"{name};dur={ms:.1f}" for name, ms in spans.items())}


@dataclass(frozen=True, slots=True)
class DecodeParams:
    """The query parameters of a decode."""

    tier: Tier
    settings: Settings | None  # None: only the instant picture
    seed: int
    deadline_s: int  # how long the caller stays subscribed to the job
    webhooks: Sequence[str]


@dataclass(slots=True)
class Submission:
    """One request for a diffusion picture."""

    services: Services
    request: Request
    upload: ParsedBitstream
    decode: DecodeRequest
    params: DecodeParams
    accept: str
    prefer: Preferences
    caller: Caller
    target: PictureTarget | None = None
    created: bool = False  # whether this request queued a new job

    async def respond(self) -> Response:
        """Return the finished picture if it is cached; otherwise queue the job and return the
        draft, or 202 with `Prefer: respond-async` or a target. With `Prefer: wait`, return the
        finished picture if it is ready in time. If it raises `NotAcceptable`, no job is queued.
        """
        location = prefix.public(f"/v1/decodes/{self.decode.id}")
        headers = {"Location": location, "Link": f'<{location}/image>; rel="upgrade"'}
        if self.target is not None:
            return await self._respond_about_target(self.target, headers)
        format = self._format()
        state = await anyio.to_thread.run_sync(
            recall.find_or_restore, self.services.jobs, self.decode
        )
        finished = await self._finished(state, format, {**headers, "X-Cache": "hit"})
        metrics.cache("picture", finished is not None)
        await check_webhooks(self.services, self.caller, self.params.webhooks)
        if state is not None and finished is not None:
            await anyio.to_thread.run_sync(self._add_submitter)
            await anyio.to_thread.run_sync(self._notify_webhooks, state)
            return finished
        headers["X-Cache"] = "miss"
        await anyio.to_thread.run_sync(self._admit, state)
        if self.prefer.respond_async or format is None:
            return await self._respond_async(format, headers)
        b, waiter = self.upload.bitstream, self._waiter
        draft = await drafts.draft(self.services, self.decode, b, format, waiter)
        state, _ = await self._submit()  # after decoding: a corrupt bitstream is never queued
        if self.prefer.wait_s:
            headers["Preference-Applied"] = f"wait={self.prefer.wait_s}"
            with contextlib.suppress(RedisError):  # the draft is there all the same
                finished = await self._finished(await self._wait(state.id), format, headers)
                if finished is not None:
                    return finished
        headers |= self.upload.server_timing(draft)
        return image_response.picture(
            self.services, self.request, draft.data, format, None, headers
        )

    async def _respond_about_target(
        self, target: PictureTarget, headers: dict[str, str]
    ) -> Response:
        """Return 200 with the status if the target holds the picture; otherwise queue the job and
        the write, and return 202."""
        jobs = self.services.jobs
        negotiate.check_size(target.format, self.decode.width, self.decode.height)
        await check_webhooks(self.services, self.caller, self.params.webhooks)
        etag = await object_writes.holds(self.services, target, self.caller.name, self.decode.id)
        if etag is not None:
            state = await anyio.to_thread.run_sync(self._record_written, target, etag)
            return await watching.ended_response(
                self.services, state, self.caller, {**headers, "X-Cache": "hit"}
            )
        known = await anyio.to_thread.run_sync(recall.find_or_restore, jobs, self.decode)
        finished = known is not None and known.status == "succeeded"
        headers["X-Cache"] = "hit" if finished else "miss"
        if finished:
            await anyio.to_thread.run_sync(admission.check_memory, self.services)
        else:
            await anyio.to_thread.run_sync(self._admit, known)
        return await self._respond_async(None, headers)

    def _record_written(self, target: PictureTarget, etag: str) -> JobState:
        """Record that the target holds the picture already, and notify the webhooks."""
        admission.check_memory(self.services)
        state = recall.record(self.services.jobs, self.decode)
        self._add_submitter()
        self.services.jobs.targets.add(self.decode.id, target.of(self.caller.name, etag))
        if state.status == "succeeded":
            self._notify_webhooks(state)
        return state

    @property
    def _waiter(self) -> Waiter:
        return Waiter.of(self.request, self.caller)

    def _format(self) -> OutputFormat | None:
        """The format of the picture to send; None to send the status document instead.

        None if `Accept` allows no picture and the client sent `Prefer: respond-async`. Raises
        `NotAcceptable` without that preference.
        """
        try:
            return negotiate.picture_format(self.accept, self.decode.width, self.decode.height)
        except NotAcceptable:
            if self.prefer.respond_async:
                return None
            raise

    async def _respond_async(
        self, format: OutputFormat | None, headers: dict[str, str]
    ) -> Response:
        """Queue the job and return 202, or the picture if it is ready within `Prefer: wait`.

        Unlike `GET` of the decode, the wait does not extend the caller's subscription, which lasts
        `deadline_s`.
        """
        await self.services.instant.check(self.upload.bitstream, self._waiter)
        state, seen = await self._submit()
        if self.prefer.wait_s:
            state, seen = await self._wait(state.id), None
            applied = {"Preference-Applied": f"wait={self.prefer.wait_s}"}
            finished = await self._finished(state, format, {**headers, **applied})
            if finished is not None:
                return finished
        response = await watching.pending_response(self.services, state, self.caller, seen)
        response.headers.update(headers)
        if self.prefer.applied:
            response.headers["Preference-Applied"] = self.prefer.applied
        return response

    async def _wait(self, job_id: str) -> JobState:
        """Wait at most `Prefer: wait` for the end of the job; its state as the caller sees it."""
        seconds, began = self.prefer.wait_s or 0, time.perf_counter()
        await watching.wait_until_ended(
            self.services, self.request, job_id, seconds, self.caller.name
        )
        self.request.state.waited_s = time.perf_counter() - began
        find = partial(watching.find_seen, self.services, job_id, self.caller)
        return await anyio.to_thread.run_sync(find)

    async def _finished(
        self, state: JobState | None, format: OutputFormat | None, headers: dict[str, str]
    ) -> Response | None:
        """The response for a job that has succeeded: its picture or, without a format, its status.

        None if the job has not succeeded, or its picture is no longer cached.
        """
        if state is None or state.status != "succeeded":
            return None
        if format is None:
            return await watching.ended_response(self.services, state, self.caller, headers)
        file = await drafts.finished_picture(self.services, self.decode, format, self._waiter)
        if file is None:
            return None
        return image_response.picture(
            self.services, self.request, file, format, self.decode, headers
        )

    async def _submit(self) -> tuple[JobState, Outlook | None]:
        """Queue the job unless it is queued, running or done.

        Returns its state and, for a new job, its outlook.
        """
        state, self.created, seen = await anyio.to_thread.run_sync(self._submit_now)
        return state, seen if self.created else None

    def _submit_now(self) -> tuple[JobState, bool, Outlook]:
        jobs = self.services.jobs
        self.services.quotas.job(self.caller, self.decode.id)
        self._add_submitter()
        if self.target is not None:  # before the webhooks, which wait for it
            jobs.targets.add(self.decode.id, self.target.of(self.caller.name))
        # a caller with webhooks does not poll, which would extend its subscription
        subscription_s = MAX_SUBSCRIPTION_S if self.params.webhooks else self.params.deadline_s
        try:
            self._register_webhooks()  # before queueing, so that the end of the job is not missed
            seen = estimates.outlook(jobs, Place("", self.caller.priority, self.caller.name))
            state, created = jobs.submit(
                self.decode, self.upload.data, self.caller.name, subscription_s,
                self.caller.priority, self.caller.weight, seen.new_eta_s(self.decode) or 0.0,
            )  # fmt: skip
        except (ParameterError, Quarantined):
            jobs.targets.withdraw(self.decode.id, self.caller.name)
            raise
        if created:  # again: an earlier run may have ended since, which removes the registrations
            self._register_webhooks()
        if self.params.webhooks and state.status in ENDED:
            outbox.job_ended(self.services.store, state.id, *outbox.event(state))
        return state, created, seen

    def _admit(self, state: JobState | None) -> None:
        """Raise `QueueFull` or `Busy` unless the job may be queued."""
        admission.admit(self.services, state, self.caller.name, self.caller.priority)

    def _add_submitter(self) -> None:
        """In a private service, let the caller see the decode."""
        if self.services.settings.private:
            submitters.add(self.services.store, self.decode.id, self.caller.name)

    def _register_webhooks(self) -> None:
        for url in self.params.webhooks:
            outbox.register(self.services.store, self.decode.id, self.caller.name, url)

    def _notify_webhooks(self, state: JobState) -> None:
        """Queue messages to this request's webhooks about a job that has already ended."""
        if not self.params.webhooks:
            return
        admission.check_memory(self.services)
        self._register_webhooks()
        outbox.job_ended(self.services.store, state.id, *outbox.event(state))


async def check_webhooks(services: Services, caller: Caller, urls: Sequence[str]) -> None:
    """Raise `ParameterError` unless webhooks may be sent to all of these URLs."""
    share = _RESOLVERS.setdefault(caller.name, anyio.CapacityLimiter(RESOLVERS_PER_CALLER))
    for url in urls:
        async with share:
            await anyio.to_thread.run_sync(
                check_url, url, services.webhooks, limiter=_RESOLVER_THREADS
            )


def build_decode(
    services: Services, upload: ParsedBitstream, params: DecodeParams, settings: Settings
) -> DecodeRequest:
    """Return the decode that a request describes.

    Raises `ParameterError` if it exceeds `max_megapixel_steps`, `WrongWeights` if the bitstream's
    codec is not installed.
    """
    b = upload.bitstream
    decode = DecodeRequest(
        upload.digest, params.tier.name, settings, params.seed, services.library.codec_id(b),
        decoder_for(services.decoder_ids, settings), b.quality, b.width, b.height,
    )  # fmt: skip
    limit = services.settings.max_megapixel_steps
    size = b.width * b.height / 1e6 * settings.calls
    if size > limit:
        raise ParameterError(
            f"steps: the job has {size:.0f} megapixel-steps; the limit is {limit:.0f}; "
            "choose fewer steps or a smaller picture"
        )
    return decode
