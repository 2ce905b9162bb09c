"""Webhooks: how a job ended, told by signed requests (the Standard Webhooks specification).

They have a queue and consumers of their own (`python -P -m worker.webhooks`): neither decodes nor
requests wait for a receiver. A message is sent at least once: one whose consumer died before it
noted the answer is sent again, with the same `webhook-id`.

The queue is not RQ's: its retries have fixed intervals, without jitter or a receiver's Retry-After,
and what a killed worker held comes back after minutes; here it does after a lease.
"""

import json
import logging
import signal
import sys
import threading
from base64 import b64decode
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError
from redis.client import Pipeline

from models.errors import AfterimageError, ParameterError
from worker import addresses, logs
from worker.courier import Courier
from worker.messages import Messages
from worker.records import JobState
from worker.settings import WorkerSettings, secrets_dir
from worker.store import RedisError, Store, connect

log = logging.getLogger(__name__)

MAX_URLS = 32
"""Of a job; whoever asks for the same picture shares them."""


class WebhookSettings(BaseSettings):
    """Who signs, who may be told, and when it is tried again."""

    model_config = SettingsConfigDict(
        env_prefix="AFTERIMAGE_",
        extra="ignore",
        hide_input_in_errors=True,
        secrets_dir=secrets_dir(),
    )

    webhook_secret: SecretStr = Field(
        SecretStr(""), description="whsec_ and base64 of 24 to 64 bytes; to change it: new and old"
    )
    webhook_allow: str = Field(
        "", description="hosts, or host:port, that may be private or http, with commas between"
    )
    webhook_retries_s: tuple[Annotated[float, Field(ge=0, le=86400)], ...] = Field(
        (5, 30, 120, 600, 3600, 4 * 3600, 12 * 3600),
        description="longest wait after the 1st, 2nd, … failure; after one more it is given up",
    )
    webhook_timeout_s: float = Field(10, gt=0, le=60, description="of one attempt")
    webhook_threads: int = Field(4, ge=1, le=64, description="attempts at once, per consumer")

    @field_validator("webhook_secret")
    @classmethod
    def _is_secret(cls, value: SecretStr) -> SecretStr:
        for secret in value.get_secret_value().split():
            try:
                size = len(b64decode(secret.removeprefix("whsec_"), validate=True))
            except ValueError:
                size = 0
            if not secret.startswith("whsec_") or not 24 <= size <= 64:
                raise ValueError("it must be whsec_ and base64 of 24 to 64 bytes")
        return value

    @property
    def secrets(self) -> list[str]:
        """Each of them signs; a receiver may know any."""
        return self.webhook_secret.get_secret_value().split()

    @property
    def allow(self) -> frozenset[str]:
        """The entries of `webhook_allow`."""
        return frozenset(self.webhook_allow.lower().replace(",", " ").split())

    @property
    def lease_s(self) -> float:
        """How long a consumer may keep a message; its attempt ends well before that."""
        return 2 * self.webhook_timeout_s + addresses.RESOLVE_S


def check(
    url: str, settings: WebhookSettings, resolver: addresses.Resolver = addresses.resolve
) -> None:
    """Whether a client may name this URL; that is asked again at every attempt.

    Raises `ParameterError`. Waits for the resolver, up to `addresses.RESOLVE_S`.
    """
    if not settings.secrets:
        raise ParameterError("webhook: none are sent here, for want of AFTERIMAGE_WEBHOOK_SECRET")
    addresses.check(url, settings.allow, resolver)


def register(store: Store, job_id: str, url: str) -> None:
    """Tell `url`, once, when the job ends. Raises `ParameterError` beyond `MAX_URLS`."""
    if not Messages(store).register(job_id, url, MAX_URLS):
        raise ParameterError(f"webhook: this decode has {MAX_URLS} already")


def event(state: JobState) -> tuple[str, dict[str, Any]]:
    """Type and data of what is told about a job that ended."""
    picture = f"/v1/decodes/{state.id}/image" if state.status == "succeeded" else None
    decode = state.decode
    return f"decode.{state.status}", {
        "id": state.id, "status": state.status, "tier": decode.tier, "seed": decode.seed,
        "width": decode.width, "height": decode.height, "image": picture,
        "error": state.error or None,
    }  # fmt: skip


def job_ended(
    store: Store, job_id: str, event_type: str, data: dict[str, Any], pipe: Pipeline | None = None
) -> None:
    """Queue a message to each registered URL and forget the URLs: a second call queues nothing.

    With `pipe`, that is a part of the transaction that ends the job.
    """
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    body = {"type": event_type, "timestamp": now, "data": data}
    Messages(store).move(job_id, json.dumps(body, separators=(",", ":")), pipe)


def deliver_forever(
    store: Store,
    settings: WebhookSettings,
    stop: threading.Event,
    resolver: addresses.Resolver = addresses.resolve,
) -> None:
    """Send what is due, on `webhook_threads` threads, until `stop`; attempts then still finish."""
    courier = Courier(Messages(store), settings, resolver)
    threads = [
        threading.Thread(target=courier.run, args=(stop,), name=f"webhooks-{i}", daemon=True)
        for i in range(settings.webhook_threads)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> int:
    """Deliver until SIGTERM or SIGINT; 1 or 2 after an error that was told on stderr."""
    try:
        logs.setup()
        settings, own = WorkerSettings(), WebhookSettings()
        if not settings.redis_url or not own.secrets:
            return _complain("webhooks need REDIS_URL and AFTERIMAGE_WEBHOOK_SECRET", 2)
        connected = connect(settings)
        connected.ping()
    except (ValidationError, SettingsError, AfterimageError, RedisError) as e:
        return _complain(f"webhooks cannot be sent: {e}", 1)
    stop = threading.Event()
    ends = signal.SIGTERM, signal.SIGINT
    # a thread waits for them: a handler would run in the middle of anything, an Event's lock held
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)

    def wait() -> None:
        signal.sigwait(ends)
        stop.set()

    threading.Thread(target=wait, daemon=True).start()
    log.info("sending webhooks: %s", settings.prefix)
    deliver_forever(connected, own, stop)
    connected.close()
    return 0


def _complain(text: str, code: int) -> int:
    print(text, file=sys.stderr)  # noqa: T201
    return code


if __name__ == "__main__":
    sys.exit(main())
