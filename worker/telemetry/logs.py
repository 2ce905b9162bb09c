"""Logging of the API and the workers: JSON or text, with request and job ids, without secrets."""

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
"""Id of the current HTTP request, or of the one that queued the current job; empty otherwise."""
job_id: ContextVar[str] = ContextVar("job_id", default="")
"""Id of the current job; empty outside of jobs."""

_HTTP_CLIENTS = ("httpx", "httpcore", "urllib3")
"""Loggers whose INFO records hold URLs with their query strings."""
_SERVER = ("uvicorn", "uvicorn.error", "uvicorn.access")
_SECRET = re.compile(
    r"""((?<![a-z])(?:authorization|api[_-]?key|signature|sig|token|secret|password)\b
    ["']?\s*[:=]\s*["']?)(?:(?:bearer|basic)\s+)?[^\s&"';}\])]+""",
    re.IGNORECASE | re.VERBOSE,
)
_BEARER = re.compile(r"(\bbearer\s+|\bwhsec_)[^\s\"',;]+", re.IGNORECASE)
_PASSWORD = re.compile(r"(\w://[^\s/@:]*:)[^\s/@]+(?=@)")  # in a URL, user:password@


@contextmanager
def bound(request: str = "", job: str = "") -> Iterator[None]:
    """Add these ids to log records within the block; an empty id leaves the current one."""
    tokens = [(v, v.set(x)) for v, x in ((request_id, request), (job_id, job)) if x]
    try:
        yield
    finally:
        for variable, token in reversed(tokens):
            variable.reset(token)


def setup(level: str = "INFO", json: bool | None = None) -> None:
    """Log to stderr as JSON or text; replaces any former configuration.

    With `json` None, AFTERIMAGE_LOG (json or text) decides, else text for a terminal. Raises
    `AfterimageError` for an invalid AFTERIMAGE_LOG.
    """
    logging.basicConfig(
        level=level, handlers=[handler(sys.stderr, as_json() if json is None else json)], force=True
    )
    logging.captureWarnings(True)
    for name in _HTTP_CLIENTS:
        logging.getLogger(name).setLevel(logging.WARNING)
    for name in _SERVER:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    logging.getLogger("uvicorn.access").disabled = True  # holds query strings; ours does not


def as_json() -> bool:
    """True for JSON, by AFTERIMAGE_LOG, or else unless stderr is a terminal."""
    format = os.environ.get("AFTERIMAGE_LOG", "")
    if format not in {"", "json", "text"}:
        raise AfterimageError(f"AFTERIMAGE_LOG is {format!r}; it may be json or text")
    return format == "json" if format else not sys.stderr.isatty()


def handler(stream: TextIO, json: bool) -> logging.Handler:
    """A handler that adds ids to records and removes secrets."""
    stream_handler = logging.StreamHandler(stream)
    stream_handler.addFilter(_add_ids)
    stream_handler.setFormatter(Json() if json else Text())
    return stream_handler


def redact(text: str) -> str:
    """Replace the values of signatures, tokens, keys and passwords in `text` with `***`."""
    return _PASSWORD.sub(r"\1***", _BEARER.sub(r"\1***", _SECRET.sub(r"\1***", text)))


def _add_ids(record: logging.LogRecord) -> bool:
    for variable in (request_id, job_id):
        value = variable.get()
        if value and not hasattr(record, variable.name):
            setattr(record, variable.name, value)
    return True


class Json(JsonFormatter):
    """One JSON object per record: time, level, logger, message, ids and the call's `extra`."""

    def __init__(self) -> None:
        super().__init__(
            "{levelname}{name}{message}",
            style="{",
            timestamp="time",
            rename_fields={"levelname": "level", "name": "logger"},
        )

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        """Redact the record's strings."""
        return {
            key: _redacted_field(key, value) if isinstance(value, str) else value
            for key, value in log_data.items()
        }


def _redacted_field(key: str, value: str) -> str:
    """The redacted value; `***` if the key names a secret."""
    return "***" if _SECRET.fullmatch(f"{key}=x") else redact(value)


class Text(logging.Formatter):
    """One line per record, time in UTC: `TIME INFO logger: message request=… job=…`.

    A traceback follows on further lines.
    """

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
        """Format and redact the record."""
        return redact(super().format(record))


def _escaped(c: str) -> str:
    """A control character as an escape sequence, so that a message cannot forge lines."""
    return c.encode("unicode_escape").decode()


def complain(text: str, status: int) -> int:
    """Print to stderr why a process cannot start; returns its exit status."""
    print(text, file=sys.stderr)  # noqa: T201
    return status
