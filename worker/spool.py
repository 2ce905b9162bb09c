"""Finished pictures that could not be handed over: files, until the stores are back."""

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
    """A folder of this host's workers; a file's name tells the job and the attempt."""

    folder: Path

    def keep(self, attempt: Attempt, png: bytes) -> Path:
        """Write a picture, atomically."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = self.folder / f"{attempt.id}.{attempt.state.fence}.png"
        with atomic_write(file) as part:
            part.write_bytes(png)
        return file

    def hand_over(self, jobs: Jobs, busy: Container[str] = ()) -> None:
        """Commit what processes left that have ended; what came too late is dropped.

        `busy` are jobs that this process still sees to itself. Raises `RedisError`.
        """
        for file, job_id, fence in self._files():
            if job_id in busy:
                continue
            try:
                state = jobs.record(job_id)
                if state is not None:
                    Attempt(jobs, replace(state, fence=fence)).commit(file.read_bytes())
                    log.info("job %s: its picture was kept, and is there now", job_id)
            except (LeaseLost, FileNotFoundError) as e:
                log.info("a kept picture comes too late: %s", e)
            file.unlink(missing_ok=True)

    @staticmethod
    def forget(root: Path) -> None:
        """Remove from the spools in `root` what no record knows any more: their stores are gone."""
        for file in root.glob("*/*.png"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - file.stat().st_mtime > RECORD_TTL_S:
                    file.unlink()

    def _files(self) -> Iterator[tuple[Path, str, int]]:
        for file in sorted(self.folder.glob("*.png")):
            if found := _NAME.fullmatch(file.name):
                yield file, found[1], int(found[2])
