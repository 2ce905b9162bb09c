"""Settings of the API, from the environment; the stores' settings are the worker's."""

from pydantic import Field

from models.bitstream import MAX_PIXELS
from worker.settings import WorkerSettings


class ServiceSettings(WorkerSettings):
    """Limits, besides what API and workers share."""

    max_bytes: int = Field(32 * 2**20, ge=1, description="largest request body")
    max_pixels: int = Field(MAX_PIXELS, ge=1, description="largest picture, declared or real")
    decodes_at_once: int = Field(0, ge=0, description="instant decodes in parallel; 0: all cores")
