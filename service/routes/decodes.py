"""`POST /v1/decodes`, `PUT /v1/decodes/{id}`: the instant picture now, the better one queued."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import anyio
import anyio.to_thread
from fastapi import APIRouter, Depends, Header, Query, Request, Response

from models import errors, tiers
from models.codec import bitstream
from models.codec.bitstream import Bitstream
from models.errors import ParameterError
from models.image import OutputFormat
from models.tiers import Settings, Tier
from service import admission, image_response, metrics, problems, schemas
from service.auth import Caller
from service.deps import (
    Accepted,
    Body,
    Decoding,
    JobId,
    Own,
    Preferred,
    State,
    one_of_tiers,
)
from service.instant import Drawn
from service.negotiate import Preferences
from service.problems import Conflict, IdMismatch, KeyReused, QueueFull
from service.routes import pictures, progress
from worker.queue import estimates, outbox
from worker.queue.jobs import MAX_SUBSCRIPTION_S, SUBSCRIPTION_S
from worker.queue.records import ENDED, DecodeRequest
from worker.webhooks.settings import check_url

router = APIRouter(prefix="/v1/decodes", tags=["decodes"])

IDEMPOTENCY_TTL_S = 24 * 3600
"""How long an `Idempotency-Key` is remembered."""

_RESOLVING = anyio.CapacityLimiter(8)
"""Threads that wait for name servers, apart from those that requests need."""

_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "content": schemas.PICTURES,
        "description": "The instant picture, or the finished one where it is cached. For a "
        "diffusion tier, `Location` names the decode and `Link` its picture.",
        "headers": {
            "Location": {"schema": {"type": "string"}, "example": "/v1/decodes/3f2b8c5d…"},
            "X-Afterimage-Tier": {"schema": {"type": "string"}, "example": "instant"},
            "X-Afterimage-Drawn": {
                "schema": {"type": "string"},
                "example": 'sampler="ddim", steps=4, seed="0"',
                "description": "How a finished picture was drawn: settings, seed, weights' ids.",
            },
        },
    },
    202: {
        "model": schemas.Decode,
        "description": "With `Prefer: respond-async`: queued; the picture is not there yet.",
        "headers": {"Retry-After": {"schema": {"type": "integer"}, "example": 2}},
    },
    **problems.responses(
        *problems.OF_KEYS,
        *problems.OF_BITSTREAMS,
        *problems.OF_LINES,
        ParameterError,
        problems.NotAcceptable,
        problems.QueueAway,
        QueueFull,
        errors.Quarantined,
        KeyReused,
        Conflict,
    ),
}


@dataclass(frozen=True, slots=True)
class Asked:
    """The parameters of a decode."""

    tier: Tier
    settings: Settings | None  # None: the instant picture alone
    seed: int
    hold_s: int
    webhooks: Sequence[str]


async def asked(
    tier: Annotated[str, one_of_tiers("See `/v1/tiers`.")] = "instant",
    seed: Annotated[int, Query(ge=0, le=tiers.MAX_SEED)] = 0,
    steps: Annotated[int | None, Query(ge=1, le=tiers.MAX_STEPS)] = None,
    eta: Annotated[float | None, Query(ge=0, le=1)] = None,
    gamma: Annotated[float | None, Query(ge=0, le=1)] = None,
    sampler: Annotated[tiers.Sampler | None, Query()] = None,
    guidance: Annotated[
        float | None,
        Query(
            ge=0, le=tiers.MAX_GUIDANCE, description="Autoguidance; 1 is off, else twice the cost."
        ),
    ] = None,
    deadline_s: Annotated[
        int,
        Query(
            ge=1,
            le=MAX_SUBSCRIPTION_S,
            description="How long the picture is wanted; questions about it renew that.",
        ),
    ] = SUBSCRIPTION_S,
    webhook: Annotated[
        list[str] | None,
        Query(
            max_length=8,
            description="An https URL that is told of the end, by Standard Webhooks.",
        ),
    ] = None,
) -> Asked:
    """The parameters, checked together. Raises `ParameterError`."""
    chosen = tiers.find(tier)
    settings = chosen.settings and tiers.vary(
        chosen.settings, sampler=sampler, steps=steps, eta=eta, gamma=gamma, guidance=guidance
    )
    if webhook and settings is None:
        raise ParameterError("an instant picture is there at once: nobody needs to be told")
    return Asked(chosen, settings, seed, deadline_s, webhook or ())


AskedFor = Annotated[Asked, Depends(asked)]
IdempotencyKey = Annotated[
    str | None,
    Header(min_length=1, max_length=255, description="The same key must mean the same request."),
]


@dataclass(frozen=True, slots=True)
class Given:
    """A bitstream that was sent."""

    data: bytes
    bitstream: Bitstream
    digest: str
    parse_ms: float

    def timing(self, drawn: Drawn) -> dict[str, str]:
        """The header `Server-Timing`."""
        spans = {"parse": self.parse_ms, **drawn.stages}
        return {"Server-Timing": ", ".join(f"{name};dur={ms:.1f}" for name, ms in spans.items())}


async def given(own: Own, data: Body) -> Given:
    """The body, its header judged. Raises `BitstreamError`, `PictureTooLarge`."""
    began = time.perf_counter()
    b = bitstream.parse(data, own.settings.max_pixels)
    return Given(data, b, bitstream.digest(data), (time.perf_counter() - began) * 1e3)


Sent = Annotated[Given, Depends(given)]


@router.post(
    "",
    summary="Decode a bitstream",
    response_class=Response,
    openapi_extra=schemas.BITSTREAM,
    responses=_ANSWERS,
)
async def decode(
    own: Own,
    caller: Decoding,
    request: Request,
    sent: Sent,
    what: AskedFor,
    format: Accepted,
    prefer: Preferred,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Decode a bitstream.

    Answers with the instant picture at once. A diffusion tier also queues its picture, under an id
    that is the digest of the request's content: repeated, it is the same job, and once that is
    done the finished picture comes back at once.
    """
    if what.settings is None:
        drawn = await own.instant.picture(sent.bitstream, sent.digest, format)
        return image_response.picture(request, drawn.file, format, None, sent.timing(drawn))
    wanted = _decode(own, sent, what, what.settings)
    request.state.job_id = wanted.id
    if idempotency_key is not None:
        await anyio.to_thread.run_sync(_check_key, own, caller.name, idempotency_key, wanted.id)
    return await _Submission(own, request, sent, wanted, what, format, prefer, caller).answer()


