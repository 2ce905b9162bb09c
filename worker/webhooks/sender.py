"""Takes webhooks from their queue, signs and sends them, and notes what came of it."""

import logging
import random
import signal
import sys
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime

import httpx
from pydantic import ValidationError
from pydantic_settings import SettingsError
from standardwebhooks import Webhook

from models.errors import AfterimageError, ParameterError
from worker.queue.outbox import Message, Messages
from worker.queue.store import RedisError, Store, connect
from worker.settings import WorkerSettings
from worker.telemetry import logs
from worker.webhooks import pinned_http, url_guard
from worker.webhooks.settings import WebhookSettings

log = logging.getLogger(__name__)

MAX_RETRY_AFTER_S = 3600.0
"""How long a receiver may put us off at a time."""
POLL_S = 0.5
"""How often an idle thread looks for what is due, at least."""
AWAY_S = 0.5
"""How long to wait for a store that is away."""
MAX_ERROR = 200
"""Characters that are kept of an error."""
GONE = 410
BUSY = frozenset({429, 503})
"""Statuses whose Retry-After is heeded."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of an attempt."""

    error: str = ""  # empty: it was delivered
    final: bool = False
    wait_s: float = 0.0  # as the receiver asks


class Courier:
    """Its threads share it."""

    def __init__(
        self, messages: Messages, settings: WebhookSettings, resolver: url_guard.Resolver
    ) -> None:
        self.messages, self.settings, self.resolver = messages, settings, resolver
        self.signers = [Webhook(secret) for secret in settings.secrets]
        self.tls = httpx.create_ssl_context()  # certifi's authorities, or those of SSL_CERT_FILE

    def run(self, stop: threading.Event) -> None:
        """One message after the other, until `stop`. What waits for us is never lost by an error
        of ours or of the store's: it is due again when the lease ends."""
        while not stop.is_set():
            try:
                if not self._next():
                    stop.wait(POLL_S * random.uniform(0.5, 1))
            except RedisError as e:
                log.warning("the queue cannot be used: %s", e)
                stop.wait(AWAY_S)

    def _next(self) -> bool:
        """Deal with the next message; False where none is due. Raises `RedisError`."""
        message = self.messages.claim(self.settings.lease_s)
        if message is None:
            return False
        lease_ends = time.monotonic() + self.settings.lease_s
        with logs.bound(job=message.job):
            outcome = self._attempt(message)
            while True:
                try:
                    self._note(message, outcome)
                    return True
                except RedisError:  # else it would be sent again
                    if time.monotonic() + AWAY_S > lease_ends:
                        raise
                    time.sleep(AWAY_S)

    def _attempt(self, message: Message) -> Outcome:
        if message.attempts > len(self.settings.webhook_retries_s) + 1:
            return Outcome("its consumers died", final=True)
        try:
            target = url_guard.check(message.url, self.settings.allow, self.resolver)
            answer = self._post(target, message)
        except (ParameterError, *pinned_http.NETWORK_ERRORS) as e:
            return Outcome(f"{type(e).__name__}: {e}"[:MAX_ERROR])
        except Exception:
            log.exception("webhook %s", message.id)
            return Outcome("internal error")
        if 200 <= answer.status < 300:
            return Outcome()
        wait_s = min(answer.retry_after_s, MAX_RETRY_AFTER_S) if answer.status in BUSY else 0.0
        return Outcome(f"it answered {answer.status}", answer.status == GONE, wait_s)

    def _post(self, target: url_guard.Target, message: Message) -> pinned_http.Answer:
        now = datetime.now(UTC)
        signatures = [s.sign(message.id, now, message.body) for s in self.signers]
        headers = {
            "Content-Type": "application/json",
            "User-Agent": "Afterimage-Webhooks",
            "Webhook-Id": message.id,
            "Webhook-Timestamp": str(int(now.timestamp())),
            "Webhook-Signature": " ".join(signatures),
        }
        body = message.body.encode()
        return pinned_http.post(target, body, headers, self.tls, self.settings.webhook_timeout_s)

    def _note(self, message: Message, outcome: Outcome) -> None:
        """Of a URL only the host is logged: its path may hold a receiver's secret."""
        told = (message.id, httpx.URL(message.url).host, message.attempts, outcome.error)
        retries = self.settings.webhook_retries_s
        if not outcome.error:
            self.messages.delivered(message)
            log.info("webhook %s to %s: delivered at attempt %d%s", *told)
        elif outcome.final or message.attempts > len(retries):
            self.messages.give_up(message, outcome.error)
            log.warning("webhook %s to %s: given up after attempt %d: %s", *told)
        else:
            jittered = random.uniform(0, retries[message.attempts - 1])
            self.messages.put_off(message, max(jittered, outcome.wait_s))
            log.info("webhook %s to %s: attempt %d failed: %s", *told)


def deliver_forever(
    store: Store,
    settings: WebhookSettings,
    stop: threading.Event,
    resolver: url_guard.Resolver = url_guard.resolve,
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
