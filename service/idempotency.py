"""The header `Idempotency-Key`: a key belongs to one decode."""

import hashlib
import uuid

from service import admission
from service.problems import KeyReused
from service.services import Services

IDEMPOTENCY_TTL_S = 24 * 3600
"""How long an `Idempotency-Key` is remembered."""


def check_key(services: Services, caller: str, key: str, job_id: str) -> None:
    """Check a key, and store its job unless the queue's memory is nearly full.

    Raises `KeyReused` if the key belongs to another job.
    """
    name = services.store.key("idempotency", caller, key)
    if services.store.fullness() < admission.FULL:
        services.store.queue.set(name, job_id, nx=True, ex=IDEMPOTENCY_TTL_S)
    if services.store.queue.get(name) not in {None, job_id.encode()}:
        raise KeyReused(f"Idempotency-Key {key!r} belongs to another request; choose a new key")


def batch_id(services: Services, caller: str, key: str | None, body: bytes) -> str:
    """The id of the batch that belongs to an `Idempotency-Key`; a new one without a key.

    Raises `KeyReused` if the key belongs to another body.
    """
    new = uuid.uuid4().hex
    if key is None:
        return new
    queue, name = services.store.queue, services.store.key("idempotency-batch", caller, key)
    digest = hashlib.sha256(body).hexdigest()
    queue.set(name, f"{new} {digest}", nx=True, ex=IDEMPOTENCY_TTL_S)
    value: bytes = queue.get(name) or b""  # type: ignore[assignment]
    id, _, known = value.decode().partition(" ")
    if known != digest:
        raise KeyReused(f"Idempotency-Key {key!r} belongs to another request; choose a new key")
    return id
