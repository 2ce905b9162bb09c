"""Private Redis servers: policies, persistence, versions, and their end with the parent."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import redis

from worker.queue import private_redis
from worker.queue.urls import NoRedis

pytestmark = pytest.mark.redis


def test_queue_and_cache_have_their_eviction_policies(
    redis_urls: tuple[str, str],
) -> None:
    policies = []
    for url in redis_urls:
        with redis.Redis.from_url(url) as client:
            policies.append(client.config_get("maxmemory-policy")["maxmemory-policy"])
    assert policies == ["noeviction", "allkeys-lfu"]


def test_the_sockets_are_private(redis_urls: tuple[str, str]) -> None:
    folder = Path(redis_urls[0].removeprefix("unix://")).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.fixture
def long_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's folder for temporary files, with a path of more than 107 bytes."""
    folder = tmp_path / (100 * "a")
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


def test_sockets_are_in_a_short_folder_if_the_temporary_one_is_too_long(
    tmp_path: Path, long_temporary_folder: Path
) -> None:
    with private_redis.servers(tmp_path / "cache") as urls:
        folder = Path(urls[0].removeprefix("unix://")).parent
        assert not folder.is_relative_to(long_temporary_folder)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        for url in urls:
            with redis.Redis.from_url(url) as client:
                assert client.ping()
    assert not folder.exists()


@pytest.mark.parametrize(("length", "fits"), [(107, True), (108, False)])
def test_the_longest_socket_path_that_the_system_takes_is_used(
    length: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path(tempfile.mkdtemp(dir="/tmp"))  # shorter than pytest's folder
    folder = own / ("a" * (length - len(f"{own}//afterimage-12345678/queue.sock")))
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    try:
        with private_redis.servers(own / "cache") as (url, _):
            assert url.startswith(f"unix://{folder}/") == fits
    finally:
        shutil.rmtree(own)


def test_if_no_folder_is_short_enough_the_error_says_so_before_redis_is_started(
    tmp_path: Path, long_temporary_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "isdir", lambda path: str(path) == str(long_temporary_folder))
    monkeypatch.setattr(private_redis, "_server", lambda *_: pytest.fail("it was started"))
    with (
        pytest.raises(NoRedis, match="too long .* at most 107; set TMPDIR") as e,
        private_redis.servers(tmp_path),
    ):
        pass
    assert "\n" not in str(e.value)


def test_queue_data_survive_a_restart_and_cache_data_do_not(tmp_path: Path) -> None:
    for start in range(2):
        with private_redis.servers(tmp_path) as urls:
            queue, cache = (redis.Redis.from_url(u) for u in urls)
            if start == 0:
                queue.set("a", "1")
                cache.set("a", "1")
            else:
                assert queue.get("a") == b"1"
                assert cache.get("a") is None
            queue.close()
            cache.close()


def test_two_services_with_one_folder_have_separate_servers(tmp_path: Path) -> None:
    with private_redis.servers(tmp_path) as first, private_redis.servers(tmp_path) as second:
        assert first != second
        with redis.Redis.from_url(first[0]) as a, redis.Redis.from_url(second[0]) as b:
            a.set("a", "1")
            assert b.get("a") is None


def test_a_server_on_path_is_preferred(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "valkey-server"
    fake.write_text("#!/bin/sh\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert private_redis.find_server() == fake
    with (
        pytest.raises(NoRedis, match="did not start"),
        private_redis.servers(tmp_path),
    ):
        pass


def test_a_server_that_is_too_old_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"redis-server": "Redis server v=6.0.16 sha=0", "valkey-server": "v=8.1.0"}
    for name, version in versions.items():
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{version}'\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert private_redis.find_server() == tmp_path / "valkey-server"


def test_without_any_server_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NoRedis, match="REDIS_URL"):
        private_redis.find_server()


def test_servers_exit_when_their_parent_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from worker.queue import private_redis\n"
        "with private_redis.servers(Path(sys.argv[1])) as urls:\n"
        "    print(urls[0], flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        url = parent.stdout.readline().strip()
        with redis.Redis.from_url(url) as client:
            assert client.ping()
            os.kill(parent.pid, signal.SIGKILL)
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                try:
                    client.ping()
                except redis.ConnectionError:
                    return
                time.sleep(0.05)
    pytest.fail("the server still runs")
