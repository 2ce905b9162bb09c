"""Settings from the environment that the API and the workers share, and process set-up."""

import contextlib
import ctypes
import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from models import folders
from models.geometry import MAX_PIXELS

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h
_MMAP_THRESHOLD = 32 * 2**20
_TRIM_THRESHOLD = 2**30
_PREFIX = "AFTERIMAGE_"
_MAY_BE_EMPTY = (_PREFIX, "NUMBA_", "OMP_", "REDIS_URL", "CACHE_REDIS_URL", "WEB_CONCURRENCY")
"""Beginnings of the names of variables that count as unset when they are empty."""
_CACHE_FOLDERS = ("openvino", "queue", "spool", "alive")
"""Folders in `cache_dir`, besides numba's."""


def secrets_dir() -> Path | None:
    """Folder of secret files, each named like the variable that it replaces; None without one."""
    folder = Path(os.environ.get("AFTERIMAGE_SECRETS_DIR") or "/run/secrets")
    return folder if folder.is_dir() else None


class EnvironmentSettings(BaseSettings):
    """Settings from variables and files of secrets.

    White space around a value is no part of it; an empty variable or file counts as unset.
    """

    model_config = SettingsConfigDict(
        env_prefix=_PREFIX,
        env_ignore_empty=True,
        extra="ignore",
        hide_input_in_errors=True,
        secrets_dir=secrets_dir(),
    )

    @model_validator(mode="before")
    @classmethod
    def _stripped(cls, values: dict[str, Any]) -> dict[str, Any]:
        stripped = {n: v.strip() if isinstance(v, str) else v for n, v in values.items()}
        return {name: value for name, value in stripped.items() if value != ""}


def listed(wanted: str) -> WrapValidator:
    """A validator for tuples that reads `a,b` and JSON lists.

    `wanted` describes the items, for the error. Fields also need `NoDecode`; without it, pydantic
    accepts only JSON.
    """

    def validate(value: Any, validate_items: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate_items(_items(value) if isinstance(value, str) else value)
        except ValueError as e:
            raise ValueError(f"give {wanted}, separated by commas or as a JSON list") from e

    return WrapValidator(validate)


def _items(text: str) -> Any:
    if text.lstrip().startswith("["):
        return json.loads(text)
    return [item.strip() for item in text.split(",") if item.strip()]


def faults(error: ValidationError) -> str:
    """One line that names each invalid variable, its value and the reason; no secrets or URLs."""
    lines = []
    for fault in error.errors():
        name = str(fault["loc"][0]).upper() if fault["loc"] else ""
        if name and "REDIS_URL" not in name:
            name = _PREFIX + name
        hidden = not name or "SECRET" in name or "URL" in name
        value = "" if hidden else f" is {fault['input']!r}"
        reason = str(fault.get("ctx", {}).get("error", fault["msg"]))
        lines.append(f"{name}{value}: {reason}" if name else reason)
    return "; ".join(lines)


class WorkerSettings(EnvironmentSettings):
    """Redis URLs, folders, limits and threads."""

    redis_url: str = Field(
        "",
        validation_alias="REDIS_URL",
        description="Redis of the queue; if unset, `serve` starts a private one",
    )
    cache_redis_url: str = Field(
        "",
        validation_alias="CACHE_REDIS_URL",
        description="Redis of the pictures; if unset, `REDIS_URL`, or a second private one",
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
    threads: int = Field(
        0,
        ge=0,
        description="CPU threads per process; 0: all cores, divided by `serve` among its workers",
    )
    gs_precision: Literal["f32", "bf16"] = Field(
        "f32", description="precision of instant decodes on a CPU; `bf16` takes half the time"
    )
    diffusion_precision: Literal["auto", "f32", "bf16"] = Field(
        "auto",
        description="precision of the diffusion network; `auto`: `bf16` on GPUs and on CPUs with "
        "instructions for it, else `f32`",
    )
    grace_s: float = Field(30, ge=0, description="seconds that a job may still run after SIGTERM")
    batch: int = Field(
        0, ge=0, le=64, description="pictures of one shape per batch, at most; 0: 8 on CUDA, else 1"
    )
    nice: int = Field(
        10, ge=0, le=19, description="niceness of workers, so that the API comes first"
    )
    max_pixels: int = Field(
        MAX_PIXELS, ge=1, description="largest picture, in pixels: of a bitstream or of an upload"
    )
    job_timeout_s: int = Field(3600, ge=1, description="longest run of one job, in seconds")
    stores: Path | None = Field(
        None, description="TOML file of object stores; if unset, no `source` and no `target`"
    )
    results: str = Field(
        "",
        description="`store:NAME/PREFIX` where finished pictures are kept longer than in the cache",
    )


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Turn the garbage collector off while modules and models load; never collect them later.

    Start-up takes a fifth less time, and later requests are not held up by full collections of half
    a second each.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def prepare_process(settings: WorkerSettings) -> None:
    """Set the variables that libraries read; call this before numba and torch are imported.

    Code compiled by numba and OpenVINO is cached in `cache_dir`. Waiting OpenMP threads sleep: if
    they spin, an instant decode next to a busy worker takes 0.88 s instead of 0.47 s (768×512, two
    cores). Freed memory stays in the process. Empty variables are unset, for child processes too.
    Raises `UntrustedFolder` if another user could change the cache or the weights.
    """
    _keep_freed_memory()
    _unset_empty_variables()
    os.environ.setdefault("NUMBA_CACHE_DIR", str(settings.cache_dir / "numba"))
    _check_folders(settings)
    os.environ["AFTERIMAGE_CACHE_DIR"] = str(settings.cache_dir)
    os.environ["AFTERIMAGE_GS_PRECISION"] = settings.gs_precision
    os.environ["AFTERIMAGE_DIFFUSION_PRECISION"] = settings.diffusion_precision
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _check_folders(settings: WorkerSettings) -> None:
    """Raise `UntrustedFolder` if another user could change the cache or the weights.

    Numba's folder is created here if possible, so that no other user can create it later: numba
    runs the code that it finds there. A weights folder without a manifest is not read.
    """
    numba = Path(os.environ["NUMBA_CACHE_DIR"])
    with contextlib.suppress(OSError):
        folders.private(numba)
    for folder in (numba, *(settings.cache_dir / name for name in _CACHE_FOLDERS)):
        folders.check(folder)
    if os.path.exists(settings.weights_dir / "manifest.toml"):
        folders.check(settings.weights_dir, recursive=False)


def _unset_empty_variables() -> None:
    """Unset empty variables, which compose files and env files define for missing values.

    Only Afterimage's and those of some libraries are unset: an empty NO_PROXY or
    CUDA_VISIBLE_DEVICES has a meaning.
    """
    for name, value in list(os.environ.items()):
        if not value.strip() and name.startswith(_MAY_BE_EMPTY):
            del os.environ[name]


def _keep_freed_memory() -> None:
    """Make glibc reuse freed blocks of up to 32 MiB, and keep up to 1 GiB of them.

    By default it returns most activations of a network to the system after each layer, and touching
    fresh pages costs time: 0.95 instead of 0.83 µs per pixel and denoiser step. Other C libraries
    have no `mallopt`.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)
