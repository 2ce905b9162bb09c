"""The application: `create_app()` for any ASGI server."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio.to_thread
from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi_offline import FastAPIOffline

from models import checkpoint, library
from models.errors import WeightsError
from service import __version__, metrics, openapi, problems
from service.auth import Keys
from service.deps import Bodies, State
from service.instant import Instant
from service.quotas import Quotas
from service.requests import Requests
from service.routes import decodes, encodes, health, info, links, page, pictures, progress
from service.routes import metrics as metrics_page
from service.settings import ServiceSettings
from worker.queue import store
from worker.queue.jobs import Jobs
from worker.queue.store import Store
from worker.webhooks.settings import WebhookSettings

CORS_MAX_AGE_S = 600
"""How long a browser may remember what it was allowed."""
DESCRIPTION = """
Send a learned-codec bitstream; get the codec's own picture at once, and a picture drawn by a
diffusion decoder from the same bytes soon after.

1. `POST /v1/decodes?tier=perceptual` answers with the instant picture and a `Location`.
2. `GET` that location until its `status` is `succeeded`.
3. `GET …/image` is then the perceptual picture. The same request later is answered with it at once.
"""


def create_app(settings: ServiceSettings | None = None) -> FastAPI:
    """The API over the stores that `settings` (by default the environment) name.

    Raises `NoRedis` for a wrong URL, `KeysError` for a wrong file of API keys. Models are loaded at
    start-up; `WeightsError` ends it.
    """
    chosen = settings or ServiceSettings()
    connected = store.connect(chosen)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.own = await anyio.to_thread.run_sync(_state, chosen, connected)
        port = chosen.metrics_port
        jobs, host = app.state.own.jobs, chosen.metrics_host
        stop = metrics.serve(port, jobs, host) if port else None
        yield
        if stop is not None:
            await anyio.to_thread.run_sync(stop)
        connected.close()
        await app.state.own.streams.aclose()

    app = FastAPIOffline(
        title="Afterimage",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        generate_unique_id_function=lambda route: route.name,
    )
    app.state.keys = Keys.read(chosen.api_keys) if chosen.api_keys else None
    secret = chosen.link_secret
    app.state.link_secret = secret.get_secret_value().encode() if secret else None
    problems.install(app)
    for module in (decodes, pictures, progress, links, encodes, info, health, page):
        app.include_router(module.router)
    app.mount("/web", page.files)
    if not chosen.metrics_port:
        app.include_router(metrics_page.router)
    if chosen.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=chosen.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["*"],
            max_age=CORS_MAX_AGE_S,
        )
    app.add_middleware(Requests)  # the last, so that it is the outermost

    openapi.install(app, keyed=app.state.keys is not None)
    return app


def _state(settings: ServiceSettings, connected: Store) -> State:
    loaded = library.load(settings.threads, with_decoder=False, folder=settings.weights_dir)
    loaded.warm_up()
    decoder = next((e for e in checkpoint.manifest() if e.kind == "decoder"), None)
    if decoder is None:
        raise WeightsError("the manifest names no diffusion decoder")
    jobs = Jobs(connected, settings.job_timeout_s)
    return State(
        settings,
        loaded,
        decoder.weights_id,
        connected,
        jobs,
        Quotas(jobs, settings.requests_per_minute, settings.jobs_at_once),
        WebhookSettings(),
        Instant(loaded, settings),
        Bodies(max(settings.bodies_bytes, settings.max_bytes)),
        store.streams(settings),
    )
