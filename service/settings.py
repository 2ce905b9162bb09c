"""Settings of the API, from the environment; the stores' settings are the worker's."""

from pathlib import Path

from pydantic import Field, SecretStr

from worker.settings import WorkerSettings


class ServiceSettings(WorkerSettings):
    """Limits on requests, besides what API and workers share."""

    max_bytes: int = Field(32 * 2**20, ge=1, description="largest request body")
    bodies_bytes: int = Field(
        256 * 2**20, ge=1, description="bodies that an API process receives at once; at least one"
    )
    max_megapixel_steps: float = Field(
        2000, gt=0, description="largest job: megapixels times steps; about 1 s each on a core"
    )
    api_keys: Path | None = Field(
        None, description="TOML file of API keys; none: no authentication"
    )
    link_secret: SecretStr | None = Field(
        None, min_length=32, description="signs links; one for all API processes"
    )
    requests_per_minute: int | None = Field(
        None, ge=1, description="of a caller whose key names no limit"
    )
    jobs_at_once: int | None = Field(None, ge=1, description="likewise, jobs that have not ended")
    cors_origins: tuple[str, ...] = Field(
        (), description='JSON list of origins whose pages may call the API; ["*"]: all'
    )
    metrics_host: str = Field("127.0.0.1", description="of its own port; `serve`: that of --host")
    metrics_port: int = Field(0, ge=0, le=65535, description="of /metrics; 0: the API's own port")
    max_backlog_s: float = Field(
        900, gt=0, description="work that may be queued; beyond it new jobs are refused"
    )
    instant_cache_bytes: int = Field(
        64 * 2**20, ge=0, description="picture files that an API process keeps"
    )
    decodes_at_once: int = Field(
        2, ge=1, description="instant decodes in parallel; each uses all threads"
    )
    waiting_line: int = Field(64, ge=0, description="requests that may wait for their decode")
    body_timeout_s: float = Field(60, gt=0, description="longest wait for a request's body")
    request_timeout_s: float = Field(30, gt=0, description="longest wait for an instant picture")
