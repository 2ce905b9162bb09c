"""Mutated bitstreams through `parse` and `Codec.latents`: make fuzz N=1000000 SEED=0

Works in child processes, so that a crash or a hang is a figure too. One in `FRESH` evaluates `h_s`
as the service does, helper process included; the others remember what it gave for the same z, which
no mutation of y changes. Exits 1 on a crash, a hang, an unexpected error, memory that grows, a
wrong decode of `.msh`, a stream of CompressAI's format that does not encode to the same bytes, or
more such streams that pass than the format can help.

It has no checksum. Far from the mean symbols have the least frequency, 1 in 65536: where one of
them lies bare in the stream, one flipped bit makes it its neighbour, the coder stays in step, and
an encoder would have written the same bytes. Of all flips in y of twelve 96×96 cuts of photographs
3, 8 and 13 in 10,000 pass at qualities 1, 2 and 3; of rewritten bytes a tenth as many; in z none.
"""

import argparse
import collections
import contextlib
import mmap
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import mutate

from models import image
from models.codec import bitstream, rans, recovery, zoo
from models.codec.codec import Codec
from models.codec.hyperprior import LatentCoder
from models.errors import BitstreamError, ChecksumMismatch, PictureTooLarge, WrongWeights
from models.library import Library
from worker.settings import WorkerSettings, prepare_process

PHOTO = Path(__file__).parents[1] / "data/kodim23.png"
FRESH = 50
PART = 20_000
"""Inputs for one child process."""
HANG_S = 60.0
"""A child that is silent for longer hangs: an input of full size takes about 1 s, but the helper's
start 20 s on a machine that is busy otherwise."""
GROWTH_MIB = 128
"""More memory than this, between a half of a child's inputs and its last, is a leak. It is for the
1,000 inputs of full size: glibc finds its arenas among them (1,201 MiB at the first, 1,413 from the
700th on). Small inputs stay at 990 MiB from the first to the 60,000th."""
LIMITS = {"one bit": 2e-3, "one byte": 5e-4}
"""Share of mutants of CompressAI's format that may pass; 8e-4 and 1e-4 are usual at quality 3."""
TOLERATED = 3
"""As many may pass in runs that are too short for shares."""

STAGES = (
    "header", "checksum", "weights", "z string", "y string", "symbols' checksum",
    "accepted, same symbols", "accepted, other symbols",
    "unexpected error", "not canonical",
)  # fmt: skip
COLUMNS = (".msh", ".msh, recomputed", "CompressAI")


class Remembered(LatentCoder):
    """Remembers `h_s` for the seeds' z, and how far the last decode came."""

    def __init__(self, own: LatentCoder) -> None:
        super().__init__(own.net, own.z_tables, own.y_tables, own.medians, own.scale_table)
        self.priors: dict[tuple[bytes, str], tuple[rans.Int32Array, Tensor]] = {}
        self.recovered: dict[bytes, list[tuple[str, rans.Int32Array, Tensor]]] = {}
        self.known: set[bytes] = set()
        self.fresh = True
        self.z_symbols: rans.Int32Array | None = None

    def _prior(self, z_symbols: rans.Int32Array, profile: str) -> tuple[rans.Int32Array, Tensor]:
        self.z_symbols = z_symbols
        key = z_symbols.tobytes()
        if self.fresh or key not in self.known:
            return super()._prior(z_symbols, profile)
        if (key, profile) not in self.priors:
            self.priors[key, profile] = super()._prior(z_symbols, profile)
        return self.priors[key, profile]

    def _priors(self, z_symbols: rans.Int32Array) -> Iterator[tuple[str, rans.Int32Array, Tensor]]:
        key = z_symbols.tobytes()
        if self.fresh or key not in self.known:
            yield from super()._priors(z_symbols)
            return
        if key not in self.recovered:
            self.recovered[key] = list(super()._priors(z_symbols))
        yield from self.recovered[key]


