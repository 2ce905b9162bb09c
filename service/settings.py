"""Settings of the API, read from the environment."""

import os
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, SecretStr, model_validator
from pydantic_settings import NoDecode

from service import prefix
from worker.settings import WorkerSettings, listed

ORIGIN = r"^(\*|null|[a-z][a-z0-9+.-]*://[^/,\s]+)$"
"""Values of the header `Origin`, which have no path and no slash at the end, or `*` for all."""

HOST = r"^(\*|(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*)$"
"""A host name, `*.` and a domain, or `*`."""


class ServiceSettings(WorkerSettings):
    """Settings of the API, in addition to those that it shares with the workers."""

    max_bytes: int = Field(32 * 2**20, ge=1, description="largest request body, in bytes")
    bodies_bytes: int = Field(
        256 * 2**20,
        ge=1,
        description="memory for uploads per API process; the first 64 KiB of each do not count",
    )
    max_megapixel_steps: float = Field(
        1500,
        gt=0,
        description="largest job: megapixels × calls of the network, 2 s each on one core",
    )
    api_keys: Path | None = Field(
        None, description="TOML file of API keys; if unset, no authentication"
    )
    private: bool = Field(
        False,
        description="1: a decode is shown only to callers that submitted it; needs API keys",
    )
    link_secret: SecretStr | None = Field(
        None,
        min_length=32,
        description="secret that signs links, 32 characters or more; the same for all processes",
    )
    requests_per_minute: int | None = Field(
        None, ge=1, description="requests per minute of a caller whose key sets no limit"
    )
    jobs_at_once: int | None = Field(
        None, ge=1, description="unfinished jobs of a caller whose key sets no limit"
    )
    cors_origins: Annotated[
        tuple[Annotated[str, Field(pattern=ORIGIN)], ...],
        NoDecode,
        listed("origins such as https://a.example, without a path, or *"),
    ] = Field((), description="origins whose pages may call the API, with commas; `*`: all")
    hosts: Annotated[
        tuple[Annotated[str, Field(pattern=HOST)], ...],
        NoDecode,
        listed("host names such as decode.example.com, *.example.com, without a port, or *"),
    ] = Field(
        (),
        description="names of the API in URLs, with commas; `*`: any; see Host names",
    )
    metrics_host: str = Field(
        "127.0.0.1", description="address of the metrics port; under `serve`, default: `--host`"
    )
    metrics_port: int = Field(
        0, ge=0, le=65535, description="separate port for `/metrics`; 0: the port of the API"
    )
    max_backlog_s: float = Field(
        900,
        gt=0,
        description="seconds for which a new job may have to wait; beyond, it is refused (503)",
    )
    instant_cache_bytes: int = Field(
        64 * 2**20, ge=0, description="memory for instant pictures per API process"
    )
    pixels_at_once: int = Field(
        40_000_000,
        ge=1,
        description="pixels that an API process decodes and encodes at a time",
    )
    decodes_at_once: int = Field(
        2, ge=1, description="instant decodes in parallel; each uses all threads"
    )
    waiting_line: int = Field(
        64, ge=0, description="requests waiting for a decode, and for an encode; more get 503"
    )
    encodes_at_once: int = Field(
        2,
        ge=1,
        description="encodes in parallel, each with a process that reads the photograph",
    )
    encode_megapixel_s: float = Field(
        5,
        ge=0,
        description="seconds per megapixel, added to the request timeout of an encode",
    )
    picture_cpu_s: float = Field(
        10, gt=0, description="CPU seconds that reading a photograph may take; more gets 422"
    )
    body_timeout_s: float = Field(
        60, gt=0, description="longest wait for a request's body, in seconds"
    )
    request_timeout_s: float = Field(
        30,
        gt=0,
        description="longest wait for an instant picture, or a stage of an encode, in seconds",
    )
    header_timeout_s: float = Field(
        10, gt=0, description="longest wait for the headers of a request, in seconds"
    )
    connections: int = Field(
        4096, ge=1, description="connections per API process; more get 503; see Connections"
    )
    connections_per_address: int = Field(
        256, ge=1, description="connections of one client address, or /64 of IPv6; more get 429"
    )
    waits_at_once: int = Field(
        64, ge=1, description="event streams and waiting requests of one caller per API process"
    )
    keep_alive_s: int = Field(
        75, ge=1, description="seconds until an idle connection is closed; see Behind a proxy"
    )
    root_path: Annotated[str, AfterValidator(prefix.parse)] = Field(
        "", description="path under which a proxy serves the API, like `/after`"
    )

    @model_validator(mode="before")
    @classmethod
    def _keys_are_not_empty(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Refuse an empty variable or file: treated as unset, it would open the service to all."""
        empty = any(k.upper() == "AFTERIMAGE_API_KEYS" and not v for k, v in os.environ.items())
        keys = values.get("api_keys", "" if empty else None)
        if isinstance(keys, str) and not keys.strip():
            raise ValueError(
                "AFTERIMAGE_API_KEYS is empty; name the file of API keys, or unset the variable to "
                "run without keys"
            )
        return values

    @model_validator(mode="after")
    def _private_has_keys(self) -> Self:
        """Refuse a private service without keys: an address does not identify a caller."""
        if self.private and self.api_keys is None:
            raise ValueError(
                "AFTERIMAGE_PRIVATE is set, but AFTERIMAGE_API_KEYS is not; name the file of API "
                "keys, or unset AFTERIMAGE_PRIVATE"
            )
        return self
