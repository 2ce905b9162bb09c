"""Checks requests for batches, and adds the batches to the queue."""

import anyio.to_thread
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from models import memory, tiers
from models.errors import ParameterError
from service import admission, idempotency, object_writes, parameters
from service.auth import Caller
from service.batches import listing
from service.batches.request_schemas import BatchRequest
from service.services import Services
from service.submission import check_webhooks
from worker.queue.batches.records import Item, Spec
from worker.queue.batches.store import Batches
from worker.queue.references import Reference

LARGE = 2**20
"""Size of a body, in bytes, after which memory is returned to the system: lists of items are large
and rare."""
_THREADS = anyio.CapacityLimiter(1)
"""Threads that check items, of which a request may have many; others go on meanwhile."""


async def submit(services: Services, caller: Caller, data: bytes, key: str | None) -> str:
    """Add the batch that a body asks for; returns its id. `key` is the `Idempotency-Key`.

    Raises `RequestValidationError`, `ParameterError`, `StoreError`, `QueueFull`, `KeyReused`.
    """
    id = await _submit(services, caller, data, key)
    if len(data) > LARGE:
        await anyio.to_thread.run_sync(memory.trim, limiter=_THREADS)
    return id


async def _submit(services: Services, caller: Caller, data: bytes, key: str | None) -> str:
    request = await anyio.to_thread.run_sync(_parse, data, limiter=_THREADS)
    spec = _spec(request)
    await check_webhooks(services, caller, request.webhook)
    if request.items is None:
        _check_prefixes(services, caller, spec)

    def create() -> str:
        items = [] if request.items is None else _items(services, caller, request)
        admission.check_memory(services)
        id = idempotency.batch_id(services, caller.name, key, data)
        Batches(services.store).create(caller.name, spec, items, id)
        return id

    return await anyio.to_thread.run_sync(create, limiter=_THREADS)


def _parse(data: bytes) -> BatchRequest:
    """Parse a body. Raises `RequestValidationError`."""
    try:
        return BatchRequest.model_validate_json(data)
    except ValidationError as e:
        faults = e.errors()[: parameters.MAX_FAULTS]
        raise RequestValidationError(
            [parameters.fault("body", ".".join(map(str, x["loc"])), x["msg"]) for x in faults]
        ) from None


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
    listing.check(services.objects, spec, caller.name)
    if (spec.source, spec.suffix) == (spec.target, listing.suffix_of(spec)):
        raise ParameterError("target: the pictures would replace their sources; choose another")


def _items(services: Services, caller: Caller, request: BatchRequest) -> list[Item]:
    """The items of a request. Raises `ParameterError` and `StoreError`, which name the item."""
    items: list[Item] = []
    numbers: dict[str, int] = {}
    for number, item in enumerate(request.items or ()):
        source = Reference.parse(item["source"], f"items.{number}.source")
        target = Reference.parse(item["target"], f"items.{number}.target")
        services.objects.check(source, caller.name, "read")
        services.objects.check(target, caller.name, "write")
        if request.format is None:
            object_writes.format_of(target, f"items.{number}.target")
        other = numbers.setdefault(item["target"], number)
        if other != number or source == target:
            reason = f"items {other} and {number} have the same target {target}"
            if source == target:
                reason = f"items.{number}: its source {source} is its target, too"
            raise ParameterError(f"{reason}; write each picture to another object")
        seed = item.get("seed")
        seed = request.seed if seed is None else seed
        items.append(Item(item["source"], item["target"], seed))
    return items
