"""Settings of the API, read from the environment; those of the stores are shared with workers."""

from pathlib import Path

from pydantic import Field, SecretStr

from worker.settings import WorkerSettings


class ServiceSettings(WorkerSettings):
    """The API's own settings, in addition to those that it shares with workers."""

    max_bytes: int = Field(32 * 2**20, ge=1, description="largest request body, in bytes")
    bodies_bytes: int = Field(
        256 * 2**20,
        ge=1,
        description="memory of an API process for request bodies; at least one body is accepted",
    )
    max_megapixel_steps: float = Field(
        2000, gt=0, description="largest job: megapixels times steps; about 1 s each on a core"
    )
    api_keys: Path | None = Field(
        None, description="TOML file of API keys; without it, no authentication"
    )
    link_secret: SecretStr | None = Field(
        None, min_length=32, description="signs links; the same for all API processes"
    )
    requests_per_minute: int | None = Field(
        None, ge=1, description="limit of callers whose key sets none"
    )
    jobs_at_once: int | None = Field(
        None, ge=1, description="unfinished jobs, likewise of callers whose key sets no limit"
    )
    cors_origins: tuple[str, ...] = Field(
        (), description='JSON list of origins whose pages may call the API; ["*"] allows all'
    )
    metrics_host: str = Field(
        "127.0.0.1", description="address of the metrics port; with `serve`, that of --host"
    )
    metrics_port: int = Field(
        0, ge=0, le=65535, description="separate port of /metrics; 0: the API's port"
    )
    max_backlog_s: float = Field(
        900, gt=0, description="seconds of queued work above which new jobs are refused"
    )
    instant_cache_bytes: int = Field(
        64 * 2**20, ge=0, description="picture files cached in the memory of an API process"
    )
    decodes_at_once: int = Field(
        2, ge=1, description="instant decodes in parallel; each uses all threads"
    )
    waiting_line: int = Field(64, ge=0, description="requests that may wait for a decoder thread")
    body_timeout_s: float = Field(60, gt=0, description="longest wait for a request's body")
    request_timeout_s: float = Field(30, gt=0, description="longest wait for an instant picture")
