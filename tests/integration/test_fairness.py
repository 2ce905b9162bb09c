"""One caller's slow webhooks do not delay the requests of another, in the API of this process."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.settings import ServiceSettings
from service.submission import RESOLVERS_PER_CALLER
from tests.support import weights
from tests.support.api import run_app
from tests.support.api_keys import TOKENS, guarded_settings
from tests.support.service import WEBHOOK_SECRET

pytestmark = [pytest.mark.redis, pytest.mark.weights]

SLOW_S = 3.0
ATTACKS = 12


def test_webhook_hosts_that_resolve_slowly_do_not_delay_other_callers(
    redis_urls: tuple[str, str], small_msh: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve requests of one caller, each with eight hosts whose name server answers late."""
    resolve = socket.getaddrinfo
    waiting: list[str] = []
    release = threading.Event()

    def slow(host: str, *arguments: Any, **options: Any) -> Any:
        if host.endswith(".slow.test"):
            waiting.append(host)
            release.wait(SLOW_S)
            raise socket.gaierror(f"{host} has no address")
        return resolve(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    for name, value in guarded_settings(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AFTERIMAGE_WEBHOOK_SECRET", WEBHOOK_SECRET)
    monkeypatch.setenv("AFTERIMAGE_WEBHOOK_ALLOW", "hooks.slow.test 127.0.0.1")
    queue, cache = redis_urls
    settings = ServiceSettings(REDIS_URL=queue, CACHE_REDIS_URL=cache)

    def post(client: httpx.Client, caller: str, seed: int, urls: list[str]) -> int:
        params: dict[str, Any] = {"tier": "ddim-10", "seed": seed, "webhook": urls}
        key = {"Authorization": f"Bearer {TOKENS[caller]}"}
        return client.post("/v1/decodes", params=params, content=small_msh, headers=key).status_code

    with weights.loaded_once(), run_app(settings) as api, ThreadPoolExecutor(ATTACKS) as pool:
        hosts = [f"https://{i}.slow.test/" for i in range(8)]
        attacks = [pool.submit(post, api, "both", seed, hosts) for seed in range(ATTACKS)]
        while len(waiting) < RESOLVERS_PER_CALLER:
            time.sleep(0.01)
        began = time.monotonic()
        assert post(api, "decoder", 2911, ["http://127.0.0.1:9/hook"]) == 200
        took = time.monotonic() - began
        assert api.get("/livez").status_code == 200
        release.set()
        assert {attack.result() for attack in attacks} == {422}
    assert took < SLOW_S - 1
