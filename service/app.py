"""The ASGI application: `create_app()`."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import anyio.to_thread
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi_offline import FastAPIOffline

from service import __version__, metrics, openapi, origins, problems, reference, services
from service.auth import Keys
from service.batches import task as batch_task
from service.origins import OriginMiddleware
from service.requests import RequestMiddleware
from service.routes import (
    batches,
    decodes,
    encodes,
    health,
    info,
    links,
    page,
    pictures,
    progress,
    queue,
)
from service.routes import metrics as metrics_page
from service.settings import ServiceSettings
from worker.queue import object_config, object_stores, results, store
from worker.queue.object_stores import ObjectStores
from worker.queue.store import Store

CORS_MAX_AGE_S = 600
"""Seconds that browsers may cache the answer to a CORS preflight request."""
DESCRIPTION = """
Send a bitstream of a learned image codec. The response is the codec's own picture; a diffusion
decoder then makes a more natural picture from the same bytes.

1. `POST /v1/decodes?tier=perceptual` responds with the instant picture and a `Location`.
2. `GET` that location until its `status` is `succeeded`.
3. `GET …/image` then returns the perceptual picture. Repeating the request returns it at once.
"""


def create_app(settings: ServiceSettings | None = None, host: str = "") -> FastAPI:
    """Create the API. `settings` are read from the environment by default; `host` is the name or
    address on which the server listens.

    Raises `NoRedis` for an invalid Redis URL, `KeysError` for an invalid file of API keys,
    `StoresError` for an invalid file of object stores. Models are loaded at start-up, which raises
    `WeightsError` if weights are missing or altered.
    """
    settings = settings or ServiceSettings()
    keys = Keys.read(settings.api_keys) if settings.api_keys else None
    objects = object_stores.connect(settings)
    if settings.stores is not None:
        object_config.check_keys(settings.stores, objects.configs, keys.names if keys else set())
    connected = store.connect(settings, results.connect(settings, objects))
    app = FastAPIOffline(
        docs_url=None,
        redoc_url=None,
        title="Afterimage",
        version=__version__,
        description=DESCRIPTION,
        lifespan=_lifespan(settings, connected, objects, keys),
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        generate_unique_id_function=lambda route: route.name,
        redirect_slashes=False,  # such redirects take their host from the request
    )
    problems.install(app)
    reference.install(app)
    for module in (
        decodes, pictures, progress, batches, links, encodes, queue, info, health, page
    ):  # fmt: skip
        app.include_router(module.router)
    app.mount("/web", page.files)
    if not settings.metrics_port:
        app.include_router(metrics_page.router)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
            max_age=CORS_MAX_AGE_S,
        )
    hosts = origins.names(settings.hosts, keys is not None, host)
    allowed = settings.cors_origins if keys is None else None
    app.add_middleware(OriginMiddleware, hosts=hosts, origins=allowed)
    # added last, so that it is the outermost
    app.add_middleware(RequestMiddleware, root_path=settings.root_path)
    openapi.install(app, keyed=keys is not None)
    return app


def _lifespan(
    settings: ServiceSettings, connected: Store, objects: ObjectStores, keys: Keys | None
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """Load the services before the first request; close their connections after the last."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loaded = await anyio.to_thread.run_sync(services.load, settings, connected, objects, keys)
        app.state.services = loaded
        port, host = settings.metrics_port, settings.metrics_host
        tasks = [asyncio.create_task(loaded.feeds.run())]
        if objects.configs:
            tasks.append(asyncio.create_task(batch_task.run(loaded)))
        stop_metrics = metrics.serve(port, loaded.jobs, host) if port else None
        yield
        loaded.feeds.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if stop_metrics is not None:
            await anyio.to_thread.run_sync(stop_metrics)
        await anyio.to_thread.run_sync(loaded.close)
        await loaded.streams.aclose()

    return lifespan
