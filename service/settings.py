"""Settings of the API, from the environment; the stores' settings are the worker's."""

from pydantic import Field

from worker.settings import WorkerSettings


class ServiceSettings(WorkerSettings):
    """Limits on requests, besides what API and workers share."""

    max_bytes: int = Field(32 * 2**20, ge=1, description="largest request body")
    max_megapixel_steps: float = Field(
        4000, gt=0, description="largest job: megapixels times steps; about 0.6 s each on 2 cores"
    )
    max_backlog_s: float = Field(
        900, gt=0, description="work that may be queued; beyond it new jobs are refused"
    )
    decodes_at_once: int = Field(
        2, ge=1, description="instant decodes in parallel; each uses all threads"
    )
    waiting_line: int = Field(64, ge=0, description="requests that may wait for their decode")
    request_timeout_s: float = Field(30, gt=0, description="longest wait for an instant picture")
