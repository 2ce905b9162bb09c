"""Log records: ids, formats, and removal of secrets."""

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime

import pytest

from models.errors import AfterimageError
from worker.telemetry import logs

Write = Callable[[bool], tuple[logging.Logger, io.StringIO]]


@pytest.fixture
def writing() -> Iterator[Write]:
    """Makes a logger that writes JSON or text to a buffer."""
    logger = logging.getLogger("afterimage.test")
    logger.propagate = False
    logger.setLevel(logging.DEBUG)

    def write(json: bool) -> tuple[logging.Logger, io.StringIO]:
        stream = io.StringIO()
        logger.addHandler(logs.handler(stream, json))
        return logger, stream

    yield write
    logger.handlers.clear()
    logger.propagate = True


def test_a_json_record_has_time_level_logger_message_ids_and_extra_fields(writing: Write) -> None:
    log, out = writing(True)
    with logs.bound("req-1", "job-1"):
        log.info("drew %s", "it", extra={"ms": 3.5})
    record = json.loads(out.getvalue())
    assert datetime.fromisoformat(record.pop("time")).utcoffset() is not None
    assert record == {
        "level": "INFO", "logger": "afterimage.test", "message": "drew it",
        "request_id": "req-1", "job_id": "job-1", "ms": 3.5,
    }  # fmt: skip


def test_a_text_record_is_one_line_with_its_ids(writing: Write) -> None:
    log, out = writing(False)
    with logs.bound("req-1"), logs.bound(job="job-1"):
        log.warning("first\nsecond \x1b[31m é")
    line = out.getvalue()
    assert line.count("\n") == 1
    assert line.endswith(
        " WARNING afterimage.test: first\\nsecond \\x1b[31m é request=req-1 job=job-1\n"
    )


def test_ids_apply_within_their_block_and_an_explicit_id_wins(writing: Write) -> None:
    log, out = writing(True)
    with logs.bound("req-1"):
        log.info("within", extra={"request_id": "explicit"})
    log.info("after")
    within, after = map(json.loads, out.getvalue().splitlines())
    assert within["request_id"] == "explicit"
    assert "request_id" not in after and "job_id" not in after


@pytest.mark.parametrize("as_json", [True, False])
def test_a_traceback_is_part_of_the_record(writing: Write, as_json: bool) -> None:
    log, out = writing(as_json)
    try:
        raise ValueError("odd token=abcd")
    except ValueError:
        log.exception("it failed")
    text = json.loads(out.getvalue())["exc_info"] if as_json else out.getvalue()
    assert "Traceback" in text and "ValueError: odd token=***" in text
    assert "abcd" not in out.getvalue()


@pytest.mark.parametrize(
    "text",
    [
        "GET /v1/decodes/1/image?expires=5&signature=S3cr3t&x=1",
        "url_signature=S3cr3t",
        "Authorization: Bearer S3cr3t",
        "{'authorization': 'Bearer S3cr3t', 'accept': 'x'}",
        '{"X-Api-Key": "S3cr3t"}',
        "webhook-signature: v1,S3cr3t=",
        "api_key=S3cr3t",
        "used whsec_S3cr3t",
        "got bearer S3cr3t",
        "redis://user:S3cr3t@host:6379/0 is away",
        "redis://:S3cr3t@host",
    ],
)
@pytest.mark.parametrize("as_json", [True, False])
def test_secrets_are_never_written(writing: Write, text: str, as_json: bool) -> None:
    log, out = writing(as_json)
    log.info("%s", text, extra={"note": text})
    assert "S3cr3t" not in out.getvalue() and "***" in out.getvalue()


def test_a_field_whose_name_is_that_of_a_secret_is_hidden(writing: Write) -> None:
    log, out = writing(True)
    log.info("x", extra={"signature": "S3cr3t", "api_key": "S3cr3t", "design": "kept"})
    record = json.loads(out.getvalue())
    assert (record["signature"], record["api_key"], record["design"]) == ("***", "***", "kept")


@pytest.mark.parametrize(
    "text", ["fencing design: 4", "/v1/decodes/{id} 200", "http://host:80/a@b", "tokens per s"]
)
def test_text_without_secrets_is_unchanged(text: str) -> None:
    assert logs.redact(text) == text


@pytest.mark.parametrize(("value", "json"), [("json", True), ("text", False)])
def test_the_environment_sets_the_format(
    monkeypatch: pytest.MonkeyPatch, value: str, json: bool
) -> None:
    monkeypatch.setenv("AFTERIMAGE_LOG", value)
    assert logs.as_json() is json


def test_a_terminal_gets_text_and_a_file_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AFTERIMAGE_LOG", raising=False)
    for terminal in (True, False):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda t=terminal: t)
        monkeypatch.setattr(sys, "stderr", stream)
        assert logs.as_json() is not terminal


def test_an_unknown_format_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFTERIMAGE_LOG", "yaml")
    with pytest.raises(AfterimageError, match="'yaml'; it may be json or text"):
        logs.as_json()


def test_stderr_holds_nothing_but_log_records() -> None:
    code = """
import logging, warnings, httpx
from worker.telemetry import logs
import uvicorn
uvicorn.Config("x:y")  # configures its loggers
logs.setup("INFO")
warnings.warn("old\\nway")
logging.getLogger("httpx").info("GET http://host/?signature=S3cr3t")
logging.getLogger("uvicorn.access").info("GET /?x=query")
logging.getLogger("uvicorn.error").error("serving failed")
logging.getLogger("rq.worker").debug("arguments")
"""
    environment = os.environ | {"AFTERIMAGE_LOG": "json"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    records = [json.loads(line) for line in done.stderr.splitlines()]
    assert [r["logger"] for r in records] == ["py.warnings", "uvicorn.error"]
    assert done.stdout == ""
