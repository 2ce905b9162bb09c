"""Every kind of Redis URL with a real server: TLS, restricted users, Sentinel and a failover."""

import asyncio
import contextlib
import inspect
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import trustme
from rq import SimpleWorker

from models.codec import bitstream
from models.tiers import Settings
from tests.support.jobs import decode_of
from tests.support.listening import closing, listening
from tests.support.service import free_port
from tests.support.waiting import until
from worker.attempt import Attempt
from worker.queue import estimates, private_redis, urls, workers
from worker.queue.jobs import Jobs
from worker.queue.store import Store, connect, streams
from worker.queue.urls import NoRedis
from worker.settings import WorkerSettings

pytestmark = pytest.mark.redis

FAST = Settings("ddim", 2)
OPERATING = Path(__file__).parents[2] / "deploy/OPERATING.md"


@contextlib.contextmanager
def server(folder: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Redis server on a local port."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        str(private_redis.find_server()),
        *options,
        "--bind",
        "127.0.0.1",
        "--dir",
        str(folder),
    ]
    log = folder / "log"
    process = subprocess.Popen(
        [*command, "--logfile", str(log)], preexec_fn=private_redis.die_with_parent
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def run_job(store: Store, data: bytes) -> None:
    """Do all that the API and workers do with a job."""
    jobs = Jobs(store)
    job_id = jobs.submit(decode_of(data, FAST), data, "somebody")[0].id
    assert estimates.backlog_s(jobs) == 0
    assert store.fullness() == 0
    jobs.queue.remove(job_id)
    attempt = Attempt.begin(jobs, job_id)
    assert attempt is not None
    attempt.renew_lease()
    workers.mark_alive(jobs)
    assert attempt.poll(1).subscribed
    attempt.commit(b"picture")
    attempt.record_duration(1.0)
    jobs.reap()
    state = jobs.get(job_id)
    assert state is not None and state.status == "succeeded"
    assert store.picture(job_id) == b"picture"


def wait_for_server(port: int) -> None:
    with redis.Redis(port=port) as client:
        until(client.ping, "the server starts")


@contextlib.contextmanager
def connected_to(url: str) -> Iterator[Store]:
    store = connect(settings(url))
    try:
        yield store
    finally:
        store.close()


def settings(url: str) -> WorkerSettings:
    return WorkerSettings(REDIS_URL=url)


@contextlib.contextmanager
def tls_in_front(port: int, folder: Path) -> Iterator[tuple[int, Path]]:
    """A TLS proxy in front of `port`: its port, and the file of its CA."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)

    def forward(plain: socket.socket) -> None:
        with plain, contextlib.suppress(OSError):
            with (
                context.wrap_socket(plain, server_side=True) as near,
                socket.create_connection(("127.0.0.1", port)) as far,
            ):
                back = threading.Thread(target=pump, args=(far, near), daemon=True)
                back.start()
                pump(near, far)
                back.join()

    def start(plain: socket.socket) -> None:
        threading.Thread(target=forward, args=(plain,), daemon=True).start()

    with listening(start) as secure:
        yield secure, folder / "ca.pem"


def test_tls_verifies_the_servers_certificate(tmp_path: Path, small_msh: bytes) -> None:
    port = free_port()
    with server(tmp_path, "--port", str(port)), tls_in_front(port, tmp_path) as (secure, ca):
        wait_for_server(port)
        with connected_to(f"rediss://127.0.0.1:{secure}/0?ssl_ca_certs={ca}") as store:
            run_job(store, small_msh)
        with (
            connected_to(f"rediss://127.0.0.1:{secure}/0") as store,
            pytest.raises(redis.ConnectionError, match="certificate"),
        ):
            store.ping()


@pytest.mark.parametrize("connect", [urls.client, urls.asynchronous])
def test_an_unreachable_sentinel_is_tried_once(connect: Callable[..., Any]) -> None:
    """redis-py would retry ten times, which delays the next Sentinel by half a minute."""
    with closing("127.0.0.2") as (first, tried), closing("127.0.0.3") as (second, tried_next):
        hosts = f"127.0.0.2:{first},127.0.0.3:{second}"
        connected = connect(f"redis+sentinel://{hosts}/queue", socket_connect_timeout=2)
        with pytest.raises(redis.ConnectionError):
            reply = connected.ping()
            if inspect.iscoroutine(reply):
                asyncio.run(reply)
        assert tried + tried_next == ["127.0.0.2", "127.0.0.3"]


def test_the_documented_rights_of_a_redis_user_are_sufficient(
    tmp_path: Path, small_msh: bytes
) -> None:
    """The ACL rule of OPERATING.md."""
    (rule,) = (
        line.strip() for line in OPERATING.read_text().splitlines()
        if line.strip().startswith("ACL SETUSER")
    )  # fmt: skip
    port = free_port()
    with server(tmp_path, "--port", str(port)):
        wait_for_server(port)
        with redis.Redis(port=port) as admin:
            admin.execute_command(*rule.replace("PASSWORD", "secret").split())
            admin.execute_command("ACL", "SETUSER", "default", "off")
        with connected_to(f"redis://afterimage:secret@127.0.0.1:{port}/0") as store:
            run_job(store, small_msh)
            SimpleWorker([Jobs(store).queue], connection=store.queue)  # may register itself
            for forbidden in (lambda: store.queue.get("foreign key"), store.queue.flushall):
                with pytest.raises(redis.RedisError, match="permission"):
                    forbidden()
        with (
            connected_to(f"redis://afterimage:wrong@127.0.0.1:{port}/0") as store,
            pytest.raises(redis.AuthenticationError),
        ):
            store.ping()


def test_a_failover_by_sentinel_loses_no_job(tmp_path: Path, small_msh: bytes) -> None:
    first, second, watcher = free_port(), free_port(), free_port()
    replica_of = ("--replicaof", "127.0.0.1", str(first))
    url = f"redis+sentinel://127.0.0.1:{watcher}/queue/0"
    with (
        server(tmp_path / "a", "--port", str(first)) as master,
        server(tmp_path / "b", "--port", str(second), *replica_of),
        redis.Redis(port=second) as replica,
        redis.Redis(port=watcher) as sentinel,
    ):
        until(lambda: replica.info()["master_link_status"] == "up", "the replica follows")
        (tmp_path / "sentinel.conf").write_text(
            f"port {watcher}\nsentinel monitor queue 127.0.0.1 {first} 1\n"
            "sentinel down-after-milliseconds queue 1000\nsentinel failover-timeout queue 3000\n"
        )
        with (
            server(tmp_path / "s", str(tmp_path / "sentinel.conf"), "--sentinel"),
            connected_to(url) as store,
        ):
            until(lambda: sentinel.sentinel_slaves("queue"), "the Sentinel knows the replica")
            jobs = Jobs(store)
            job_id = jobs.submit(decode_of(small_msh, FAST), small_msh)[0].id
            until(lambda: replica.exists(jobs.key(job_id)), "the job is on the replica")
            master.kill()
            until(lambda: jobs.queue.job_ids == [job_id], "the new master answers")
            assert store.bitstream(bitstream.digest(small_msh)) == small_msh
            attempt = Attempt.begin(jobs, job_id)
            assert attempt is not None
            attempt.commit(b"picture")
            assert store.picture(job_id) == b"picture"

            import anyio

            async def ping() -> bool:
                connection = streams(settings(url))
                try:
                    return bool(await connection.ping())
                finally:
                    await connection.aclose()
                    pool: Any = connection.connection_pool
                    for sentinel in pool.sentinel_manager.sentinels:
                        await sentinel.aclose()

            assert anyio.run(ping)


@pytest.mark.parametrize(
    "url",
    ["http://host", "redis+sentinel://host:26379", "redis+sentinel:///queue",
     "redis+sentinel://host:port/queue", "redis://host:port"],
)  # fmt: skip
def test_the_error_of_an_invalid_url_hides_the_password(url: str) -> None:
    secret = url.replace("://", "://user:hunter2@", 1)
    for invalid in (url, secret):
        with pytest.raises(NoRedis) as error:
            urls.client(invalid)
        assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("scheme", ["redis", "rediss", "redis+sentinel"])
@pytest.mark.parametrize("password", ["57#hunter2", "57/hunter2", "57?hunter2", "5a?hunter2@", "#"])
def test_a_password_that_would_end_the_host_of_a_url_is_refused(scheme: str, password: str) -> None:
    """redis-py would connect to port 57 of localhost."""
    for user in ("", "user"):
        with pytest.raises(NoRedis, match="write # / .* in a password as %23 %2F") as error:
            urls.client(f"{scheme}://{user}:{password}@host:6379/queue/0")
        assert "hunter2" not in str(error.value)


@pytest.mark.parametrize(
    "url", ["redis://host/zero", "redis://host:1/1a", "redis+sentinel://host/queue/zero"]
)
def test_a_database_that_is_no_number_is_refused(url: str) -> None:
    """redis-py would use database 0."""
    with pytest.raises(NoRedis, match="the database at its end is not a number"):
        urls.client(url)
    with pytest.raises(NoRedis, match="the database at its end is not a number"):
        urls.asynchronous(url)


@pytest.mark.parametrize(
    "url",
    ["redis://:6379", "redis://host?username=a@b", "redis://:a%23b%40@host:1/2", "redis://host/",
     "unix:///tmp/a@b.sock?db=1", "redis://[::1]:6379/0", "redis+sentinel://a:1,b/queue"],
)  # fmt: skip
def test_a_usual_url_is_accepted(url: str) -> None:
    urls.close(urls.client(url))


def test_a_sentinel_url_has_users_and_tls_options() -> None:
    url = (
        "rediss+sentinel://app:pw@a:1,b/queue/3?ssl_ca_certs=/ca.pem&sentinel_password=other%20one"
    )
    pool: Any = urls.client(url).connection_pool
    assert pool.connection_kwargs["username"] == "app"
    assert pool.connection_kwargs["password"] == "pw"
    assert pool.connection_kwargs["db"] == 3
    assert pool.connection_kwargs["ssl_ca_certs"] == "/ca.pem"
    assert issubclass(pool.connection_class, redis.SSLConnection)
    (a, b) = pool.sentinel_manager.sentinels
    for sentinel, host, port in ((a, "a", 1), (b, "b", 26379)):
        options = sentinel.connection_pool.connection_kwargs
        assert (options["host"], options["port"], options["password"]) == (host, port, "other one")
        assert "username" not in options or options["username"] is None
        assert issubclass(sentinel.connection_pool.connection_class, redis.SSLConnection)
