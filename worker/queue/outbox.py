"""Outbox of webhook messages: registered URLs, messages that are due, and dead letters.

The end of a job adds messages to a sorted set, the inbox. Senders distribute them to lines, one per
caller and host, so that a slow receiver delays only messages of its own line. A line holds the time
at which each message is due; two more levels of sorted sets hold when a line may be due: the hosts
of each caller, and all callers. Callers take turns, and so do the hosts of a caller.

A hash per message holds the rest. A sender claims a message in one script, which counts the attempt
and sets the due time to the end of the sender's lease. Other senders do not see the message
meanwhile; if this sender is killed, the message becomes due again. A sender may record the result
only while the attempt count is still the one that it claimed. Times are those of the Redis server.
The scripts build key names, so Redis Cluster is not supported.
"""

import json
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from redis.client import Pipeline

from models.errors import ParameterError
from worker.queue import outbox_scripts
from worker.queue.records import JobState
from worker.queue.store import RECORD_TTL_S, Store

MAX_URLS = 32
"""Largest number of webhook URLs of one job and caller."""

MESSAGE_TTL_S = 3 * 24 * 3600
"""How long a message is kept after its last attempt; longer than any interval between attempts."""
DEAD_TTL_S = 7 * 24 * 3600
"""How long dead letters are kept after the latest one."""
MAX_DEAD = 1000
"""Number of dead letters; older ones are dropped."""

MAX_NEW = 256
"""Number of messages that one claim distributes from the inbox."""


@dataclass(frozen=True, slots=True)
class Message:
    """An event for one URL, as claimed; `attempts` includes the current attempt."""

    id: str
    url: str
    body: str  # the same in every attempt
    job: str
    attempts: int
    caller: str  # the caller that registered the URL
    host: str  # of the URL, with the port

    @property
    def line(self) -> str:
        """The name of the message's line."""
        return f"{self.caller} {self.host}"


@dataclass(frozen=True, slots=True)
class Outbox:
    """The outbox in the queue store."""

    store: Store

    def register(self, job_id: str, caller: str, url: str, limit: int) -> bool:
        """Register a URL to notify when a job ends; False if the caller has `limit` others.

        The caller is stored in place of the URL's fragment, which is never sent.
        """
        arguments = url.partition("#")[0], f"#{caller}", limit, RECORD_TTL_S
        key = self._registered(job_id)
        return bool(self.store.queue.eval(outbox_scripts.REGISTER, 1, key, *arguments))

    def add(self, job_id: str, body: str, pipe: Pipeline | None) -> None:
        """Add a message, due now, for each registered URL, and forget these URLs."""
        (pipe or self.store.queue).eval(
            outbox_scripts.ADD, 2, self._registered(job_id), self.inbox,
            self.key(""), uuid.uuid4().hex[:16], body, job_id, MESSAGE_TTL_S,
        )  # fmt: skip

    def claim(
        self, lease_s: float, callers: Iterable[str] = (), lines: Iterable[str] = ()
    ) -> Message | None:
        """Claim a message that is due, for `lease_s` seconds; None if there is none.

        Messages of the given `callers` and `lines` are left out.
        """
        excluded = json.dumps(list(callers)), json.dumps(list(lines))
        fields = self._run(outbox_scripts.CLAIM, lease_s, *excluded, MAX_NEW)
        if not fields:
            return None
        name, url, body, job, attempts, caller, host = (value.decode() for value in fields)
        return Message(name, url, body, job, int(attempts), caller, host)

    def delivered(self, message: Message) -> bool:
        """Remove a delivered message; False if this sender has lost it to another."""
        return self._settle(message)

    def retry_in(self, message: Message, seconds: float) -> bool:
        """Make the message due again in `seconds`; False if this sender has lost it."""
        return self._settle(message, retry_s=str(seconds))

    def give_up(self, message: Message, error: str) -> bool:
        """Move the message, with its last error, to the dead letters; False if it was lost."""
        seconds, micros = self.store.queue.time()
        letter = {**asdict(message), "error": error, "at": seconds + micros / 1e6}
        return self._settle(message, dead_letter=json.dumps(letter))

    def _settle(self, message: Message, retry_s: str = "", dead_letter: str = "") -> bool:
        """Record the result of an attempt; False, without effect, if another sender claimed it."""
        result = retry_s, dead_letter, MAX_DEAD, DEAD_TTL_S
        return bool(self._run(outbox_scripts.SETTLE, message.id, message.attempts, *result))

    def _run(self, script: str, *arguments: str | float) -> Any:
        """Run a script on the lines."""
        keys = self.inbox, self.callers, self.dead
        hosts, lines = (self.store.key("webhooks", name, "") for name in ("hosts", "line"))
        prefixes = self.key(""), hosts, lines
        return self.store.queue.eval(script, 3, *keys, *prefixes, MESSAGE_TTL_S, *arguments)

    def is_empty(self) -> bool:
        """True if no message is due, in delivery, or waits for another attempt."""
        return not self.store.queue.exists(self.inbox, self.callers)

    def key(self, message_id: str) -> str:
        """Key of a message's hash."""
        return self.store.key("webhook", message_id)

    @property
    def inbox(self) -> str:
        """Key of a sorted set: message that is in no line yet -> time at which it is due."""
        return self.store.key("webhooks")

    @property
    def callers(self) -> str:
        """Key of a sorted set: caller -> time before which no message of it is due."""
        return self.store.key("webhooks", "callers")

    @property
    def dead(self) -> str:
        """Key of the list of dead letters, JSON, newest first."""
        return self.store.key("webhooks", "dead")

    def _registered(self, job_id: str) -> str:
        """Key of the set of URLs registered for the end of a job, each with `#` and its caller."""
        return self.store.key("webhooks", "of", job_id)


def register(store: Store, job_id: str, caller: str, url: str) -> None:
    """Send one webhook to `url` when the job ends.

    Raises `ParameterError` if the caller has registered `MAX_URLS` others for this job.
    """
    if not Outbox(store).register(job_id, caller, url, MAX_URLS):
        raise ParameterError(
            f"webhook: you have {MAX_URLS} webhooks for this decode already, the maximum"
        )


def event(state: JobState) -> tuple[str, dict[str, Any]]:
    """Type and data of the webhook for an ended job."""
    picture = f"/v1/decodes/{state.id}/image" if state.status == "succeeded" else None
    decode = state.decode
    return f"decode.{state.status}", {
        "id": state.id, "status": state.status, "tier": decode.tier, "seed": decode.seed,
        "seed_text": str(decode.seed),  # JavaScript rounds numbers of 2^53 and more
        "width": decode.width, "height": decode.height, "image": picture,
        "error": state.error or None,
    }  # fmt: skip


def job_ended(
    store: Store, job_id: str, event_type: str, data: dict[str, Any], pipe: Pipeline | None = None
) -> None:
    """Add a message for each registered URL and forget these URLs: a second call adds nothing.

    With `pipe`, as part of that transaction.
    """
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    body = {"type": event_type, "timestamp": now, "data": data}
    Outbox(store).add(job_id, json.dumps(body, separators=(",", ":")), pipe)
