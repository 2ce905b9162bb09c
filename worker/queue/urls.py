"""Redis URLs: `redis://`, `rediss://`, `unix://`, and with Sentinel `redis+sentinel://` or
`rediss+sentinel://[user:password@]host:port[,host:port…]/service[/db][?options]`.

Options are redis-py's, as `ssl_ca_certs`; `sentinel_username` and `sentinel_password` are those of
the Sentinels, where they have their own.
"""

from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import redis
import redis.asyncio
import redis.asyncio.sentinel
import redis.sentinel
from redis.connection import SSLConnection, parse_url

from models.errors import AfterimageError

SENTINEL_PORT = 26379


class NoRedis(AfterimageError):
    """No Redis server is configured, installed or able to start."""


def client(url: str, **settings: Any) -> redis.Redis:
    """Connections, made lazily; `settings` are redis-py's. Raises `NoRedis` for a wrong URL."""
    try:
        if "+sentinel://" not in url:
            return redis.Redis.from_url(url, **settings)
        hosts, service, options, own = _sentinel(url, settings)
        sentinel = redis.sentinel.Sentinel(hosts, sentinel_kwargs=own)  # type: ignore[no-untyped-call]
        master: redis.Redis = sentinel.master_for(service, **options)  # type: ignore[no-untyped-call]
        return master
    except ValueError as e:
        raise NoRedis(f"{_shown(url)!r} is no Redis URL: {e}") from e


def asynchronous(url: str, **settings: Any) -> redis.asyncio.Redis:
    """As `client`, for an event loop."""
    try:
        if "+sentinel://" not in url:
            return redis.asyncio.Redis.from_url(url, **settings)
        hosts, service, options, own = _sentinel(url, settings)
        sentinel = redis.asyncio.sentinel.Sentinel(hosts, sentinel_kwargs=own)  # type: ignore[no-untyped-call]
        master: redis.asyncio.Redis = sentinel.master_for(service, **options)
        return master
    except ValueError as e:
        raise NoRedis(f"{_shown(url)!r} is no Redis URL: {e}") from e


def close(connected: redis.Redis) -> None:
    """Close the connections of a client, and those to its Sentinels."""
    connected.close()
    manager = getattr(connected.connection_pool, "sentinel_manager", None)
    for sentinel in manager.sentinels if manager else ():
        sentinel.close()


def _sentinel(
    url: str, settings: dict[str, Any]
) -> tuple[list[tuple[str, int]], str, dict[str, Any], dict[str, Any]]:
    """Addresses of the Sentinels, the service, options of its connections and of theirs."""
    scheme, _, rest = url.partition("+sentinel://")
    parts = urlsplit(f"{scheme}://{rest}")
    credentials, _, addresses = parts.netloc.rpartition("@")
    service, _, db = parts.path.strip("/").partition("/")
    if not service or not addresses:
        raise ValueError("it needs redis+sentinel://host:port[,…]/service")
    query = dict(parse_qsl(parts.query))
    own: dict[str, Any] = {
        key.removeprefix("sentinel_"): query.pop(key)
        for key in ("sentinel_username", "sentinel_password")
        if key in query
    }
    plain = f"{scheme}://{credentials}{'@' if credentials else ''}host/{db}?{urlencode(query)}"
    options: dict[str, Any] = {**parse_url(plain), **settings}  # type: ignore[no-untyped-call]
    options.pop("host")
    secure = options.pop("connection_class", None) is SSLConnection
    tls = {key: value for key, value in options.items() if key.startswith("ssl_")}
    if secure:
        options["ssl"] = True
        own |= {"ssl": True, **tls}
    own |= {key: value for key, value in settings.items() if key.startswith("socket_")}
    own["retry"] = None  # the next Sentinel is the other try: by default each has eleven
    return [_address(one) for one in addresses.split(",")], service, options, own


def _address(text: str) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError(f"{text!r} is no host:port")
    return parts.hostname, parts.port or SENTINEL_PORT


def _shown(url: str) -> str:
    """Without the password."""
    head, at, tail = url.rpartition("@")
    return f"{head.partition('://')[0]}://…@{tail}" if at else url
