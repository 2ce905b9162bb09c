"""The webhook process: claims messages from the outbox, signs and sends them, records results."""

import logging
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
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
"""Longest pause between two looks for due messages."""
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


class Deliveries:
    """Counts the deliveries in progress: of each caller, and of each line (caller and host)."""

    def __init__(self, settings: WebhookSettings) -> None:
        self.settings = settings
        self.changed = threading.Event()  # set whenever a delivery ends
        self._lock = threading.Lock()
        self._callers: Counter[str] = Counter()
        self._lines: Counter[str] = Counter()

    def begin(self, message: Message) -> None:
        """Count a delivery."""
        with self._lock:
            self._callers[message.caller] += 1
            self._lines[message.line] += 1

    def end(self, message: Message) -> None:
        """Stop counting a delivery."""
        with self._lock:
            for counter, name in (self._callers, message.caller), (self._lines, message.line):
                counter[name] -= 1
                if not counter[name]:
                    del counter[name]
            self.changed.set()

    def full(self) -> tuple[list[str], list[str]] | None:
        """Callers and lines at their limits; None if the limit of all deliveries is reached."""
        with self._lock:
            if self._callers.total() >= self.settings.webhook_threads:
                return None
            callers = _at_limit(self._callers, self.settings.per_caller)
            return callers, _at_limit(self._lines, self.settings.per_host)

    def idle(self) -> bool:
        """True if no delivery is in progress."""
        return not self._callers


def _at_limit(counter: Counter[str], limit: int) -> list[str]:
    return [name for name, count in counter.items() if count >= limit]


class WebhookSender:
    """Sends messages, each on a thread of a pool."""

    def __init__(
        self, outbox: Outbox, settings: WebhookSettings, resolver: url_guard.Resolver
    ) -> None:
        self.outbox, self.settings, self.resolver = outbox, settings, resolver
        self.deliveries = Deliveries(settings)
        self.signers = [Webhook(secret) for secret in settings.secrets]
        self.tls = httpx.create_ssl_context()  # certifi's authorities, or those of SSL_CERT_FILE

    def run(self, stop: threading.Event) -> None:
        """Send messages until `stop` is set; return once the deliveries in progress have ended.

        A message whose attempt ends in an unexpected error is due again after its lease.
        """
        threads = self.settings.webhook_threads
        with ThreadPoolExecutor(threads, thread_name_prefix="webhooks") as pool:
            while not stop.is_set():
                self.deliveries.changed.clear()
                try:
                    message = self._claim()
                except RedisError as e:
                    log.warning("webhooks: Redis failed; retrying: %s", e)
                    stop.wait(REDIS_RETRY_S)
                    continue
                if message is not None:
                    self.deliveries.begin(message)
                    pool.submit(self._deliver, message, time.monotonic() + self.settings.lease_s)
                elif self.deliveries.idle():
                    stop.wait(POLL_S * random.uniform(0.5, 1))
                else:
                    self.deliveries.changed.wait(POLL_S * random.uniform(0.5, 1))

    def _claim(self) -> Message | None:
        """Claim a due message whose caller and host are below their limits. Raises `RedisError`."""
        full = self.deliveries.full()
        return None if full is None else self.outbox.claim(self.settings.lease_s, *full)

    def _deliver(self, message: Message, lease_ends: float) -> None:
        """Attempt to send a message and record the outcome, until the lease ends."""
        try:
            with logs.bound(job=message.job):
                outcome = self._attempt(message)
                while not self._recorded(message, outcome):
                    if time.monotonic() + REDIS_RETRY_S > lease_ends:
                        break
                    time.sleep(REDIS_RETRY_S)
        except Exception:
            log.exception("webhook %s: its result was not recorded", message.id)
        finally:
            self.deliveries.end(message)

    def _recorded(self, message: Message, outcome: Outcome) -> bool:
        """Record the outcome; False if Redis failed: an unrecorded message is sent once more."""
        try:
            self._record(message, outcome)
        except RedisError as e:
            log.warning("webhook %s: Redis failed; its result is not recorded: %s", message.id, e)
            return False
        return True

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
    """Send due messages until `stop` is set; return once the attempts in progress have ended."""
    WebhookSender(Outbox(store), settings, resolver).run(stop)


def main() -> int:
    """Send webhooks until SIGTERM or SIGINT; returns 1 or 2 after an error, reported on stderr."""
    try:
        logs.setup()
        settings, webhooks = WorkerSettings(), WebhookSettings()
        if not settings.redis_url or not webhooks.secrets:
            return logs.complain("set REDIS_URL and AFTERIMAGE_WEBHOOK_SECRET to send webhooks", 2)
        connected = connect(settings)
        connected.ping()
    except (ValidationError, SettingsError, AfterimageError, RedisError) as e:
        return logs.complain(f"webhooks cannot be sent: {e}", 1)
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
