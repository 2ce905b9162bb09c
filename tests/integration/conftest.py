"""The API in the tests' process, with a real Redis and without workers."""

from collections.abc import Iterator

import httpx
import pytest

from service.settings import ServiceSettings
from tests.support import weights
from tests.support.api import run_app


@pytest.fixture(scope="module")
def api(redis_urls: tuple[str, str]) -> Iterator[httpx.Client]:
    queue, cache = redis_urls
    settings = ServiceSettings(REDIS_URL=queue, CACHE_REDIS_URL=cache, max_pixels=1_000_000)
    with weights.loaded_once(), run_app(settings) as client:
        yield client
