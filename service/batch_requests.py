"""Checks requests for batches, and adds the batches to the queue."""

import anyio.to_thread
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from models import tiers
from models.errors import ParameterError
from service import admission, batch_listing, idempotency, object_writes, parameters
from service.auth import Caller
from service.batch_request_schemas import BatchRequest
from service.services import Services
from worker.queue.batch_records import Item, Spec
from worker.queue.batches import Batches
from worker.queue.references import Reference

_THREADS = anyio.CapacityLimiter(1)
"""Threads that check items, of which a request may have many; others go on meanwhile."""


async def parse(data: bytes) -> BatchRequest:
    """Parse a body. Raises `RequestValidationError`."""

    def validate() -> BatchRequest:
        try:
            return BatchRequest.model_validate_json(data)
        except ValidationError as e:
            faults = e.errors()[: parameters.MAX_FAULTS]
            raise RequestValidationError(
                [parameters.fault("body", ".".join(map(str, x["loc"])), x["msg"]) for x in faults]
            ) from None

    return await anyio.to_thread.run_sync(validate, limiter=_THREADS)


async def submit(
    services: Services, caller: Caller, request: BatchRequest, data: bytes, key: str | None
) -> str:
    """Add a batch; returns its id. `key` is the `Idempotency-Key` of the body `data`.

    Raises `ParameterError`, `StoreError`, `QueueFull`, `KeyReused`.
    """

    def create() -> str:
        items = [] if request.items is None else _items(services, caller, request)
        admission.check_memory(services)
        id = idempotency.batch_id(services, caller.name, key, data)
        Batches(services.store).create(caller.name, spec, items, id)
        return id

    spec = _spec(request)
    if request.items is None:
        _check_prefixes(services, caller, spec)
    return await anyio.to_thread.run_sync(create, limiter=_THREADS)


def _spec(request: BatchRequest) -> Spec:
    """What the items share. Raises `ParameterError`."""
    tier = tiers.find(request.tier)
    if tier.settings is None:
        raise ParameterError(
            f"tier is {tier.name!r}, which is no diffusion tier; choose one of "
            + ", ".join(t.name for t in tiers.TIERS.values() if t.settings)
        )
    prefixes = (request.source, request.target)
    if (request.items is None) == (None in prefixes) or (request.items and any(prefixes)):
        raise ParameterError("items: send either items, or the prefixes source and target")
    settings = tiers.vary(
        tier.settings, sampler=request.sampler, steps=request.steps, eta=request.eta,
        gamma=request.gamma, guidance=request.guidance,
    )  # fmt: skip
    return Spec(
        tier.name, settings, request.format, request.realism, request.seed, request.priority,
        request.on_existing, request.webhook, request.source or "", request.target or "",
        request.suffix,
    )  # fmt: skip


def _check_prefixes(services: Services, caller: Caller, spec: Spec) -> None:
    batch_listing.check(services.objects, spec, caller.name)
    if (spec.source, spec.suffix) == (spec.target, batch_listing.suffix_of(spec)):
        raise ParameterError("target: the pictures would replace their sources; choose another")


def _items(services: Services, caller: Caller, request: BatchRequest) -> list[Item]:
    """The items of a request. Raises `ParameterError` and `StoreError`, which name the item."""
    items: list[Item] = []
    numbers: dict[str, int] = {}
    for number, item in enumerate(request.items or ()):
        source = Reference.parse(item.source, f"items.{number}.source")
        target = Reference.parse(item.target, f"items.{number}.target")
        services.objects.check(source, caller.name, "read")
        services.objects.check(target, caller.name, "write")
        if request.format is None:
            object_writes.format_of(target, f"items.{number}.target")
        other = numbers.setdefault(item.target, number)
        if other != number or source == target:
            reason = f"items {other} and {number} have the same target {target}"
            if source == target:
                reason = f"items.{number}: its source {source} is its target, too"
            raise ParameterError(f"{reason}; write each picture to another object")
        items.append(
            Item(item.source, item.target, request.seed if item.seed is None else item.seed)
        )
    return items
