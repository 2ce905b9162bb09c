"""The HTTP API as a server in this process.

Importing this module loads torch, so `afterimage serve` does it only when it needs the server.
"""

import functools
import socket
import sys
from collections.abc import Callable

import uvicorn
from starlette.types import ASGIApp

from service.app import create_app
from service.cli import connections, listening
from service.cli.http_protocol import HttpProtocol, ProxyHeaders
from service.settings import ServiceSettings
from service.turns import Turns

SHUTDOWN_TIMEOUT_S = 10
"""How long open requests may take to finish when the service stops."""
SWITCH_S = 5e-4
"""How long a thread of Python waits until another one lets it run. With Python's default, 5 ms, the
many short steps of a decode take seconds while the event loop is busy with small requests."""


def configuration(app: ASGIApp, settings: ServiceSettings) -> uvicorn.Config:
    """Return uvicorn's configuration for `app`; the sockets are given to the server's `run`."""
    config = uvicorn.Config(
        app,
        ws="none",
        timeout_keep_alive=settings.keep_alive_s,
        timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_S,
        proxy_headers=False,  # `ProxyHeaders` instead
        log_config=None,
        log_level="warning",
        access_log=False,
    )
    limits = connections.limited(settings)
    turns = Turns(app, lambda: limits.accepted)
    config.app = proxies = ProxyHeaders(turns, config.forwarded_allow_ips)  # type: ignore[arg-type]
    limits.trusted = proxies.trusted_hosts
    config.http = functools.partial(HttpProtocol, limits=limits)  # type: ignore[assignment]
    return config


class ApiServer(uvicorn.Server):
    """Uvicorn with the API, which reads its settings from the environment.

    `host` is the name or address on which it listens.
    `on_ready` is called once the models are loaded and the sockets accept connections.
    """

    def __init__(self, on_ready: Callable[[], None], host: str = "") -> None:
        settings = ServiceSettings()
        sys.setswitchinterval(SWITCH_S)
        self._app = create_app(settings, host)
        self._on_ready = on_ready
        super().__init__(configuration(self._app, settings))

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Load the models, then accept connections.

        Raises `CannotListen` if another program has begun to listen on the port meanwhile.
        """
        names = [bound.getsockname()[:2] for bound in sockets or []]
        try:
            await super().startup(sockets)
            for bound in sockets or []:  # again: uvloop closes the socket instead of raising
                bound.listen(self.config.backlog)
        except OSError:
            await self.lifespan.shutdown()
            raise listening.in_use(*names[0]) from None
        if not self.should_exit:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End requests that wait for a job, then finish the other requests."""
        self._app.state.services.feeds.close()
        await super().shutdown(sockets)
