"""The spool: finished pictures that wait on disk because Redis is down."""

import contextlib
import logging
import re
import time
from collections.abc import Container, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from models.files import atomic_write
from worker.attempt import Attempt, LeaseLost
from worker.queue.jobs import Jobs
from worker.queue.store import RECORD_TTL_S

log = logging.getLogger(__name__)

_NAME = re.compile(r"([0-9a-f]{32})\.(\d+)\.png")


@dataclass(frozen=True, slots=True)
class Spool:
    """A folder that the workers of a host share; file names are `JOB_ID.FENCE.png`."""

    folder: Path

    def save(self, attempt: Attempt, png: bytes) -> Path:
        """Write the picture of an attempt atomically; return the file."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = self.folder / f"{attempt.id}.{attempt.state.fence}.png"
        with atomic_write(file) as part:
            part.write_bytes(png)
        return file

    def commit_all(self, jobs: Jobs, exclude: Container[str] = ()) -> None:
        """Commit the pictures of workers that have exited, and delete the files.

        `exclude` holds the ids of jobs whose pictures this process commits itself. If another
        attempt has begun, the picture is deleted. Raises `RedisError`.
        """
        for file, job_id, fence in self._files():
            if job_id in exclude:
                continue
            try:
                state = jobs.record(job_id)
                if state is not None:
                    Attempt(jobs, replace(state, fence=fence)).commit(file.read_bytes())
                    log.info("job %s: committed its spooled picture", job_id)
            except (LeaseLost, FileNotFoundError) as e:
                log.info("job %s: deleted its spooled picture: %s", job_id, e)
            file.unlink(missing_ok=True)

    @staticmethod
    def remove_expired(root: Path) -> None:
        """Delete files older than any job record from the spools in `root`."""
        for file in root.glob("*/*.png"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - file.stat().st_mtime > RECORD_TTL_S:
                    file.unlink()

    def _files(self) -> Iterator[tuple[Path, str, int]]:
        """File, job id and fence of each spooled picture."""
        for file in sorted(self.folder.glob("*.png")):
            if match := _NAME.fullmatch(file.name):
                yield file, match[1], int(match[2])
