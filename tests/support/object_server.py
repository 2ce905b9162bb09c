"""A real S3 server, rclone, over a folder, and a proxy in front of it that injects faults."""

import contextlib
import http.client
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.support.service import free_port
from tests.support.waiting import until

KEY_ID, SECRET = "AKIDEXAMPLE", "secret-of-the-tests"
BUCKET = "pictures"


@contextlib.contextmanager
def s3_server(folder: Path) -> Iterator[int]:
    """Serve `folder`, whose folders are buckets, and return the port of 127.0.0.1.

    Change objects only through the server, which caches its folders.
    """
    (folder / BUCKET).mkdir(parents=True, exist_ok=True)
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("rclone")), "serve", "s3", "--config", "",
        "--auth-key", f"{KEY_ID},{SECRET}", "--addr", f"127.0.0.1:{port}", str(folder),
    ]  # fmt: skip
    with (folder.parent / "rclone.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        until(lambda: _accepts(port), "the S3 server starts")
        yield port
    finally:
        process.kill()
        process.wait()


def s3_settings(folder: Path, port: int) -> dict[str, str]:
    """Write a file that names the bucket as the store `s3`; returns the environment for it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "stores.toml"
    file.write_text(
        f"""
        [stores.s3]
        url = "s3://{BUCKET}"
        write = true
        [stores.s3.options]
        region = "us-east-1"
        endpoint = "http://127.0.0.1:{port}"
        allow_http = true
        """
    )
    keys = {"AWS_ACCESS_KEY_ID": KEY_ID, "AWS_SECRET_ACCESS_KEY": SECRET}
    return {"AFTERIMAGE_STORES": str(file), **keys}


def _accepts(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


class FaultProxy:
    """Forwards HTTP requests. Each takes the next of `faults`: a status, "cut", "slow" or ""."""

    def __init__(self, upstream: int, slow_s: float) -> None:
        self.faults: deque[int | str] = deque()
        self.broken: dict[str, int | str] = {}
        """Part of a path -> the fault of every request whose path contains it."""
        self.seen: list[str] = []
        """The method of each request."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, upstream, slow_s))
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(proxy: FaultProxy, upstream: int, slow_s: float) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def handle_one_request(self) -> None:
            with contextlib.suppress(ConnectionError):  # the client has given up
                super().handle_one_request()

        def forward(self) -> None:
            proxy.seen.append(self.command)
            fault = proxy.faults.popleft() if proxy.faults else ""
            fault = next((f for part, f in proxy.broken.items() if part in self.path), fault)
            length = int(self.headers.get("Content-Length") or 0)
            if fault == "cut":
                self.rfile.read(min(length, 100))
                self.close_connection = True
                return
            body = self.rfile.read(length)
            if fault == "slow":
                time.sleep(slow_s)
            if isinstance(fault, int):
                self.answer(fault, {}, b"injected")
                return
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", upstream)) as server:
                server.request(self.command, self.path, body, dict(self.headers.items()))
                with server.getresponse() as answer:
                    self.answer(answer.status, dict(answer.getheaders()), answer.read())

        def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response_only(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                if name.lower() != "transfer-encoding":
                    self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_HEAD = do_POST = forward

        def log_message(self, *_: object) -> None:
            pass

    return Handler
