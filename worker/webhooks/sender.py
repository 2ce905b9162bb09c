"""The webhook process: claims messages from the outbox, signs and sends them, records results."""

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
from worker.queue.outbox import Message, Outbox
from worker.queue.store import RedisError, Store, connect
from worker.settings import WorkerSettings
from worker.telemetry import logs
from worker.webhooks import pinned_http, url_guard
from worker.webhooks.settings import WebhookSettings

log = logging.getLogger(__name__)

MAX_RETRY_AFTER_S = 3600.0
"""Upper limit of a receiver's Retry-After."""
POLL_S = 0.5
"""Longest pause between two looks of an idle thread for due messages."""
REDIS_RETRY_S = 0.5
"""Pause after an error of Redis."""
MAX_ERROR_CHARS = 200
"""Length to which an error is cut before it is stored."""
GONE = 410
RETRY_LATER = frozenset({429, 503})
"""Statuses with which Retry-After is respected."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of an attempt."""

    error: str = ""  # empty: delivered
    final: bool = False  # True: no further attempts
    wait_s: float = 0.0  # shortest wait before the next attempt, from the receiver's Retry-After


class WebhookSender:
    """Sends messages, on any number of threads."""

    def __init__(
        self, outbox: Outbox, settings: WebhookSettings, resolver: url_guard.Resolver
    ) -> None:
        self.outbox, self.settings, self.resolver = outbox, settings, resolver
        self.signers = [Webhook(secret) for secret in settings.secrets]
        self.tls = httpx.create_ssl_context()  # certifi's authorities, or those of SSL_CERT_FILE

    def run(self, stop: threading.Event) -> None:
        """Send one message after the other until `stop` is set.

        A message whose attempt ends in an unexpected error is due again after its lease.
        """
        while not stop.is_set():
            try:
                if not self._send_next():
                    stop.wait(POLL_S * random.uniform(0.5, 1))
            except RedisError as e:
                log.warning("webhooks: Redis failed; retrying: %s", e)
                stop.wait(REDIS_RETRY_S)

    def _send_next(self) -> bool:
        """Process the next message; False if none is due. Raises `RedisError`."""
        message = self.outbox.claim(self.settings.lease_s)
        if message is None:
            return False
        lease_ends = time.monotonic() + self.settings.lease_s
        with logs.bound(job=message.job):
            outcome = self._attempt(message)
            while True:
                try:
                    self._record(message, outcome)
                    return True
                except RedisError:  # try again: an unrecorded message would be sent once more
                    if time.monotonic() + REDIS_RETRY_S > lease_ends:
                        raise
                    time.sleep(REDIS_RETRY_S)

    def _attempt(self, message: Message) -> Outcome:
        if message.attempts > len(self.settings.webhook_retries_s) + 1:
            return Outcome("every earlier sender of this message crashed", final=True)
        try:
            target = url_guard.check(message.url, self.settings.allow, self.resolver)
            response = self._post(target, message)
        except (ParameterError, *pinned_http.NETWORK_ERRORS) as e:
            return Outcome(f"{type(e).__name__}: {e}"[:MAX_ERROR_CHARS])
        except Exception:
            log.exception("webhook %s: unexpected error", message.id)
            return Outcome("internal error")
        status = response.status
        if 200 <= status < 300:
            return Outcome()
        wait_s = min(response.retry_after_s, MAX_RETRY_AFTER_S) if status in RETRY_LATER else 0.0
        return Outcome(f"status {status}", status == GONE, wait_s)

    def _post(self, target: url_guard.Target, message: Message) -> pinned_http.Response:
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

    def _record(self, message: Message, outcome: Outcome) -> None:
        """Record and log the outcome. Only the URL's host is logged: its path may be secret."""
        details = (message.id, httpx.URL(message.url).host, message.attempts)
        retries = self.settings.webhook_retries_s
        if not outcome.error:
            self.outbox.delivered(message)
            log.info("webhook %s to %s: delivered at attempt %d", *details)
        elif outcome.final or message.attempts > len(retries):
            self.outbox.give_up(message, outcome.error)
            log.warning("webhook %s to %s: given up after attempt %d: %s", *details, outcome.error)
        else:
            jittered = random.uniform(0, retries[message.attempts - 1])
            self.outbox.retry_in(message, max(jittered, outcome.wait_s))
            log.info("webhook %s to %s: attempt %d failed: %s", *details, outcome.error)


def deliver_forever(
    store: Store,
    settings: WebhookSettings,
    stop: threading.Event,
    resolver: url_guard.Resolver = url_guard.resolve,
) -> None:
    """Send due messages on `webhook_threads` threads until `stop` is set.

    Returns once the attempts in progress have ended.
    """
    sender = WebhookSender(Outbox(store), settings, resolver)
    threads = [
        threading.Thread(target=sender.run, args=(stop,), name=f"webhooks-{i}", daemon=True)
        for i in range(settings.webhook_threads)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> int:
    """Send webhooks until SIGTERM or SIGINT; returns 1 or 2 after an error, reported on stderr."""
    try:
        logs.setup()
        settings, webhooks = WorkerSettings(), WebhookSettings()
        if not settings.redis_url or not webhooks.secrets:
            return _complain("set REDIS_URL and AFTERIMAGE_WEBHOOK_SECRET to send webhooks", 2)
        connected = connect(settings)
        connected.ping()
    except (ValidationError, SettingsError, AfterimageError, RedisError) as e:
        return _complain(f"webhooks cannot be sent: {e}", 1)
    stop = _stop_on_signals()
    log.info("sending webhooks of the queue with prefix %s", settings.prefix)
    deliver_forever(connected, webhooks, stop)
    connected.close()
    return 0


def _stop_on_signals() -> threading.Event:
    """An event that SIGTERM and SIGINT set.

    A thread waits for the signals. A handler could interrupt code that holds the event's lock.
    """
    stop, signals = threading.Event(), (signal.SIGTERM, signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def wait() -> None:
        signal.sigwait(signals)
        stop.set()

    threading.Thread(target=wait, daemon=True).start()
    return stop


def _complain(text: str, status: int) -> int:
    print(text, file=sys.stderr)  # noqa: T201
    return status
