"""The HTTP API as a server in this process.

Importing this module loads torch, so `afterimage serve` does it only when it needs the server.
"""

import socket
from collections.abc import Callable

import uvicorn

from service.app import create_app
from service.settings import ServiceSettings

SHUTDOWN_TIMEOUT_S = 10
"""How long open requests may take to finish when the service stops."""


class ApiServer(uvicorn.Server):
    """Uvicorn with the API, which reads its settings from the environment.

    `on_ready` is called once the models are loaded and the port accepts connections.
    """

    def __init__(self, host: str, port: int, on_ready: Callable[[], None]) -> None:
        self._app = create_app(ServiceSettings())
        self._on_ready = on_ready
        super().__init__(
            uvicorn.Config(
                self._app,
                host,
                port,
                log_config=None,
                log_level="warning",
                access_log=False,
                timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_S,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Load the models and bind the port."""
        await super().startup(sockets)
        if not self.should_exit:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End requests that wait for a job, then finish the other requests."""
        self._app.state.services.closing.set()
        await super().shutdown(sockets)
