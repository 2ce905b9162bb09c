"""Webhooks, with a real Redis and real receivers."""

import contextlib
import itertools
import json
import logging
import os
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from standardwebhooks import Webhook, WebhookVerificationError

from models.errors import ParameterError
from models.tiers import Settings
from tests.support.forked import Forked, sender_main
from tests.support.listening import closing
from tests.support.name_server import NameServer
from tests.support.waiting import until
from worker.queue import outbox
from worker.queue.outbox import MAX_DEAD, Outbox
from worker.queue.records import DecodeRequest, JobState, Status
from worker.queue.store import Store
from worker.webhooks import url_guard
from worker.webhooks.sender import deliver_forever
from worker.webhooks.settings import WebhookSettings, check_url
from worker.webhooks.url_guard import Resolver, resolve

pytestmark = pytest.mark.redis

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
OTHER = "whsec_QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVoxMjM0"
DATA = {"id": "a" * 32, "status": "succeeded"}
AT_ONCE = (0.0,) * 7


@dataclass(frozen=True)
class Received:
    path: str
    headers: dict[str, str]
    body: bytes
    at: float

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]


Answer = Callable[[BaseHTTPRequestHandler, int], None]
"""Answers the n-th request, counted from 1."""


def status(code: int, headers: dict[str, str] | None = None, body: bytes = b"") -> Answer:
    def answer(handler: BaseHTTPRequestHandler, _n: int) -> None:
        handler.send_response(code)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def in_turn(*codes: int) -> Answer:
    return lambda handler, n: status(codes[min(n, len(codes)) - 1])(handler, n)


@dataclass
class Receiver:
    """A server that receives webhooks."""

    answer: Answer = field(default_factory=lambda: status(204))
    address: str = "127.0.0.1"
    requests: list[Received] = field(default_factory=list)
    port: int = 0

    def url(self, host: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}/hook?token=s3cret-of-receiver"

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @contextlib.contextmanager
    def serving(self, tls: ssl.SSLContext | None = None) -> Iterator["Receiver"]:
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                headers = {k.lower(): v for k, v in self.headers.items()}
                receiver.requests.append(Received(self.path, headers, body, time.monotonic()))
                with contextlib.suppress(OSError):  # the sender may close the connection
                    receiver.answer(self, len(receiver.requests))

            def log_message(self, *_: object) -> None: ...

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None: ...

        server = Server((self.address, self.port), Handler)
        self.port = server.server_address[1]
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield self
        server.shutdown()
        server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver().serving() as serving:
        yield serving


def settings(receiver: Receiver, **changed: Any) -> WebhookSettings:
    return WebhookSettings(
        **{
            "webhook_secret": SECRET,
            "webhook_allow": receiver.host,
            "webhook_retries_s": AT_ONCE,
            "webhook_timeout_s": 5,
            **changed,
        }
    )


def end_job(store: Store, *urls: str, job: str = "job", caller: str = "gallery") -> None:
    for url in urls:
        outbox.register(store, job, caller, url)
    outbox.job_ended(store, job, "decode.succeeded", DATA)


@contextlib.contextmanager
def delivering(
    store: Store, settings: WebhookSettings, resolver: Resolver = resolve
) -> Iterator[None]:
    stop = threading.Event()
    arguments = (store, settings, stop, resolver)
    sender = threading.Thread(target=deliver_forever, args=arguments)
    sender.start()
    try:
        yield
    finally:
        stop.set()
        sender.join()


def deliver_all(store: Store, settings: WebhookSettings, resolver: Resolver = resolve) -> None:
    """Send messages until the outbox is empty."""
    with delivering(store, settings, resolver):
        until(Outbox(store).is_empty, "the outbox is empty")


def dead_letters(store: Store) -> list[dict[str, Any]]:
    letters: list[bytes] = store.queue.lrange(Outbox(store).dead, 0, -1)  # type: ignore[assignment]
    return [json.loads(letter) for letter in letters]