@router.put(
    "/{id}",
    summary="Decode a bitstream under its id",
    response_class=Response,
    openapi_extra=schemas.BITSTREAM,
    responses={
        **_ANSWERS,
        201: {**_ANSWERS[200], "description": "As 200; the decode is new."},
        422: problems.responses(
            *errors.BitstreamError.__subclasses__(), errors.Quarantined, ParameterError, IdMismatch
        )[422],
    },
)
async def put(
    own: Own,
    caller: Decoding,
    request: Request,
    id: JobId,
    sent: Sent,
    what: AskedFor,
    format: Accepted,
    prefer: Preferred,
) -> Response:
    """As `POST`, under the id that the client computed from the content.

    The id is the first 32 hex digits of SHA-256 over six lines, joined by newlines: `afterimage-1`;
    SHA-256 of the bitstream in hex; the settings as JSON with sorted keys and no spaces (`beta`,
    `eta`, `gamma`, `guidance`, `sampler`, `steps`, as `/v1/tiers` lists them, numbers but `steps`
    with a decimal point, as `"eta":0.0`); the seed; the weights ids of the codec and of the
    decoder, which `/v1/models` lists.
    """
    if what.settings is None:
        raise ParameterError("an instant picture has no id: ask for a diffusion tier, or POST")
    wanted = _decode(own, sent, what, what.settings)
    request.state.job_id = wanted.id
    if wanted.id != id:
        raise IdMismatch(f"this content's id is {wanted.id}")
    submission = _Submission(own, request, sent, wanted, what, format, prefer, caller)
    answer = await submission.answer()
    if submission.made and answer.status_code == 200:
        answer.status_code = 201
    return answer


