"""Worker processes beside the API: started, started again, and ended with it."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

WORKER = (sys.executable, "-P", "-m", "worker.main")
"""The worker's command; -P: a folder of the user's called `worker` must not shadow ours."""
COURIER = (sys.executable, "-P", "-m", "worker.webhooks")
"""That of the process which sends webhooks."""
RESTART_S = 1.0, 30.0
"""How long after its death a worker is started again; twice as long each time, up to the second,
while it dies within the second: it cannot start, and trying takes a core."""
LEAVE_S = 30.0
"""How long a process may take to end beyond the grace that its job has."""


@contextlib.contextmanager
def running(commands: Sequence[Sequence[str]], grace_s: float) -> Iterator[None]:
    """Processes beside the API, started again when they die; at the end they finish their jobs, for
    `grace_s` at most."""
    from worker.queue.private_redis import die_with_parent

    threads = max(len(os.sched_getaffinity(0)) // max(commands.count(WORKER), 1), 1)
    environment = {"AFTERIMAGE_THREADS": str(threads), **os.environ}  # they share the cores

    def start(command: Sequence[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, env=environment, start_new_session=True, preexec_fn=die_with_parent
        )

    stopping = threading.Event()
    processes = [start(command) for command in commands]

    def watch(i: int) -> None:
        shortest, longest = RESTART_S
        began, wait = time.monotonic(), shortest
        while not stopping.wait(0.2):
            if processes[i].poll() is None:
                continue
            wait = min(2 * wait, longest) if time.monotonic() - began < longest else shortest
            print(  # noqa: T201
                f"a worker ended with {processes[i].returncode}; starting another", flush=True
            )
            if stopping.wait(wait):
                return
            processes[i], began = start(commands[i]), time.monotonic()

    watchers = [
        threading.Thread(target=watch, args=(i,), daemon=True) for i in range(len(processes))
    ]
    for watcher in watchers:
        watcher.start()
    try:
        yield
    finally:
        stopping.set()
        for process in processes:  # before the watchers end, whose children are told again
            process.terminate()
        for watcher in watchers:
            watcher.join()
        for process in processes:  # what was started meanwhile
            process.terminate()
        deadline = time.monotonic() + grace_s + LEAVE_S
        for process in processes:
            try:
                process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