def test_the_end_of_a_job_is_sent_in_a_signed_request(store: Store, receiver: Receiver) -> None:
    end_job(store, receiver.url())
    deliver_all(store, settings(receiver))
    [got] = receiver.requests
    payload = Webhook(SECRET).verify(got.body, got.headers)
    assert (payload["type"], payload["data"]) == ("decode.succeeded", DATA)
    assert payload["timestamp"].endswith("Z")
    assert got.headers["content-type"] == "application/json"
    assert got.headers["host"] == receiver.host
    assert got.path == "/hook?token=s3cret-of-receiver"
    with pytest.raises(WebhookVerificationError):
        Webhook(OTHER).verify(got.body, got.headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(SECRET).verify(got.body.replace(b"succeeded", b"failed"), got.headers)
    assert dead_letters(store) == []


def test_two_secrets_sign_every_message(store: Store, receiver: Receiver) -> None:
    end_job(store, receiver.url())
    deliver_all(store, settings(receiver, webhook_secret=f"{OTHER} {SECRET}"))
    [got] = receiver.requests
    for secret in (SECRET, OTHER):
        Webhook(secret).verify(got.body, got.headers)


def test_each_url_gets_one_message(store: Store, receiver: Receiver) -> None:
    a, b = receiver.url() + "&a", receiver.url() + "&b"
    end_job(store, a, b, a)
    outbox.job_ended(store, "job", "decode.succeeded", DATA)
    deliver_all(store, settings(receiver))
    assert sorted(r.path[-2:] for r in receiver.requests) == ["&a", "&b"]
    assert len({r.id for r in receiver.requests}) == 2


def test_a_job_without_webhooks_adds_no_message(store: Store) -> None:
    end_job(store)
    assert store.queue.keys("*") == []


def test_a_message_is_added_in_the_transaction_that_ends_the_job(store: Store) -> None:
    outbox.register(store, "job", "gallery", "https://a.example/")
    with store.queue.pipeline() as pipe:
        pipe.set("mark", 1, ex=60)
        outbox.job_ended(store, "job", "decode.failed", DATA, pipe)
        assert Outbox(store).is_empty()
        pipe.execute()
    assert store.queue.exists("mark") and store.queue.zcard(Outbox(store).inbox) == 1


def test_the_webhooks_of_a_job_are_limited_for_each_caller(store: Store) -> None:
    for i in range(outbox.MAX_URLS):
        outbox.register(store, "job", "greedy", f"https://a.example/{i}")
    outbox.register(store, "job", "greedy", "https://a.example/0#again")
    with pytest.raises(ParameterError, match="32"):
        outbox.register(store, "job", "greedy", "https://a.example/more")
    assert store.queue.scard("afterimage:webhooks:of:job") == outbox.MAX_URLS
    for caller in ("gallery", "", "2001:db8::/64", "reedy"):
        outbox.register(store, "job", caller, "https://a.example/0")
    assert store.queue.scard("afterimage:webhooks:of:job") == outbox.MAX_URLS + 4


def test_each_caller_of_a_decode_gets_a_message_of_its_own(
    store: Store, receiver: Receiver
) -> None:
    outbox.register(store, "job", "press", receiver.url())
    end_job(store, receiver.url())
    deliver_all(store, settings(receiver))
    assert len({r.id for r in receiver.requests}) == 2
    assert {r.path for r in receiver.requests} == {"/hook?token=s3cret-of-receiver"}


@pytest.mark.parametrize("end", ["succeeded", "failed", "canceled"])
def test_the_event_states_how_the_job_ended(end: Status) -> None:
    decode = DecodeRequest(
        "ab" * 32, "perceptual", Settings("ddim", 4), 5, "c" * 16, "d" * 16, 2, 64, 32
    )
    error = "broken" if end == "failed" else ""
    kind, data = outbox.event(JobState(decode.id, end, decode, 4, 4, 1, 1.0, 2.0, 3.0, error))
    assert kind == f"decode.{end}"
    assert (data["id"], data["status"], data["tier"], data["seed"]) == (
        decode.id, end, "perceptual", 5
    )  # fmt: skip
    assert data["image"] == (f"/v1/decodes/{decode.id}/image" if end == "succeeded" else None)
    assert data["error"] == (error or None)


def test_a_failed_attempt_is_retried_with_the_same_id(store: Store, receiver: Receiver) -> None:
    receiver.answer = in_turn(500, 404, 200)
    end_job(store, receiver.url())
    deliver_all(store, settings(receiver))
    assert len(receiver.requests) == 3
    assert len({(r.id, r.body) for r in receiver.requests}) == 1
    for got in receiver.requests:
        Webhook(SECRET).verify(got.body, got.headers)
    assert dead_letters(store) == []


def test_attempts_are_counted_and_delayed(store: Store, receiver: Receiver) -> None:
    receiver.answer = status(500)
    end_job(store, receiver.url())
    with delivering(store, settings(receiver, webhook_retries_s=(0, 86400, 86400))):
        until(lambda: len(receiver.requests) == 2, "a second attempt")
        queue = Outbox(store)
        key = queue.key(receiver.requests[0].id)
        until(lambda: _due_in(store) > 60, "the third is delayed")
    assert store.queue.hget(key, "attempts") == b"2"
    assert len(receiver.requests) == 2


def test_a_message_that_never_succeeds_becomes_a_dead_letter(
    store: Store, receiver: Receiver
) -> None:
    receiver.answer = status(500)
    end_job(store, receiver.url())
    deliver_all(store, settings(receiver, webhook_retries_s=(0, 0)))
    assert len(receiver.requests) == 3
    [last] = dead_letters(store)
    assert (last["id"], last["attempts"]) == (receiver.requests[0].id, 3)
    assert (last["error"], last["job"]) == ("status 500", "job")
    assert json.loads(last["body"])["data"] == DATA


def test_the_number_of_dead_letters_is_limited(store: Store) -> None:
    queue = Outbox(store)
    store.queue.rpush(queue.dead, *(["{}"] * MAX_DEAD))
    end_job(store, "https://a.example/")
    message = queue.claim(10)
    assert message is not None and queue.give_up(message, "status 500")
    assert store.queue.llen(queue.dead) == MAX_DEAD
    assert dead_letters(store)[0]["id"] == message.id


def test_status_410_is_final(store: Store, receiver: Receiver) -> None:
    receiver.answer = status(410)
    end_job(store, receiver.url())
    deliver_all(store, settings(receiver))
    assert len(receiver.requests) == 1
    assert dead_letters(store)[0]["error"] == "status 410"


def test_redirects_are_not_followed(store: Store, receiver: Receiver) -> None:
    with Receiver().serving() as elsewhere:
        receiver.answer = status(307, {"Location": elsewhere.url()})
        end_job(store, receiver.url())
        allowed = f"{receiver.host},{elsewhere.host}"
        deliver_all(store, settings(receiver, webhook_allow=allowed, webhook_retries_s=()))
        assert (len(receiver.requests), elsewhere.requests) == (1, [])
    assert dead_letters(store)[0]["error"] == "status 307"


@pytest.mark.parametrize("as_date", [False, True])
@pytest.mark.parametrize("code", [429, 503])
def test_retry_after_is_respected(
    store: Store, receiver: Receiver, code: int, as_date: bool
) -> None:
    retry_after = formatdate(time.time() + 5, usegmt=True) if as_date else "2"
    first, then = status(code, {"Retry-After": retry_after}), status(204)
    receiver.answer = lambda handler, n: (first if n == 1 else then)(handler, n)
    end_job(store, receiver.url())
    deliver_all(store, settings(receiver))
    before, after = (r.at for r in receiver.requests)
    assert 1.5 < after - before < 10


def test_retry_after_has_an_upper_limit(store: Store, receiver: Receiver) -> None:
    receiver.answer = status(503, {"Retry-After": "9" * 50})
    end_job(store, receiver.url())
    with delivering(store, settings(receiver)):
        until(lambda: _due_in(store) > 600, "it is delayed")
    assert _due_in(store) <= 3600


def _due_in(store: Store) -> float:
    """Seconds until the only message is due, in the inbox or in its line."""
    lines: list[bytes] = store.queue.keys("afterimage:webhooks:line:*")  # type: ignore[assignment]
    key = lines[0] if lines else Outbox(store).inbox
    entries: list[Any] = store.queue.zrange(key, 0, -1, withscores=True)
    [(_, due)] = entries
    return float(due) - time.time()


def test_retry_after_of_other_statuses_is_ignored(store: Store, receiver: Receiver) -> None:
    receiver.answer = lambda handler, n: status(500 if n == 1 else 200, {"Retry-After": "600"})(
        handler, n
    )
    end_job(store, receiver.url())
    deliver_all(store, settings(receiver))
    assert len(receiver.requests) == 2


def test_a_refused_connection_is_a_failure(store: Store, receiver: Receiver) -> None:
    with Receiver().serving() as closed:
        pass
    end_job(store, closed.url())
    deliver_all(store, settings(closed, webhook_retries_s=(0,)))
    assert "ConnectError" in dead_letters(store)[0]["error"]


def drip_headers(handler: BaseHTTPRequestHandler, _n: int) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
    for _ in range(100):
        handler.wfile.write(b"x")
        time.sleep(0.05)


def say_nothing(handler: BaseHTTPRequestHandler, _n: int) -> None:
    handler.connection.recv(1)  # until the sender closes the connection


@pytest.mark.parametrize("slow", [drip_headers, say_nothing])
def test_one_timeout_covers_the_whole_attempt(
    store: Store, receiver: Receiver, slow: Answer
) -> None:
    receiver.answer = slow
    end_job(store, receiver.url())
    start = time.monotonic()
    deliver_all(store, settings(receiver, webhook_timeout_s=0.5, webhook_retries_s=()))
    assert time.monotonic() - start < 3
    assert "Timeout" in dead_letters(store)[0]["error"]


def test_endless_headers_are_a_failure(store: Store, receiver: Receiver) -> None:
    def answer(handler: BaseHTTPRequestHandler, _n: int) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            handler.wfile.write(b"X-More: " + b"x" * 1000 + b"\r\n")

    receiver.answer = answer
    end_job(store, receiver.url())
    deliver_all(store, settings(receiver, webhook_retries_s=()))
    assert "bytes of headers" in dead_letters(store)[0]["error"]


def test_a_large_response_is_not_read(store: Store, receiver: Receiver) -> None:
    sent: list[int] = []
    closed = threading.Event()

    def answer(handler: BaseHTTPRequestHandler, _n: int) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", str(10**9))
        handler.end_headers()
        try:
            for _ in range(10**9 // 2**16):
                handler.wfile.write(b"x" * 2**16)
                sent.append(2**16)
        finally:
            closed.set()

    receiver.answer = answer
    end_job(store, receiver.url())
    deliver_all(store, settings(receiver))
    assert closed.wait(60)
    assert len(receiver.requests) == 1 and dead_letters(store) == []
    assert sum(sent) < 20 * 2**20  # what the system's socket buffers took


def test_the_connection_is_closed_after_the_response(store: Store, receiver: Receiver) -> None:
    closed: list[bool] = []

    def answer(handler: BaseHTTPRequestHandler, _n: int) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(b"x")
        handler.connection.settimeout(3)
        try:
            closed.append(handler.connection.recv(1) == b"")
        except ConnectionResetError:
            closed.append(True)
        except TimeoutError:
            closed.append(False)

    receiver.answer = answer
    end_job(store, receiver.url())
    deliver_all(store, settings(receiver))
    until(lambda: closed, "the connection is closed")
    assert closed == [True] and dead_letters(store) == []


def test_a_response_that_is_not_http_is_a_failure(store: Store, receiver: Receiver) -> None:
    def answer(handler: BaseHTTPRequestHandler, _n: int) -> None:
        handler.wfile.write(b"220 smtp.example ESMTP\r\n")

    receiver.answer = answer
    end_job(store, receiver.url())
    deliver_all(store, settings(receiver, webhook_retries_s=()))
    assert "RemoteProtocolError" in dead_letters(store)[0]["error"]


def test_many_slow_receivers_of_callers_do_not_delay_the_webhook_of_another(
    store: Store, receiver: Receiver
) -> None:
    """Seven callers fill their shares with 40 slow URLs each, before the eighth has a message."""
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(Receiver(say_nothing).serving()) for _ in range(8)]
        for n in range(7):
            for number, host in enumerate(slow):
                urls = [f"{host.url()}&{i}" for i in range(5)]
                end_job(store, *urls, job=f"slow{number}", caller=f"greedy{n}")
        chosen = settings(
            receiver, webhook_allow=" ".join(r.host for r in (receiver, *slow)),
            webhook_timeout_s=3, webhook_retries_s=(86400,),
        )  # fmt: skip
        with delivering(store, chosen):
            until(lambda: sum(len(r.requests) for r in slow) >= 28, "the slow ones have begun")
            end_job(store, receiver.url(), job="quick")
            until(lambda: receiver.requests, "the other caller's webhook", 2)
            assert sum(len(r.requests) for r in slow) <= 2 * 28


def test_a_slow_receiver_does_not_delay_other_webhooks_of_its_caller(
    store: Store, receiver: Receiver
) -> None:
    with Receiver(say_nothing).serving() as slow:
        allowed = f"{receiver.host} {slow.host}"
        both = settings(receiver, webhook_allow=allowed, webhook_timeout_s=2)
        end_job(store, *(f"{slow.url()}&{i}" for i in range(20)), job="slow")
        with delivering(store, both):
            until(lambda: len(slow.requests) == both.per_host, "the slow receiver gets requests")
            end_job(store, receiver.url(), job="quick")
            until(lambda: receiver.requests, "the other receiver gets its request", 3)
            assert len(slow.requests) == both.per_host


def test_proxy_variables_are_ignored(
    store: Store, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    end_job(store, receiver.url())
    deliver_all(store, settings(receiver, webhook_retries_s=()))
    assert len(receiver.requests) == 1


@dataclass(frozen=True)
class Certificate:
    tls: ssl.SSLContext
    file: Path
    names: list[str | None]  # that clients sent as SNI


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """A self-signed certificate of hooks.test."""
    if not shutil.which("openssl"):
        pytest.skip("needs openssl to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    key, file = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", file,
         "-days", "2", "-subj", "/CN=hooks.test", "-addext", "subjectAltName=DNS:hooks.test"],
        check=True, capture_output=True,
    )  # fmt: skip
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(file, key)
    names: list[str | None] = []
    tls.sni_callback = lambda _socket, name, _context: names.append(name)
    return Certificate(tls, file, names)


def test_tls_connects_to_the_checked_address_and_verifies_the_name(
    store: Store, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.file))
    hosts: list[str] = []

    def resolver(host: str) -> list[str]:
        hosts.append(host)
        return ["127.0.0.1"]

    with Receiver().serving(certificate.tls) as receiver:
        end_job(store, receiver.url("hooks.test", "https"))
        deliver_all(store, settings(receiver, webhook_allow="hooks.test"), resolver)
    [got] = receiver.requests
    Webhook(SECRET).verify(got.body, got.headers)
    assert got.headers["host"] == f"hooks.test:{receiver.port}"
    assert (hosts, certificate.names[-1]) == (["hooks.test"], "hooks.test")


