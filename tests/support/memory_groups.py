"""Control groups that limit the memory of processes, as a container runtime sets them."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.waiting import until

ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class MemoryGroup:
    """A control group with a limit, of version 1 or 2."""

    folder: Path
    version: int

    def limit(self, megabytes: float) -> None:
        """Set the limit; nothing is swapped."""
        name = "memory.limit_in_bytes" if self.version == 1 else "memory.max"
        (self.folder / name).write_text(str(int(megabytes * 1e6)))

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Processes that this one starts within the block belong to the group, from their start: a
        process that joins later does not bring along the memory that it has."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield
        finally:
            (self.folder.parent / "cgroup.procs").write_text(str(os.getpid()))

    def killed(self) -> int:
        """How many processes the kernel has killed because the memory was used up."""
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        rows = (line.split() for line in (self.folder / name).read_text().splitlines())
        return int(dict(rows)["oom_kill"])

    def remove(self) -> None:
        """Remove the group, whose processes have ended or are about to."""

        def removed() -> bool:
            with contextlib.suppress(OSError):
                self.folder.rmdir()
            return not self.folder.exists()

        until(removed, "the processes of the group end")


def available() -> str:
    """Why this machine allows no memory groups; empty if it does."""
    try:
        with made():
            return ""
    except OSError as e:
        return f"no control group for memory can be made here: {e}"


@contextlib.contextmanager
def made() -> Iterator[MemoryGroup]:
    """A new group below that of this process. Raises `OSError` if that is not allowed."""
    own = dict(line.split(":", 2)[1:] for line in _rows("/proc/self/cgroup"))
    version = 1 if "memory" in own else 2
    parent = ROOT / "memory" / own["memory"][1:] if version == 1 else ROOT / own[""][1:]
    folder = (parent if parent.exists() else ROOT / "memory") / f"afterimage-{secrets.token_hex(4)}"
    folder.mkdir()
    group = MemoryGroup(folder, version)
    try:
        group.killed()
        group.limit(64e3)
        yield group
    finally:
        group.remove()


def _rows(file: str) -> list[str]:
    return [line for line in Path(file).read_text().splitlines() if line.count(":") >= 2]
