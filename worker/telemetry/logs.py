"""Logs of API and workers: one line per record, with the ids of its request and job."""

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, TextIO

from pythonjsonlogger.json import JsonFormatter

from models.errors import AfterimageError

request_id: ContextVar[str] = ContextVar("request_id", default="")
job_id: ContextVar[str] = ContextVar("job_id", default="")
"""What is worked on; empty outside of requests and jobs."""

_CHATTY = ("httpx", "httpcore", "urllib3")
"""Libraries whose informative lines name URLs with their queries."""
_SERVER = ("uvicorn", "uvicorn.error", "uvicorn.access")
_SECRET = re.compile(
    r"""((?<![a-z])(?:authorization|api[_-]?key|signature|sig|token|secret|password)\b
    ["']?\s*[:=]\s*["']?)(?:(?:bearer|basic)\s+)?[^\s&"';}\])]+""",
    re.IGNORECASE | re.VERBOSE,
)
_BARE = re.compile(r"(\bbearer\s+|\bwhsec_)[^\s\"',;]+", re.IGNORECASE)
_USER = re.compile(r"(\w://[^\s/@:]*:)[^\s/@]+(?=@)")  # of a URL: user:password@


@contextmanager
def bound(request: str = "", job: str = "") -> Iterator[None]:
    """Records within carry these ids; an empty one is left as it is."""
    tokens = [(v, v.set(x)) for v, x in ((request_id, request), (job_id, job)) if x]
    try:
        yield
    finally:
        for variable, token in reversed(tokens):
            variable.reset(token)


def setup(level: str = "INFO", json: bool | None = None) -> None:
    """Log to stderr, and replace what was configured before.

    Where `json` is None, AFTERIMAGE_LOG (json or text) says how; where that is not set, a terminal
    gets text. Raises `AfterimageError` for another value.
    """
    logging.basicConfig(
        level=level, handlers=[handler(sys.stderr, as_json() if json is None else json)], force=True
    )
    logging.captureWarnings(True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in _SERVER:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    logging.getLogger("uvicorn.access").disabled = True  # it names queries; ours does not


def as_json() -> bool:
    """What the environment, or else the kind of stderr, asks for."""
    asked = os.environ.get("AFTERIMAGE_LOG", "")
    if asked not in {"", "json", "text"}:
        raise AfterimageError(f"AFTERIMAGE_LOG is {asked!r}; it may be json or text")
    return asked == "json" if asked else not sys.stderr.isatty()


def handler(stream: TextIO, json: bool) -> logging.Handler:
    """Writes records, with ids and without secrets."""
    made = logging.StreamHandler(stream)
    made.addFilter(_add_ids)
    made.setFormatter(Json() if json else Text())
    return made


def redact(text: str) -> str:
    """`text` with `***` for the values of signatures, tokens, keys and passwords in it."""
    return _USER.sub(r"\1***", _BARE.sub(r"\1***", _SECRET.sub(r"\1***", text)))


def _add_ids(record: logging.LogRecord) -> bool:
    for variable in (request_id, job_id):
        value = variable.get()
        if value and not hasattr(record, variable.name):
            setattr(record, variable.name, value)
    return True


class Json(JsonFormatter):
    """An object per record: time, level, logger, message, ids, and what the call added."""

    def __init__(self) -> None:
        super().__init__(
            "{levelname}{name}{message}",
            style="{",
            timestamp="time",
            rename_fields={"levelname": "level", "name": "logger"},
        )

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        """The object's values, without secrets."""
        return {
            key: _whole(key, value) if isinstance(value, str) else value
            for key, value in log_data.items()
        }


def _whole(key: str, value: str) -> str:
    """A field, redacted; one that is named as a secret has no value to show."""
    return "***" if _SECRET.fullmatch(f"{key}=x") else redact(value)


class Text(logging.Formatter):
    """`12:00:00.000 INFO logger: message request=… job=…`, in UTC; then a traceback, if any."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat("T", "milliseconds")
        message = "".join(c if c.isprintable() else _escaped(c) for c in record.message)
        ids = "".join(
            f" {name}={value}"
            for name, attribute in (("request", "request_id"), ("job", "job_id"))
            if (value := getattr(record, attribute, ""))
        )
        return f"{time} {record.levelname} {record.name}: {message}{ids}"

    def format(self, record: logging.LogRecord) -> str:
        """The line, without secrets."""
        return redact(super().format(record))


def _escaped(c: str) -> str:
    """A line's end or a terminal's command as text."""
    return c.encode("unicode_escape").decode()