@pytest.mark.parametrize("host", ["other.test", "127.0.0.1"])
def test_a_certificate_of_another_name_is_refused(
    store: Store, certificate: Certificate, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.file))
    with Receiver().serving(certificate.tls) as receiver:
        end_job(store, receiver.url(host, "https"))
        chosen = settings(receiver, webhook_allow=host, webhook_retries_s=())
        deliver_all(store, chosen, lambda _host: ["127.0.0.1"])
    assert receiver.requests == []
    assert "CERTIFICATE_VERIFY_FAILED" in dead_letters(store)[0]["error"]


def test_a_certificate_of_an_unknown_authority_is_refused(
    store: Store, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with Receiver().serving(certificate.tls) as receiver:
        end_job(store, receiver.url("hooks.test", "https"))
        chosen = settings(receiver, webhook_allow="hooks.test", webhook_retries_s=())
        deliver_all(store, chosen, lambda _host: ["127.0.0.1"])
    assert receiver.requests == []
    assert "CERTIFICATE_VERIFY_FAILED" in dead_letters(store)[0]["error"]


def test_a_name_that_changes_its_address_has_no_effect(store: Store, receiver: Receiver) -> None:
    """A host is resolved once per attempt, and the request goes to that address."""
    with Receiver(address="127.0.0.2", port=receiver.port).serving() as rebound:
        answers = iter(["127.0.0.1", "127.0.0.2", "127.0.0.2"])
        end_job(store, receiver.url("rebind.test"))
        chosen = settings(receiver, webhook_allow="rebind.test")
        deliver_all(store, chosen, lambda _host: [next(answers)])
        assert (len(receiver.requests), rebound.requests) == (1, [])
    assert list(answers) == ["127.0.0.2"] * 2


def test_a_name_that_becomes_private_after_submission_gets_no_request(
    store: Store, receiver: Receiver
) -> None:
    answers = iter([["93.184.216.34"], ["127.0.0.1"], ["93.184.216.34", "127.0.0.1"]])
    chosen = settings(receiver, webhook_retries_s=(0,))
    url = receiver.url("rebind.test", "https")
    check_url(url, chosen, lambda _host: next(answers))
    end_job(store, url)
    deliver_all(store, chosen, lambda _host: next(answers))
    assert receiver.requests == []
    assert "public addresses only" in dead_letters(store)[0]["error"]


def test_a_name_server_that_changes_its_answers_leads_no_request_to_a_private_address(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real name server answers with a public address first, and with 127.0.0.1 to each later
    query. 127.0.0.2 takes the part of the public address, so that the test connects to no other
    machine."""
    is_public = url_guard.is_public
    monkeypatch.setattr(url_guard, "is_public", lambda a: a == "127.0.0.2" or is_public(a))
    answers = itertools.chain(["127.0.0.2", "127.0.0.2"], itertools.repeat("127.0.0.1"))
    with (
        closing("127.0.0.1") as (port, private),
        closing("127.0.0.2", port) as (_, public),
        NameServer(answers).serving() as names,
    ):
        chosen = WebhookSettings(webhook_secret=SECRET, webhook_retries_s=(0, 0))
        url = f"https://rebind.attacker.test:{port}/"
        check_url(url, chosen, names.resolve)  # at the submission
        assert len(names.queries) == 1
        end_job(store, url)
        deliver_all(store, chosen, names.resolve)
        [letter] = dead_letters(store)
        assert names.queries == ["rebind.attacker.test"] * 4  # one for each attempt
        assert (len(public), private) == (1, [])
    assert letter["attempts"] == 3 and "public addresses only" in letter["error"]


def test_the_next_address_is_tried_if_one_is_unreachable(store: Store, receiver: Receiver) -> None:
    end_job(store, receiver.url("hooks.test"))
    chosen = settings(receiver, webhook_allow="hooks.test", webhook_retries_s=())
    deliver_all(store, chosen, lambda _host: ["127.0.0.3", "127.0.0.1"])
    assert len(receiver.requests) == 1


def test_concurrent_senders_send_each_message_once(store: Store, receiver: Receiver) -> None:
    for i in range(60):
        end_job(store, receiver.url(), job=f"job-{i}")
    with delivering(store, settings(receiver)), delivering(store, settings(receiver)):
        until(Outbox(store).is_empty, "the outbox is empty")
    assert len(receiver.requests) == 60
    assert len({r.id for r in receiver.requests}) == 60


def test_a_sender_without_its_lease_records_nothing(store: Store) -> None:
    queue = Outbox(store)
    end_job(store, "https://a.example/")
    late = queue.claim(2)  # long enough on a busy machine
    assert late is not None and queue.claim(10) is None
    time.sleep(2.1)
    now = queue.claim(10)
    assert now is not None and (now.id, now.attempts) == (late.id, 2)
    assert not queue.retry_in(late, 0) and not queue.give_up(late, "") and not queue.delivered(late)
    assert queue.delivered(now)
    assert store.queue.keys("*") == []


@contextlib.contextmanager
def sender_process(
    redis_url: str, receiver: Receiver, **changed: str
) -> Iterator[subprocess.Popen[str]]:
    """A sender process, started as the service does."""
    environment = {
        "REDIS_URL": redis_url,
        "AFTERIMAGE_WEBHOOK_SECRET": SECRET,
        "AFTERIMAGE_WEBHOOK_ALLOW": receiver.host,
        "AFTERIMAGE_WEBHOOK_RETRIES_S": "[86400, 86400]",
        "AFTERIMAGE_WEBHOOK_TIMEOUT_S": "1",
        **changed,
    }
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "worker.webhooks"],
        env=os.environ | environment, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_message_of_a_killed_sender_is_sent_by_another(
    redis_urls: tuple[str, str], store: Store, receiver: Receiver
) -> None:
    held = threading.Event()
    receiver.answer = lambda handler, n: status(200)(handler, n) if n > 1 else _wait(held)
    end_job(store, receiver.url())
    with sender_process(redis_urls[0], receiver) as first:
        until(lambda: receiver.requests, "the first attempt")
        first.send_signal(signal.SIGKILL)
        first.wait()
    with delivering(store, settings(receiver)):
        until(lambda: len(receiver.requests) == 2, "a second attempt")
    held.set()
    assert len({r.id for r in receiver.requests}) == 1
    assert Outbox(store).is_empty()


def _wait(event: threading.Event) -> None:
    event.wait(60)


def test_a_stopped_sender_finishes_its_attempt_and_logs_no_secret(
    redis_urls: tuple[str, str], store: Store, receiver: Receiver
) -> None:
    def answer(handler: BaseHTTPRequestHandler, n: int) -> None:
        process.terminate()
        time.sleep(0.3)
        status(200)(handler, n)

    receiver.answer = answer
    end_job(store, receiver.url())
    with sender_process(redis_urls[0], receiver) as process:
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0
    assert Outbox(store).is_empty()
    assert "delivered at attempt 1" in stderr and "job" in stderr
    for secret in (SECRET, SECRET[6:], "s3cret-of-receiver", "v1,"):
        assert secret not in stderr


def test_a_sender_without_a_queue_or_a_secret_exits_with_an_error(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if "REDIS_URL" not in k}
    good = {"REDIS_URL": "redis://127.0.0.1:1", "AFTERIMAGE_WEBHOOK_SECRET": SECRET}
    for changed, text in (
        ({"REDIS_URL": ""}, "set REDIS_URL"),
        ({"AFTERIMAGE_WEBHOOK_SECRET": ""}, "AFTERIMAGE_WEBHOOK_SECRET"),
        ({"AFTERIMAGE_WEBHOOK_SECRET": "whsec_c2hvcnQ="}, "base64 of 24 to 64 bytes"),
        ({}, "cannot be sent"),
    ):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        process = Forked(sender_main, environment | good | changed, log)
        assert process.wait(60) != 0
        assert text in log.read_text()
        assert "Traceback" not in log.read_text() and "c2hvcnQ" not in log.read_text()


def test_logs_contain_no_secret(
    store: Store, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    receiver.answer = in_turn(500, 200)
    end_job(store, receiver.url())
    deliver_all(store, settings(receiver))
    assert "attempt 1 failed: status 500" in caplog.text
    signature = receiver.requests[0].headers["webhook-signature"]
    for secret in (SECRET, SECRET[6:], "s3cret-of-receiver", signature):
        assert secret not in caplog.text


def test_every_key_expires(store: Store, receiver: Receiver) -> None:
    receiver.answer = status(500)
    outbox.register(store, "waiting", "gallery", receiver.url())
    end_job(store, receiver.url(), job="dead")
    deliver_all(store, settings(receiver, webhook_retries_s=()))
    end_job(store, receiver.url(), job="queued")
    end_job(store, receiver.url(), job="claimed", caller="press")
    claimed = Outbox(store).claim(10)
    assert claimed is not None and Outbox(store).retry_in(claimed, 60)
    end_job(store, receiver.url(), job="new")
    keys: list[bytes] = store.queue.keys("*")  # type: ignore[assignment]
    kinds = {b":".join(key.split(b":")[1:3]).partition(b":msg")[0] for key in keys}
    assert kinds == {
        b"webhook", b"webhooks", b"webhooks:callers", b"webhooks:dead", b"webhooks:hosts",
        b"webhooks:line", b"webhooks:of",
    }  # fmt: skip
    assert all(key.startswith(b"afterimage:") and store.queue.ttl(key) > 0 for key in keys)


def test_an_expired_message_is_skipped(store: Store) -> None:
    queue = Outbox(store)
    for job in ("1", "2", "3"):
        end_job(store, f"https://a.example/{job}", job=job)
    first = queue.claim(0)  # now all three are in a line
    assert first is not None and first.job == "1" and not store.queue.exists(queue.inbox)
    store.queue.delete(queue.key(first.id))
    message = queue.claim(10)
    assert message is not None and message.job == "2"
    end_job(store, "https://a.example/4", job="4", caller="press")
    fresh: list[bytes] = store.queue.zrange(queue.inbox, 0, 0)  # type: ignore[assignment]
    store.queue.delete(queue.key(fresh[0].decode()))
    message = queue.claim(10)
    assert message is not None and message.job == "3"
    assert queue.claim(10) is None


def test_a_message_of_an_earlier_version_is_sent(store: Store, receiver: Receiver) -> None:
    """Its inbox and hash have no caller; nor has a URL that was registered."""
    store.queue.hset(
        Outbox(store).key("msg_1"),
        mapping={"url": receiver.url() + "&old", "body": "{}", "job": "job", "attempts": 1},
    )
    store.queue.zadd("afterimage:webhooks", {"msg_1": time.time()})
    store.queue.sadd("afterimage:webhooks:of:job", receiver.url() + "&registered")
    end_job(store)
    deliver_all(store, settings(receiver))
    assert {r.path.rpartition("&")[2] for r in receiver.requests} == {"old", "registered"}


def test_callers_take_turns_and_so_do_their_hosts(store: Store) -> None:
    queue = Outbox(store)
    for i in range(3):
        end_job(store, f"https://a.example/{i}", job=f"a{i}", caller="greedy")
    end_job(store, "https://b.example/", job="b", caller="greedy")
    end_job(store, "https://a.example/", job="c", caller="gallery")
    order = [queue.claim(60) for _ in range(5)]
    assert [m.job for m in order if m] == ["a0", "c", "b", "a1", "a2"]
    assert queue.claim(60) is None


def test_full_callers_and_lines_are_left_out(store: Store) -> None:
    queue = Outbox(store)
    for host in ("a", "b", "c"):
        end_job(store, f"https://{host}.example/", job=host, caller="greedy")
    end_job(store, "https://a.example/", job="gallery")
    a = queue.claim(60, (), ["greedy b.example"])
    assert a is not None and (a.caller, a.host) == ("greedy", "a.example")
    full = ["greedy b.example", "greedy c.example"]
    other = queue.claim(60, (), full)
    assert other is not None and other.caller == "gallery"
    assert queue.claim(60, (), full) is None
    assert queue.claim(60, ["greedy"]) is None
    assert queue.claim(60) is not None


def test_webhooks_without_a_secret_are_refused() -> None:
    with pytest.raises(ParameterError, match="AFTERIMAGE_WEBHOOK_SECRET"):
        check_url("https://a.example/", WebhookSettings(webhook_secret=""))


def test_private_urls_are_refused_at_submission() -> None:
    chosen = WebhookSettings(webhook_secret=SECRET)
    for url in ("https://localhost/", "https://127.1/", "https://[::ffff:10.0.0.1]/"):
        with pytest.raises(ParameterError, match="webhook"):
            check_url(url, chosen)


@pytest.mark.parametrize("secret", ["plain", "whsec_", "whsec_c2hvcnQ=", "whsec_%%%", SECRET[6:]])
def test_an_invalid_secret_is_refused_and_not_in_the_error(secret: str) -> None:
    with pytest.raises(ValidationError) as e:
        WebhookSettings(webhook_secret=secret)
    assert "whsec_ and base64" in str(e.value)
    assert f"'{secret}'" not in str(e.value)


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AFTERIMAGE_WEBHOOK_SECRET", SECRET)
    monkeypatch.setenv("AFTERIMAGE_WEBHOOK_ALLOW", "Hooks.Internal, 10.0.0.1:8080")
    monkeypatch.setenv("AFTERIMAGE_WEBHOOK_RETRIES_S", "[1, 2.5]")
    settings = WebhookSettings()
    assert settings.secrets == [SECRET] and SECRET not in repr(settings)
    assert settings.allow == {"hooks.internal", "10.0.0.1:8080"}
    assert settings.webhook_retries_s == (1, 2.5)
