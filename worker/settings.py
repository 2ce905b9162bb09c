"""Settings that API and workers share, from the environment."""

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from models.geometry import MAX_PIXELS

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST_BLOCK = 32 * 2**20
_KEPT = 2**30


def secrets_dir() -> Path | None:
    """Where a file named like a variable may stand for it: its value is in no environment then."""
    folder = Path(os.environ.get("AFTERIMAGE_SECRETS_DIR", "/run/secrets"))
    return folder if folder.is_dir() else None


class WorkerSettings(BaseSettings):
    """Stores, folders, limits and threads."""

    model_config = SettingsConfigDict(
        env_prefix="AFTERIMAGE_", extra="ignore", secrets_dir=secrets_dir()
    )

    redis_url: str = Field(
        "",
        validation_alias="REDIS_URL",
        description="Redis of the queue; if unset, `serve` starts a private one",
    )
    cache_redis_url: str = Field(
        "",
        validation_alias="CACHE_REDIS_URL",
        description="Redis of the pictures; if unset, the queue's",
    )
    prefix: str = Field("afterimage", description="prefix of all Redis keys except RQ's")
    cache_dir: Path = Field(
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "afterimage",
        description="compiled code, the private Redis, pictures waiting for Redis",
    )
    weights_dir: Path = Field(
        Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share")
        / "afterimage/weights",
        description="imported codec weights; read at start",
    )
    threads: int = Field(0, ge=0, description="CPU threads per process; 0: torch's choice")
    gs_precision: Literal["f32", "bf16"] = Field(
        "f32", description="instant pictures on a CPU; `bf16`: half the time, if supported"
    )
    grace_s: float = Field(30, ge=0, description="seconds that a job may still run after SIGTERM")
    batch: int = Field(
        0, ge=0, le=64, description="pictures of one shape drawn together; 0: 8 on CUDA, else 1"
    )
    nice: int = Field(
        10, ge=0, le=19, description="niceness of workers, so that the API comes first"
    )
    max_pixels: int = Field(
        MAX_PIXELS, ge=1, description="largest picture, by its header and as decoded"
    )
    job_timeout_s: int = Field(3600, ge=1, description="longest run of one job, in seconds")


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Load modules and models in it: no garbage is looked for then, nor later among them.

    A fifth of the time that a process takes to start, and afterwards each full collection (half a
    second, in the middle of requests).
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def prepare_process(settings: WorkerSettings) -> None:
    """Settings that libraries read from the environment; call it before numba and torch come in.

    Code that numba and OpenVINO compiled is kept in our cache folder. OpenMP threads sleep while
    they wait: API and worker share the cores, and threads that spin made an instant decode beside
    a busy core twice as slow (0.88 s, asleep 0.47 s, at 768×512 on two cores). Freed memory stays
    in the process.
    """
    _keep_freed_memory()
    os.environ.setdefault("NUMBA_CACHE_DIR", str(settings.cache_dir / "numba"))
    os.environ["AFTERIMAGE_CACHE_DIR"] = str(settings.cache_dir)
    os.environ["AFTERIMAGE_GS_PRECISION"] = settings.gs_precision
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _keep_freed_memory() -> None:
    """Let glibc reuse freed blocks of up to 32 MiB, its largest such size, up to 1 GiB in all.

    By default it returns most of a network's activations to the system after each layer, and every
    page costs a fault when it comes back: a denoiser step took 0.95 µs a pixel, and takes 0.83.
    Other C libraries have no `mallopt`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)
