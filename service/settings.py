"""Settings of the API, from the environment; the stores' settings are the worker's."""

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, SecretStr

from service import prefix
from worker.settings import WorkerSettings


class ServiceSettings(WorkerSettings):
    """Limits on requests, besides what API and workers share."""

    max_bytes: int = Field(32 * 2**20, ge=1, description="largest request body, in bytes")
    bodies_bytes: int = Field(
        256 * 2**20,
        ge=1,
        description="memory for uploads per API process; the first 64 KiB of each are free",
    )
    max_megapixel_steps: float = Field(
        2000, gt=0, description="largest job: megapixels × steps, about 1 s each on one core"
    )
    api_keys: Path | None = Field(
        None, description="TOML file of API keys; if unset, no authentication"
    )
    link_secret: SecretStr | None = Field(
        None,
        min_length=32,
        description="signs links: 32 characters or more, the same for all API processes",
    )
    requests_per_minute: int | None = Field(
        None, ge=1, description="quota of callers whose key sets none"
    )
    jobs_at_once: int | None = Field(
        None, ge=1, description="unfinished jobs of callers whose key sets no limit"
    )
    cors_origins: tuple[str, ...] = Field(
        (), description='JSON list of origins whose pages may call the API; `["*"]`: all'
    )
    metrics_host: str = Field(
        "127.0.0.1", description="address of the metrics port; under `serve`: `--host`"
    )
    metrics_port: int = Field(
        0, ge=0, le=65535, description="separate port for `/metrics`; 0: the API's"
    )
    max_backlog_s: float = Field(
        900, gt=0, description="seconds of queued work beyond which jobs are refused (503)"
    )
    instant_cache_bytes: int = Field(
        64 * 2**20, ge=0, description="memory for instant pictures per API process"
    )
    decodes_at_once: int = Field(
        2, ge=1, description="instant decodes in parallel; each uses all threads"
    )
    waiting_line: int = Field(
        64, ge=0, description="requests waiting for an instant decode; more get 503"
    )
    body_timeout_s: float = Field(
        60, gt=0, description="longest wait for a request's body, in seconds"
    )
    request_timeout_s: float = Field(
        30, gt=0, description="longest wait for an instant picture, in seconds"
    )
    keep_alive_s: int = Field(
        75, ge=1, description="seconds until an idle connection is closed; see Behind a proxy"
    )
    root_path: Annotated[str, AfterValidator(prefix.parse)] = Field(
        "", description="path under which a proxy serves the API, like `/after`"
    )