class Shared:
    """What a child leaves for its parent, whatever becomes of it.

    `counts` (classes, columns, stages); `changed` (classes,) is the largest number of symbols that
    differ in a stream of CompressAI's format that passed.
    """

    def __init__(self) -> None:
        kinds, columns, stages = len(mutate.CLASSES), len(COLUMNS), len(STAGES)
        self._memory = mmap.mmap(-1, 8 * (kinds * columns * stages + kinds + 3))
        every = np.frombuffer(self._memory, np.int64)
        self._state, self.changed = every[:3], every[3 : 3 + kinds]
        self.counts = every[3 + kinds :].reshape(kinds, columns, stages)

    @property
    def at(self) -> int:
        """The input that a child is working on."""
        return int(self._state[0])

    @at.setter
    def at(self, index: int) -> None:
        self._state[0] = index

    @property
    def growth(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Bytes that a child and its helper grew by, at most."""
        return self._state[1:]


def judge(codecs: Library, m: mutate.Mutant, fresh: bool) -> tuple[str, int]:
    """Which of `STAGES` ends a mutant's way, and how many symbols differ from its seed's."""
    try:
        b = bitstream.parse(m.data)
    except ChecksumMismatch:
        return "checksum", 0
    except (BitstreamError, PictureTooLarge):
        return "header", 0
    try:
        own = codecs.codec(b)
        hyperprior = own.latent_coder
        assert isinstance(hyperprior, Remembered)
        hyperprior.fresh, hyperprior.z_symbols = fresh, None
        latents = own.latents(b)
    except WrongWeights:
        return "weights", 0
    except ChecksumMismatch:
        return "symbols' checksum", 0
    except BitstreamError:
        return ("z string" if hyperprior.z_symbols is None else "y string"), 0
    if b.format == "compressai" and not canonical(own, b, hyperprior, latents.arithmetic):
        return "not canonical", 0
    if latents.symbols.shape != m.seed.symbols.shape:
        return "accepted, other symbols", latents.symbols.size
    different = int(np.count_nonzero(latents.symbols != m.seed.symbols))
    return f"accepted, {'other' if different else 'same'} symbols", different


def canonical(own: Codec, b: bitstream.Bitstream, h: Remembered, arithmetic: str) -> bool:
    """Whether what was decoded encodes to the bytes that it came from."""
    z_symbols = h.z_symbols
    assert z_symbols is not None
    indexes = (
        h._prior(z_symbols, arithmetic)[0]
        if arithmetic == "float"
        else next(i for name, i, _ in h._priors(z_symbols) if name == arithmetic)
    )
    symbols = rans.decode(b.y_string, indexes, h.y_tables)
    channels = np.broadcast_to(np.arange(len(z_symbols))[:, None, None], z_symbols.shape)
    return (
        rans.encode(symbols, indexes, h.y_tables) == b.y_string
        and rans.encode(z_symbols, channels, h.z_tables) == b.z_string
    )


class Fuzzer:
    """Inputs by number: the same seed and number give the same input."""

    def __init__(self, codecs: dict[int, Codec], seeds: list[mutate.Seed], seed: int) -> None:
        own = {q: replace(c, latent_coder=Remembered(c.latent_coder)) for q, c in codecs.items()}
        self.library = Library({(q, "mse"): c for q, c in own.items()}, None)
        self.seeds, self.seed = seeds, seed
        self.small = seeds[0].symbols.size < 10**5
        for s in seeds if self.small else ():
            h = own[s.parsed.quality].latent_coder
            assert isinstance(h, Remembered)
            own[s.parsed.quality].latents(s.parsed)
            assert h.z_symbols is not None
            h.known.add(h.z_symbols.tobytes())

    def mutant(self, i: int) -> mutate.Mutant:
        """Input number `i`."""
        return mutate.mutant(random.Random(f"{self.seed}/{self.small}/{i}"), self.seeds)

    def work(self, shared: Shared, start: int, stop: int, failures: Path) -> None:
        """Inputs `start` to `stop`, in a child process."""
        first = 0, 0
        for i in range(start, stop):
            shared.at = i
            m = self.mutant(i)
            try:
                stage, changed = judge(self.library, m, not self.small or i % FRESH == 0)
            except Exception as e:
                stage, changed = "unexpected error", 0
                print(f"input {i}: {e!r}", file=sys.stderr)  # noqa: T201
            column = 2 if m.seed.parsed.format == "compressai" else int(m.recomputed)
            kind = mutate.CLASSES.index(m.kind)
            shared.counts[kind, column, STAGES.index(stage)] += 1
            if column == 2:
                shared.changed[kind] = max(shared.changed[kind], changed)
            if i == start + (stop - start) // 2:
                first = _memory()
            if stage in STAGES[-2:] or (column < 2 and changed):
                keep(failures, m, i, stage)
        if stop - start >= 1000:  # fewer say nothing about leaks
            now = _memory()
            shared.growth[:] = np.maximum(shared.growth, [now[0] - first[0], now[1] - first[1]])


def keep(failures: Path, m: mutate.Mutant, i: int, what: str) -> None:
    """A remarkable input and the file that it was made of."""
    failures.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "-" for c in what)
    (failures / f"{i}-{m.kind.replace(' ', '-')}-{name}.bin").write_bytes(m.data)
    (failures / f"{i}-seed.bin").write_bytes(m.seed.data)


def run(
    fuzzer: Fuzzer, shared: Shared, inputs: int, failures: Path, deadline: float
) -> collections.Counter[str]:
    """Inputs in children until the deadline; what became of children that did not end well."""
    lost: collections.Counter[str] = collections.Counter()
    start = 0
    while start < inputs and time.monotonic() < deadline:
        stop = min(start + PART, inputs)
        shared.at = start
        child = os.fork()
        if not child:
            with contextlib.suppress(BaseException):
                fuzzer.work(shared, start, stop, failures)
                os._exit(0)
            os._exit(1)
        what = _watch(child, shared)
        if what:
            lost[what] += 1
            keep(failures, fuzzer.mutant(shared.at), shared.at, what)
            stop = shared.at + 1
        start = stop
        print(f"{start} of {inputs}", file=sys.stderr, flush=True)  # noqa: T201
    return lost


def _watch(child: int, shared: Shared) -> str:
    """Wait for a child: "crash", "hang", or nothing where it ended well."""
    at, since = shared.at, time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "crash" if status else ""
        if shared.at != at:
            at, since = shared.at, time.monotonic()
        if time.monotonic() - since > HANG_S:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "hang"
        time.sleep(0.05)


def _memory() -> tuple[int, int]:
    """Resident bytes of this process and of its helper."""
    return _resident(os.getpid()), _resident(recovery.PROCESS.pid)


def _resident(pid: int | None) -> int:
    if pid is None:
        return 0
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def report(shared: Shared, lost: collections.Counter[str]) -> tuple[str, bool]:
    """The table, and whether all is well."""
    c = shared.counts
    total, stage = int(c.sum()), dict(zip(STAGES, c.sum(0).T, strict=True))
    lines = [f"{'':26}" + "".join(f"{name:>18}" for name in COLUMNS)]
    lines += [f"{name:26}" + "".join(f"{n:18}" for n in row) for name, row in stage.items()]
    lines.append(f"{'all':26}" + "".join(f"{n:18}" for n in c.sum((0, 2))))
    lines.append(f"past the header: {100 - 100 * stage['header'].sum() / total:.1f} %")
    other = c[:, 2, STAGES.index("accepted, other symbols")]
    passed = {
        k: (int(n), int(of)) for k, n, of in zip(mutate.CLASSES, other, c[:, 2].sum(1), strict=True)
    }
    lines.append("CompressAI's format, accepted with other symbols (what it cannot tell):")
    lines += [
        f"  {name:15}{n:8} of {of:8}, {most} symbols differ at most"
        for (name, (n, of)), most in zip(passed.items(), shared.changed, strict=True)
    ]
    growth = [int(n) >> 20 for n in shared.growth]
    lines.append(f"memory grew by {growth[0]} MiB, the helper's by {growth[1]} MiB, at most")
    lines.append(f"crashes: {lost['crash']}, hangs: {lost['hang']}")
    wrong = int(stage["accepted, other symbols"][:2].sum())
    lines.append(f".msh decoded to other symbols: {wrong}")
    too_many = any(
        n > max(TOLERATED, LIMITS[k] * of) for k, (n, of) in passed.items() if k in LIMITS
    )
    well = (
        not lost.total()
        and not wrong
        and not stage["unexpected error"].sum()
        and not stage["not canonical"].sum()
        and not too_many
        and max(growth) <= GROWTH_MIB
    )
    return "\n".join(lines), well


def main() -> int:
    """Fuzz, print, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full-size", type=int, help="inputs of 768×512; else a thousandth")
    parser.add_argument("--cuts", type=int, default=12, help="pictures to mutate streams of")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no new part after")
    parser.add_argument("--failures", type=Path, default=Path("runs/fuzz"))
    options = parser.parse_args()
    large = options.inputs // 1000 if options.full_size is None else options.full_size
    torch.set_num_threads(1)  # a process whose OpenMP threads run cannot be forked
    codecs = {q: zoo.load(q) for q in zoo.QUALITIES}
    photo = image.read(PHOTO.read_bytes(), 10**6)
    shared, lost = Shared(), collections.Counter[str]()
    began = time.monotonic()
    done = []
    for inputs, cuts, sides in ((large, 3, (768, 768)), (options.inputs, options.cuts, (40, 128))):
        if inputs:
            seeds = mutate.seeds(list(codecs.values()), photo, cuts, sides)
            fuzzer = Fuzzer(codecs, seeds, options.seed)
            lost += run(fuzzer, shared, inputs, options.failures, began + 60 * options.minutes)
        done.append(int(shared.counts.sum()))
    seconds = time.monotonic() - began
    table, well = report(shared, lost)
    print(f"{done[0]} inputs of 768×512, {done[1] - done[0]} of at most 128×128; ", end="")  # noqa: T201
    print(f"seed {options.seed}; {seconds:.0f} s\n{table}")  # noqa: T201
    return 0 if well else 1


if __name__ == "__main__":
    prepare_process(WorkerSettings())
    sys.exit(main())
