"""A TCP server whose connections get no answer."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def listening(
    accepted: Callable[[socket.socket], object], address: str = "127.0.0.1", port: int = 0
) -> Iterator[int]:
    """Call `accepted` with each connection, in another thread; yields the port.

    The connections are closed at the end of the block.
    """
    with contextlib.ExitStack() as held, socket.create_server((address, port)) as server:

        def accept() -> None:
            with contextlib.suppress(OSError):  # the socket was shut down
                while True:
                    accepted(held.enter_context(server.accept()[0]))

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


@contextlib.contextmanager
def closing(address: str, port: int = 0) -> Iterator[tuple[int, list[str]]]:
    """Close each connection at once; yields the port, and the address once per connection."""
    came: list[str] = []

    def accepted(connection: socket.socket) -> None:
        came.append(address)  # before the client notices that it is closed
        connection.close()

    with listening(accepted, address, port) as bound:
        yield bound, came
