"""Settings that API and workers share, from the environment."""

import os
from pathlib import Path

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from models.bitstream import MAX_PIXELS


class WorkerSettings(BaseSettings):
    """Stores, cache folder, limits and threads."""

    model_config = SettingsConfigDict(env_prefix="AFTERIMAGE_", extra="ignore")

    redis_url: str = Field("", validation_alias="REDIS_URL")
    cache_redis_url: str = Field("", validation_alias="CACHE_REDIS_URL")
    prefix: str = "afterimage"
    cache_dir: Path = Path(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    ) / "afterimage"  # fmt: skip
    threads: int = Field(0, ge=0, description="CPU threads of a process; 0: torch's own choice")
    max_pixels: int = Field(MAX_PIXELS, ge=1, description="largest picture, declared or real")
    job_timeout_s: int = Field(3600, ge=1)


def prepare_process(settings: WorkerSettings) -> None:
    """Settings that libraries read from the environment; call it before numba and torch come in.

    Compiled code is kept in our cache folder. OpenMP threads sleep while they wait: API and worker
    share the cores, and threads that spin made an instant decode beside a busy core twice as slow
    (0.88 s, asleep 0.47 s, at 768×512 on two cores).
    """
    os.environ.setdefault("NUMBA_CACHE_DIR", str(settings.cache_dir / "numba"))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
