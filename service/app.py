"""The application: `create_app()` for any ASGI server."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio.to_thread
from fastapi import FastAPI
from fastapi.responses import RedirectResponse
from fastapi_offline import FastAPIOffline

from models import checkpoint, library
from models.errors import WeightsError
from service import (
    __version__,
    about,
    codecs,
    decodes,
    health,
    pictures,
    problems,
    progress,
    schemas,
)
from service.deps import State
from service.instant import Instant
from service.settings import ServiceSettings
from worker import store
from worker.jobs import Jobs
from worker.store import Store

DESCRIPTION = """
Send a learned-codec bitstream; get the codec's own picture at once, and a picture drawn by a
diffusion decoder from the same bytes soon after.

1. `POST /v1/decodes?tier=perceptual` answers with the instant picture and a `Location`.
2. `GET` that location until its `status` is `succeeded`.
3. `GET …/image` is then the perceptual picture. The same request later is answered with it at once.
"""


def create_app(settings: ServiceSettings | None = None) -> FastAPI:
    """The API over the stores that `settings` (by default the environment) name.

    Raises `NoRedis` for a wrong URL. Models are loaded at start-up; `WeightsError` ends it.
    """
    chosen = settings or ServiceSettings()
    connected = store.connect(chosen)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.own = await anyio.to_thread.run_sync(_state, chosen, connected)
        yield
        connected.close()
        await app.state.own.streams.aclose()

    app = FastAPIOffline(
        title="Afterimage",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
    )
    problems.install(app)
    for module in (decodes, pictures, progress, codecs, about, health):
        app.include_router(module.router)

    @app.get("/", include_in_schema=False)
    async def root() -> RedirectResponse:
        return RedirectResponse("/docs")

    _add_problem_schema(app)
    return app


def _state(settings: ServiceSettings, connected: Store) -> State:
    loaded = library.load(settings.threads, with_decoder=False, folder=settings.weights_dir)
    loaded.warm_up()
    decoder = next((e for e in checkpoint.manifest() if e.kind == "decoder"), None)
    if decoder is None:
        raise WeightsError("the manifest names no diffusion decoder")
    return State(
        settings,
        loaded,
        decoder.weights_id,
        connected,
        Jobs(connected, settings.job_timeout_s),
        Instant(loaded, settings),
        store.streams(settings),
    )


def _add_problem_schema(app: FastAPI) -> None:
    """Problem documents come from handlers, so no route declares them: add them to OpenAPI."""
    made = app.openapi

    def openapi() -> dict[str, object]:
        if app.openapi_schema is None:
            schema = made()
            components = schema.setdefault("components", {}).setdefault("schemas", {})
            components["Problem"] = schemas.Problem.model_json_schema()
            for path in schema["paths"].values():
                for operation in path.values():
                    if "422" in operation["responses"]:
                        operation["responses"]["422"] = problems.responses(422)[422]
            for unused in ("HTTPValidationError", "ValidationError"):
                components.pop(unused, None)
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]
