"""Settings of the API, from the environment; the stores' settings are the worker's."""

from pydantic import Field

from worker.settings import WorkerSettings


class ServiceSettings(WorkerSettings):
    """Limits on requests, besides what API and workers share."""

    max_bytes: int = Field(32 * 2**20, ge=1, description="largest request body")
    max_megapixel_steps: float = Field(
        4000, gt=0, description="largest job: megapixels times steps; about 0.6 s each on 2 cores"
    )
    decodes_at_once: int = Field(
        1, ge=1, description="instant decodes in parallel; each uses all threads"
    )