@dataclass(slots=True)
class _Submission:
    """One request for a diffusion picture."""

    own: State
    request: Request
    sent: Given
    decode: DecodeRequest
    what: Asked
    format: OutputFormat
    prefer: Preferences
    caller: Caller
    made: bool = False  # whether the job is new

    async def answer(self) -> Response:
        """The finished picture where it is kept; else the draft, or 202, and the job is queued."""
        location = f"/v1/decodes/{self.decode.id}"
        headers = {"Location": location, "Link": f'<{location}/image>; rel="upgrade"'}
        finished = await self._finished()
        metrics.cache("picture", finished is not None)
        for url in self.what.webhooks:
            await anyio.to_thread.run_sync(check_url, url, self.own.webhooks, limiter=_RESOLVING)
        if finished is not None:
            await anyio.to_thread.run_sync(self._tell)
            return self._picture(finished, self.decode, {**headers, "X-Cache": "hit"})
        headers["X-Cache"] = "miss"
        await anyio.to_thread.run_sync(admission.admit, self.own, self.decode.id)
        if self.prefer.respond_async:
            return await self._later(headers)
        drawn = await pictures.draft(self.own, self.decode, self.sent.bitstream, self.format)
        await self._submit()  # only what decodes is queued
        return self._picture(drawn.file, None, {**headers, **self.sent.timing(drawn)})

    async def _finished(self) -> bytes | None:
        """The finished picture, where both it and its record are kept."""
        state = await anyio.to_thread.run_sync(self.own.jobs.get, self.decode.id)
        if state is None or state.status != "succeeded":
            return None
        return await pictures.finished(self.own, self.decode, self.format)

    async def _later(self, headers: dict[str, str]) -> Response:
        await self.own.instant.check(self.sent.bitstream)
        await self._submit()
        id = self.decode.id
        if self.prefer.wait_s:
            began = time.perf_counter()
            await progress.until_ended(self.own, self.request, id, self.prefer.wait_s)
            self.request.state.waited_s = time.perf_counter() - began
            finished = await self._finished()
            if finished is not None:
                headers["Preference-Applied"] = f"wait={self.prefer.wait_s}"
                return self._picture(finished, self.decode, headers)
        state = await progress.look(self.own, id, self.caller.name)
        answer = await pictures.pending(self.own, state)
        answer.headers.update({**headers, "Preference-Applied": self.prefer.applied})
        return answer

    async def _submit(self) -> None:
        def submit() -> bool:
            self.own.quotas.job(self.caller, self.decode.id)
            jobs, data = self.own.jobs, self.sent.data
            self._register()  # before the job, whose end could be missed
            hold_s = (
                MAX_SUBSCRIPTION_S if self.what.webhooks else self.what.hold_s
            )  # nobody need ask
            state, made = jobs.submit(self.decode, data, self.caller.name, hold_s)
            if made:  # a run before may just have ended, and told them
                self._register()
            if self.what.webhooks and state.status in ENDED:
                outbox.job_ended(self.own.store, state.id, *outbox.event(state))
            eta_s = estimates.eta_s(jobs, state) if made else None
            if eta_s is not None:
                jobs.save_eta(state.id, eta_s)
            return made

        self.made = await anyio.to_thread.run_sync(submit)

    def _register(self) -> None:
        for url in self.what.webhooks:
            outbox.register(self.own.store, self.decode.id, url)

    def _tell(self) -> None:
        """Tell the webhooks of this request of a job whose picture is kept."""
        state = self.own.jobs.get(self.decode.id) if self.what.webhooks else None
        if state is None or state.status not in ENDED:
            return
        admission.room(self.own)
        self._register()
        outbox.job_ended(self.own.store, state.id, *outbox.event(state))

    def _picture(
        self, file: bytes, drawn: DecodeRequest | None, headers: dict[str, str]
    ) -> Response:
        return image_response.picture(self.request, file, self.format, drawn, headers)


def _decode(own: State, sent: Given, what: Asked, settings: Settings) -> DecodeRequest:
    """The job that is asked for. Raises `ParameterError` where it is more than one may ask for."""
    b = sent.bitstream
    wanted = DecodeRequest(
        sent.digest, what.tier.name, settings, what.seed, own.library.codec_id(b),
        own.decoder_weights, b.quality, b.width, b.height,
    )  # fmt: skip
    limit, size = own.settings.max_megapixel_steps, b.width * b.height / 1e6 * settings.calls
    if size > limit:
        raise ParameterError(f"{size:.0f} megapixel-steps; the limit is {limit:.0f}: ask for fewer")
    return wanted


def _check_key(own: State, caller: str, key: str, job_id: str) -> None:
    """Remember what a key stands for, where there is room: else only what is kept is answered.

    Raises `KeyReused` where it stands for something else.
    """
    name = own.store.key("idempotency", caller, key)
    if own.store.fullness() < admission.FULL:
        own.store.queue.set(name, job_id, nx=True, ex=IDEMPOTENCY_TTL_S)
    if own.store.queue.get(name) not in {None, job_id.encode()}:
        raise KeyReused(f"Idempotency-Key {key!r} came with another request before")
