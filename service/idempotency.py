"""The header `Idempotency-Key`: a key belongs to one decode."""

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
