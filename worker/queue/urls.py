"""Redis clients by URL, with or without Sentinel.

URLs begin with `redis://`, `rediss://` or `unix://`, or have the form
`redis[s]+sentinel://[user:password@]host:port[,host:port…]/service[/db][?options]`. Options are
those of redis-py, e.g. `ssl_ca_certs`; `sentinel_username` and `sentinel_password` log in to the
Sentinels.
"""

from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel
from redis.connection import SSLConnection, parse_url

from models.errors import AfterimageError

SENTINEL_PORT = 26379


class NoRedis(AfterimageError):
    """Redis is not installed, cannot be started, is too old, or has an invalid URL."""


@dataclass(frozen=True, slots=True)
class _Sentinels:
    """A parsed Sentinel URL."""

    addresses: list[tuple[str, int]]
    service: str
    options: dict[str, Any]  # options of redis-py for connections to the Redis service
    sentinel_options: dict[str, Any]  # options of redis-py for connections to the Sentinels


def client(url: str, **settings: Any) -> redis.Redis:
    """A client that connects on first use; `settings` are keyword arguments of redis-py.

    Raises `NoRedis` for an invalid URL.
    """
    try:
        _check(url)
        if "+sentinel://" not in url:
            return redis.Redis.from_url(url, **settings)
        parsed = _parse(url, settings)
        sentinel = redis.sentinel.Sentinel(  # type: ignore[no-untyped-call]
            parsed.addresses, sentinel_kwargs=parsed.sentinel_options
        )
        master: redis.Redis = sentinel.master_for(parsed.service, **parsed.options)  # type: ignore[no-untyped-call]
        return master
    except ValueError as e:
        raise NoRedis(f"{_without_password(url)!r} is not a Redis URL: {e}") from e


def asynchronous(url: str, **settings: Any) -> redis.asyncio.Redis:
    """Like `client`, for asyncio."""
    try:
        _check(url)
        if "+sentinel://" not in url:
            return redis.asyncio.Redis.from_url(url, **settings)
        parsed = _parse(url, settings)
        sentinel = redis.asyncio.sentinel.Sentinel(  # type: ignore[no-untyped-call]
            parsed.addresses, sentinel_kwargs=parsed.sentinel_options
        )
        master: redis.asyncio.Redis = sentinel.master_for(parsed.service, **parsed.options)
        return master
    except ValueError as e:
        raise NoRedis(f"{_without_password(url)!r} is not a Redis URL: {e}") from e


def close(connected: redis.Redis) -> None:
    """Close a client's connections, and those to its Sentinels."""
    connected.close()
    manager = getattr(connected.connection_pool, "sentinel_manager", None)
    for sentinel in manager.sentinels if manager else ():
        sentinel.close()


def _check(url: str) -> None:
    """Raise `ValueError` for a URL that redis-py would read as that of another server or database.

    The error does not repeat parts of the URL: they may belong to the password.
    """
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return
    before, at, _ = parts.query.partition("@")
    in_query = bool(at) and "=" not in before  # options are written name=value
    if "@" in parts.path + parts.fragment or in_query:
        advice = "write # / ? @ : % in a password as %23 %2F %3F %40 %3A %25"
        raise ValueError(f"the password has characters with a meaning in URLs; {advice}")
    database = parts.path.rpartition("/")[2] if parts.path.count("/") > _depth(parts) else ""
    if database and not (database.isascii() and database.isdigit()):
        raise ValueError("the database at its end is not a number; write for example /0")


def _depth(parts: SplitResult) -> int:
    """The number of slashes in the path of a URL that names no database."""
    return 1 if parts.scheme.endswith("+sentinel") else 0


def _parse(url: str, settings: dict[str, Any]) -> _Sentinels:
    """Parse a Sentinel URL; `settings` override its options. Raises `ValueError`."""
    scheme, _, rest = url.partition("+sentinel://")
    parts = urlsplit(f"{scheme}://{rest}")
    _, _, hosts = parts.netloc.rpartition("@")
    service, _, db = parts.path.strip("/").partition("/")
    if not service or not hosts:
        raise ValueError("write redis+sentinel://host:port[,host:port…]/service")
    query = dict(parse_qsl(parts.query))
    sentinel_options: dict[str, Any] = {
        key.removeprefix("sentinel_"): query.pop(key)
        for key in ("sentinel_username", "sentinel_password")
        if key in query
    }
    options = _service_options(parts, db, query) | settings
    if "ssl" in options:
        sentinel_options |= {k: v for k, v in options.items() if k.partition("_")[0] == "ssl"}
    sentinel_options |= {k: v for k, v in settings.items() if k.startswith("socket_")}
    sentinel_options["retry"] = None  # by default each Sentinel is retried 10 times before the next
    addresses = [_address(host) for host in hosts.split(",")]
    return _Sentinels(addresses, service, options, sentinel_options)


def _service_options(parts: SplitResult, db: str, query: dict[str, str]) -> dict[str, Any]:
    """The options that redis-py reads from a URL of one server: user, password, db, TLS, query."""
    credentials, at, _ = parts.netloc.rpartition("@")
    plain_url = f"{parts.scheme}://{credentials}{at}host/{db}?{urlencode(query)}"
    options: dict[str, Any] = parse_url(plain_url)  # type: ignore[no-untyped-call]
    del options["host"]
    if options.pop("connection_class", None) is SSLConnection:
        options["ssl"] = True
    return options


def _address(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError(f"the Sentinel address {text!r} has no host; write host:port")
    return parts.hostname, parts.port or SENTINEL_PORT


def _without_password(url: str) -> str:
    head, at, tail = url.rpartition("@")
    return f"{head.partition('://')[0]}://…@{tail}" if at else url
