"""Checks requests for batches, and adds the batches to the queue."""

import asyncio
from array import array
from collections.abc import Iterator
from itertools import islice
from typing import Any

import anyio.to_thread
import numpy as np

from models import memory, tiers
from models.errors import ParameterError
from service import admission, idempotency, object_writes
from service.auth import Caller
from service.batches import listing
from service.batches.documents import Document
from service.batches.request_schemas import BatchRequest
from service.services import Services
from service.submission import check_webhooks
from worker.queue.batches.records import Item, Spec
from worker.queue.batches.store import Batches, Packed
from worker.queue.references import Reference

LARGE = 2**20
"""Size of a body, in bytes, after which memory is returned to the system: lists of items are large
and rare."""
TRIM_S = 2.0
"""How long after the response: its body is freed by then."""
_THREADS = anyio.CapacityLimiter(1)
"""Threads that check items, of which a request may have many; others go on meanwhile."""


async def submit(services: Services, caller: Caller, data: bytes, key: str | None) -> str:
    """Add the batch that a body asks for; returns its id. `key` is the `Idempotency-Key`.

    Raises `RequestValidationError`, `ParameterError`, `StoreError`, `QueueFull`, `KeyReused`.
    """
    try:
        return await _submit(services, caller, data, key)
    finally:
        if len(data) > LARGE:
            loop = asyncio.get_running_loop()
            loop.call_later(TRIM_S, loop.run_in_executor, None, memory.trim)


async def _submit(services: Services, caller: Caller, data: bytes, key: str | None) -> str:
    document = await anyio.to_thread.run_sync(Document, data, limiter=_THREADS)
    spec = _spec(document.request)
    await check_webhooks(services, caller, document.request.webhook)
    if not document.count:
        _check_prefixes(services, caller, spec)

    def create() -> str:
        items = Packed.of(_items(services, caller, document), spec.seed)
        admission.check_memory(services)
        id = idempotency.batch_id(services, caller.name, key, data)
        Batches(services.store).create(caller.name, spec, items, id)
        return id

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
    listing.check(services.objects, spec, caller.name)
    if (spec.source, spec.suffix) == (spec.target, listing.suffix_of(spec)):
        raise ParameterError("target: the pictures would replace their sources; choose another")


def _items(services: Services, caller: Caller, document: Document) -> Iterator[Item]:
    """The items of a request. Raises `ParameterError` and `StoreError`, which name the item."""
    request, hashes = document.request, array("q")
    for number, item in enumerate(document.items()):
        source = Reference.parse(item["source"], f"items.{number}.source")
        target = Reference.parse(item["target"], f"items.{number}.target")
        services.objects.check(source, caller.name, "read")
        services.objects.check(target, caller.name, "write")
        if request.format is None:
            object_writes.format_of(target, f"items.{number}.target")
        if source == target:
            raise ParameterError(
                f"items.{number}: its source {source} is its target, too; write each picture to "
                "another object"
            )
        hashes.append(hash(item["target"]))
        seed = item.get("seed")
        yield Item(item["source"], item["target"], request.seed if seed is None else seed)
    _check_targets(document, np.frombuffer(hashes, np.int64))


def _check_targets(document: Document, hashes: "np.ndarray[Any, np.dtype[np.int64]]") -> None:
    """Raise `ParameterError` if two items have the same target. `hashes` are those of the targets.

    The names themselves would take ten times the memory.
    """
    order = np.argsort(hashes, kind="stable")
    equal = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    for first, second in zip(order[equal], order[equal + 1], strict=True):
        one, other = (next(islice(document.items(), int(n), None)) for n in (first, second))
        if one["target"] == other["target"]:
            raise ParameterError(
                f"items {first} and {second} have the same target {one['target']}; write each "
                "picture to another object"
            )
