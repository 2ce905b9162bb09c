"""The spool: finished pictures that wait on disk because Redis is down."""

import contextlib
import hashlib
import logging
import os
import re
import stat
import struct
import time
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from models import folders
from models.errors import AfterimageError
from models.files import atomic_write
from models.pictures import signatures
from worker.attempt import Attempt, LeaseLost
from worker.queue.jobs import Jobs
from worker.queue.records import DecodeRequest
from worker.queue.results import MAX_METADATA_BYTES, MAX_PIXEL_BYTES
from worker.queue.store import RECORD_TTL_S

log = logging.getLogger(__name__)

_NAME = re.compile(r"([0-9a-f]{32})\.(\d+)\.([0-9a-f]{64})\.png")


class NotSpooled(AfterimageError):
    """A file in the spool is not the picture of its job."""


@dataclass(frozen=True, slots=True)
class Spool:
    """A folder that the workers of a host share; file names are `JOB_ID.FENCE.SHA256.png`."""

    folder: Path

    def save(self, attempt: Attempt, png: bytes) -> Path:
        """Write the picture of an attempt atomically; return the file.

        Raises `OSError`, and `UntrustedFolder` if another user could change the spool.
        """
        folders.private(self.folder)
        digest = hashlib.sha256(png).hexdigest()
        file = self.folder / f"{attempt.id}.{attempt.state.fence}.{digest}.png"
        with atomic_write(file) as part:
            part.write_bytes(png)
        return file

    def commit_all(self, jobs: Jobs, exclude: Container[str] = ()) -> None:
        """Commit the pictures of workers that have exited, and delete the files.

        `exclude` holds the ids of jobs whose pictures this process commits itself. A picture is
        deleted if another attempt has begun, and so is a file that is not the job's picture. Raises
        `RedisError`, and `UntrustedFolder` if another user could change the spool.
        """
        folders.check(self.folder)
        for file, job_id, fence, digest in self._files():
            if job_id in exclude:
                continue
            try:
                state = jobs.record(job_id)
                if state is not None:
                    png = _read(file, digest, state.decode)
                    Attempt(jobs, replace(state, fence=fence)).commit(png)
                    log.info("job %s: committed its spooled picture", job_id)
            except (LeaseLost, NotSpooled, FileNotFoundError) as e:
                log.info("job %s: deleted its spooled picture: %s", job_id, e)
            with contextlib.suppress(OSError):
                file.unlink()

    @staticmethod
    def remove_expired(root: Path) -> None:
        """Delete files older than any job record from the spools in `root`."""
        for file in root.glob("*/*.png"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - file.stat().st_mtime > RECORD_TTL_S:
                    file.unlink()

    def _files(self) -> Iterator[tuple[Path, str, int, str]]:
        """File, job id, fence and SHA-256 of each spooled picture."""
        for file in sorted(self.folder.glob("*.png")):
            if match := _NAME.fullmatch(file.name):
                yield file, match[1], int(match[2]), match[3]


def _read(file: Path, digest: str, decode: DecodeRequest) -> bytes:
    """Read a spooled picture.

    Raises `FileNotFoundError`, and `NotSpooled` unless the file has this SHA-256, is a PNG of the
    decode's size, and only this user and root may change it.
    """
    limit = MAX_PIXEL_BYTES * decode.width * decode.height + MAX_METADATA_BYTES
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise
    except OSError as e:
        raise NotSpooled(f"{file}: {e.strerror}") from e
    with open(descriptor, "rb") as source:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or not folders.is_trusted(status):
            raise NotSpooled(f"{file} is not a file that only this user may change")
        png = source.read(limit + 1)
    size = struct.pack(">4sII", b"IHDR", decode.width, decode.height)
    if len(png) > limit or png[:8] != signatures.PNG or png[12:24] != size:
        raise NotSpooled(f"{file} is not a PNG of {decode.width}×{decode.height} pixels")
    if hashlib.sha256(png).hexdigest() != digest:
        raise NotSpooled(f"{file} was changed or damaged: its SHA-256 is not the one in its name")
    return png
