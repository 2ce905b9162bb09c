"""Names that libraries do not document, and that this project uses: each in one module."""

import ast
import importlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h11
import pytest
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.dispatcher import Dispatcher
from PIL import Image
from redis.sentinel import SentinelConnectionPool
from rq import SimpleWorker
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

ROOT = Path(__file__).parents[2]
PARSER = "service/cli/http_parser.py"
PROTOCOL = "service/cli/http_protocol.py"
WORKER = "worker/rq_worker.py"
COMPILED = "models/codec/compiled.py"


def connection() -> h11.Connection:
    """A connection that reads the trailers of a chunked body."""
    made = h11.Connection(h11.SERVER)
    made.receive_data(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n")
    made.next_event()
    return made


def instance_of_worker() -> set[str]:
    """The attributes that RQ's worker sets and reads."""
    return {
        node.attr
        for parent in SimpleWorker.__mro__
        if parent.__module__.startswith("rq.")
        for node in ast.walk(ast.parse(source(parent.__module__)))
        if isinstance(node, ast.Attribute)
    }


def source(module: str) -> str:
    file = importlib.import_module(module).__file__
    assert file is not None
    return Path(file).read_text("utf-8")


def used() -> Iterator[tuple[str, str, Any, tuple[str, ...]]]:
    """Library, our module, an object, and the attributes that the module uses of it."""
    parser = connection()
    yield "h11", PARSER, h11.Connection, ("_extract_next_receive_event",)
    yield "h11", PARSER, parser, ("_reader", "_receive_buffer", "_cstate", "trailing_data")
    reader, buffer, state = (
        getattr(parser, name, None) for name in ("_reader", "_receive_buffer", "_cstate")
    )
    yield "h11", PARSER, reader, ("_reading_trailer",)
    yield "h11", PARSER, buffer, ("_data", "maybe_extract_at_most", "__len__")
    yield "h11", PARSER, state, ("process_keep_alive_disabled",)
    methods = (
        "connection_made", "connection_lost", "data_received", "on_response_complete",
        "_unsupported_upgrade_warning", "send_400_response",
    )  # fmt: skip
    yield "uvicorn", PROTOCOL, H11Protocol, methods
    cycle = RequestResponseCycle.__init__.__code__.co_names
    flags = ("disconnected", "message_event", "response_complete")
    yield "uvicorn", PROTOCOL, dict.fromkeys(cycle), flags
    trusted = ProxyHeadersMiddleware(lambda *_: None, "*").trusted_hosts  # type: ignore[arg-type]
    yield "uvicorn", PROTOCOL, trusted, ("always_trust", "__contains__")
    yield "rq", WORKER, SimpleWorker, ("_install_signal_handlers", "execute_job", "teardown")
    own = ("_stop_requested", "pubsub_thread", "max_connection_wait_time", "log_job_description")
    yield "rq", WORKER, dict.fromkeys(instance_of_worker()), own
    yield "numba", COMPILED, FunctionCache, ("_impl_class", "cache_path")
    yield "numba", COMPILED, IndexDataCacheFile, ("load", "save")
    assigned = Dispatcher.enable_caching.__code__.co_names
    yield "numba", COMPILED, dict.fromkeys(assigned), ("_cache",)
    read = {name for f in vars(FunctionCache.__mro__[1]).values() if hasattr(f, "__code__")
            for name in f.__code__.co_names}  # fmt: skip
    yield "numba", COMPILED, dict.fromkeys(read), ("_impl", "_cache_file", "filename_base")
    yield "Pillow", "models/pictures/decode.py", Image.new("L", (1, 1)), ("_im",)
    pool = dict.fromkeys(SentinelConnectionPool.__init__.__code__.co_names)
    yield "redis", "worker/queue/urls.py", pool, ("sentinel_manager",)


@pytest.mark.parametrize(("library", "module", "owner", "names"), [*used()])
def test_the_installed_library_has_the_names_that_are_used_of_it(
    library: str, module: str, owner: Any, names: tuple[str, ...]
) -> None:
    """`owner` is an object, or a dictionary whose keys are names in the library's source."""
    version = importlib.metadata.version(library)
    for name in names:
        found = name in owner if isinstance(owner, dict) else hasattr(owner, name)
        assert found, f"{library} {version} has no `{name}` any more; change {module}"


def test_private_modules_of_libraries_are_imported_in_one_module_each() -> None:
    """A new one belongs into `used`."""
    found = {
        (node.module, str(file.relative_to(ROOT)))
        for package in ("models", "worker", "service")
        for file in (ROOT / package).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module
        if any(part.startswith("_") and part != "__future__" for part in node.module.split("."))
    }
    assert found == {("h11._readers", PARSER), ("uvicorn._types", PROTOCOL)}
