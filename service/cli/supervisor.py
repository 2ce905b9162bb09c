"""Child processes of `afterimage serve`: started, restarted when they exit, and stopped."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Self

from service.cli.terminal import say

Command = tuple[str, ...]

WORKER: Command = (sys.executable, "-P", "-m", "worker.main")
"""Command of a worker. -P: do not import a folder `worker` of the current directory."""
WEBHOOK_SENDER: Command = (sys.executable, "-P", "-m", "worker.webhooks")
"""Command of the process that sends webhooks."""
FIRST_DELAY_S, LONGEST_DELAY_S = 1.0, 30.0
"""The first and the longest delay before a restart. The delay doubles each time that a process
exits within `LONGEST_DELAY_S` of its start: a process that cannot start must not occupy a core."""
POLL_S = 0.2
"""Time between two checks whether a process has exited."""
EXIT_S = 30.0
"""How long a process may take to exit, in addition to the grace period of its job."""


class Supervisor:
    """Context manager that runs child processes next to the API.

    It starts them on entry, restarts those that exit, and stops all on exit; their jobs may then
    take `grace_s` to finish. Workers share the cores unless `AFTERIMAGE_THREADS` is set.
    """

    def __init__(self, commands: Sequence[Command], grace_s: float) -> None:
        self._commands = commands
        self._stop_timeout_s = grace_s + EXIT_S
        threads = max(len(os.sched_getaffinity(0)) // max(commands.count(WORKER), 1), 1)
        self._environment = {"AFTERIMAGE_THREADS": str(threads), **os.environ}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._watchers: list[threading.Thread] = []
        self._stopping = threading.Event()

    def __enter__(self) -> Self:
        self._processes = [self._start(command) for command in self._commands]
        self._watchers = [
            threading.Thread(target=self._watch, args=(index,), daemon=True)
            for index in range(len(self._processes))
        ]
        for watcher in self._watchers:
            watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        # send SIGTERM before the watchers end: the kernel sends another one to a child when the
        # thread that started it ends (`die_with_parent`), and a later one would count as a second
        # signal; workers treat two signals in quick succession as one
        self._terminate()
        for watcher in self._watchers:
            watcher.join()
        self._terminate()  # a watcher may have restarted a process in the meantime
        self._wait()

    def _start(self, command: Command) -> subprocess.Popen[bytes]:
        from worker.queue.private_redis import die_with_parent

        return subprocess.Popen(
            command, env=self._environment, start_new_session=True, preexec_fn=die_with_parent
        )

    def _watch(self, index: int) -> None:
        """Restart a process whenever it exits, until the supervisor stops."""
        started, delay = time.monotonic(), FIRST_DELAY_S
        while not self._stopping.wait(POLL_S):
            status = self._processes[index].poll()
            if status is None:
                continue
            early = time.monotonic() - started < LONGEST_DELAY_S
            delay = min(2 * delay, LONGEST_DELAY_S) if early else FIRST_DELAY_S
            module = self._commands[index][-1]
            say(f"{module} exited with status {status}; restarting it in {delay:.0f} s")
            if self._stopping.wait(delay):
                return
            self._processes[index] = self._start(self._commands[index])
            started = time.monotonic()

    def _terminate(self) -> None:
        for process in self._processes:
            process.terminate()

    def _wait(self) -> None:
        """Wait for all processes; kill those that still run after the timeout."""
        deadline = time.monotonic() + self._stop_timeout_s
        for process in self._processes:
            try:
                process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
