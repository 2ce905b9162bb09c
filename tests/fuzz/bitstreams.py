"""Fuzz `bitstream.parse` and `Codec.latents` with mutated bitstreams: make fuzz N=1000000 SEED=0

Inputs run in child processes, so that crashes and hangs are counted too. One input in `FRESH`
computes `h_s` as the service does, including the recovery process; the others use cached results
for the same z, which mutations of y do not change. Of inputs for models that are not shipped, one
in `FRESH` is tried with other arithmetics.

Exits with 1 on a crash, a hang, an unexpected error, growing memory, an `.msh` file that decodes to
wrong symbols, a bitstream in CompressAI's format whose symbols do not encode to the same bytes, or
too many mutated bitstreams accepted in that format.

CompressAI's format has no checksum, so some mutations cannot be detected. Symbols far from the mean
have the lowest frequency, 1 in 65536; a flipped bit can turn one into its neighbour, which gives a
valid bitstream. With twelve 96×96 crops of photographs, 3, 8 and 13 of 10,000 flipped bits in y are
accepted at qualities 1, 2 and 3, a tenth of that for changed bytes, and none in z.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from models import geometry, image
from models.checkpoint import Entry
from models.codec import bitstream, rans, recovery, zoo
from models.codec.architectures import ARCHITECTURES, DEFAULT
from models.codec.autoregressive import ContextCoder
from models.codec.catalogue import Installed
from models.codec.codec import Codec
from models.codec.hyperprior import FactorizedCoder, LatentCoder
from models.errors import BitstreamError, ChecksumMismatch, PictureTooLarge, WrongWeights
from models.library import Library
from tests.fuzz import mutate
from tests.support import zoo as nets
from worker.settings import WorkerSettings, prepare_process

PHOTO = Path(__file__).parents[1] / "data/kodim23.png"
FRESH = 50
"""One input in so many computes `h_s` instead of using cached results."""
OTHERS = 20
"""One input in so many is added for the models that are not shipped, whose networks are small."""
PART = 20_000
"""Inputs per child process."""
HANG_S = 60.0
"""Longest time for one input before its child counts as hanging. An input of full size takes about
1 s, but on a busy machine the recovery process takes 20 s to start."""
GROWTH_MIB = 128
"""Largest growth of memory between the middle of a child's inputs and its last; more is a leak.
Inputs of full size need it: glibc's arenas grow from 1,201 MiB at the first input to 1,413 at the
700th, and stay. Small inputs stay at 990 MiB from the first to the 60,000th."""
LIMITS = {"one bit": 2e-3, "one byte": 5e-4}
"""Limit on the share of accepted mutants in CompressAI's format; usual are 8e-4 and 1e-4."""
LIMITS_OF_OTHERS = {"one bit": 5e-2, "one byte": 1e-2}
"""The same for models that are not shipped. Their weights are random, so that many symbols are rare
and more mutants are valid bitstreams: usual are 3e-4 to 3.5e-2 and 0 to 4.5e-3, by model."""
TOLERATED = 3
"""Accepted mutants that are always allowed, for runs that are too short for a share."""

STAGES = (
    "header", "checksum", "weights", "z string", "y string", "symbols' checksum",
    "accepted, same symbols", "accepted, other symbols",
    "unexpected error", "not canonical",
)  # fmt: skip
COLUMNS = (".msh", ".msh, recomputed", "CompressAI")


class CachingCoder(LatentCoder):
    """Caches results of `h_s` for the z of the seeds, and keeps the last decode's z symbols."""

    def __init__(self, coder: LatentCoder) -> None:
        tables = coder.z_tables, coder.y_tables
        super().__init__(coder.net, *tables, coder.medians, coder.scale_table)
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

    def _recovery_priors(
        self, z_symbols: rans.Int32Array
    ) -> Iterator[tuple[str, rans.Int32Array, Tensor]]:
        key = z_symbols.tobytes()
        if self.fresh or key not in self.known:
            yield from super()._recovery_priors(z_symbols)
            return
        if key not in self.recovered:
            self.recovered[key] = list(super()._recovery_priors(z_symbols))
        yield from self.recovered[key]


class OtherModels(zoo.Imports):
    """Codecs of the other models, as if they were imported."""

    def __init__(self, codecs: Sequence[Codec]) -> None:
        self.codecs = {
            Installed(
                Entry("codec", "", "", "", c.weights_id, c.quality, c.metric, model=c.model), Path()
            ): c
            for c in codecs
        }
        super().__init__(list(self.codecs))

    def load(self, row: Installed) -> Codec:
        """Return the codec of one of the rows."""
        return self.codecs[row]


def other_codecs(names: Sequence[str]) -> list[Codec]:
    """Small codecs of these models, with random weights."""
    return [zoo.from_tensors(zoo.with_tables(nets.random(name)), 1, model=name) for name in names]


def caching_coder(codec: Codec) -> CachingCoder:
    """The coder of a codec that the fuzzer runs."""
    assert isinstance(codec.latent_coder, CachingCoder)
    return codec.latent_coder


class Shared:
    """Memory that a child shares with its parent, so that counts survive a crash.

    `counts` (classes, columns, stages) counts inputs; `changed` (classes,) is the largest number of
    symbols that differ in an accepted bitstream of CompressAI's format.
    """

    def __init__(self) -> None:
        kinds, columns, stages = len(mutate.CLASSES), len(COLUMNS), len(STAGES)
        self._memory = mmap.mmap(-1, 8 * (kinds * columns * stages + kinds + 3))
        array = np.frombuffer(self._memory, np.int64)
        self._state, self.changed = array[:3], array[3 : 3 + kinds]
        self.counts = array[3 + kinds :].reshape(kinds, columns, stages)

    @property
    def at(self) -> int:
        """Index of the input that a child is working on."""
        return int(self._state[0])

    @at.setter
    def at(self, index: int) -> None:
        self._state[0] = index

    @property
    def growth(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Largest growth, in bytes, of a child and of its recovery process."""
        return self._state[1:]


def judge(codecs: Library, m: mutate.Mutant, fresh: bool) -> tuple[str, int]:
    """Decode a mutant; return the one of `STAGES` that it reached, and how many symbols differ."""
    try:
        b = bitstream.parse(m.data)
    except ChecksumMismatch:
        return "checksum", 0
    except (BitstreamError, PictureTooLarge):
        return "header", 0
    try:
        codec = codecs.codec(b)
        coder = codec.latent_coder
        if isinstance(coder, CachingCoder):
            coder.fresh, coder.z_symbols = fresh, None
            latents = codec.latents(b)
        else:
            with patch.object(recovery, "ARITHMETICS", recovery.ARITHMETICS if fresh else ()):
                latents = codec.latents(b)
    except WrongWeights:
        return "weights", 0
    except ChecksumMismatch:
        return "symbols' checksum", 0
    except BitstreamError:
        if isinstance(coder, CachingCoder):
            return ("z string" if coder.z_symbols is None else "y string"), 0
        fits = coder.fits(b.y_string, b.z_string, geometry.padded(b.height, b.width))
        return ("y string" if fits or not b.z_string else "z string"), 0
    if b.format == "compressai" and not encodes_again(b, coder, latents.arithmetic):
        return "not canonical", 0
    if latents.symbols.shape != m.seed.symbols.shape:
        return "accepted, other symbols", latents.symbols.size
    different = int(np.count_nonzero(latents.symbols != m.seed.symbols))
    return f"accepted, {'other' if different else 'same'} symbols", different


def canonical(b: bitstream.Bitstream, coder: CachingCoder, arithmetic: str) -> bool:
    """Check that the decoded symbols encode to the same bytes."""
    z_symbols = coder.z_symbols
    assert z_symbols is not None
    indexes = (
        coder._prior(z_symbols, arithmetic)[0]
        if arithmetic == "float"
        else next(i for name, i, _ in coder._recovery_priors(z_symbols) if name == arithmetic)
    )
    symbols = rans.decode(b.y_string, indexes, coder.y_tables)
    channels = np.broadcast_to(np.arange(len(z_symbols))[:, None, None], z_symbols.shape)
    return (
        rans.encode(symbols, indexes, coder.y_tables) == b.y_string
        and rans.encode(z_symbols, channels, coder.z_tables) == b.z_string
    )


def encodes_again(b: bitstream.Bitstream, coder: LatentCoder, arithmetic: str) -> bool:
    """Check that the decoded symbols of any model encode to the same bytes."""
    if isinstance(coder, CachingCoder):
        return canonical(b, coder, arithmetic)
    return canonical_other(b, coder, arithmetic)


def canonical_other(b: bitstream.Bitstream, coder: LatentCoder, arithmetic: str) -> bool:
    """Check that the symbols of another model encode to the same bytes."""
    size = geometry.padded(b.height, b.width)
    if isinstance(coder, FactorizedCoder):
        symbols = coder.decode(b.y_string, b"", size, "float").symbols
        channels = np.broadcast_to(np.arange(len(symbols))[:, None, None], symbols.shape)
        return rans.encode(symbols, channels, coder.y_tables) == b.y_string
    z_symbols = coder.decode_z(b.z_string, size)
    channels = np.broadcast_to(np.arange(len(z_symbols))[:, None, None], z_symbols.shape)
    if rans.encode(z_symbols, channels, coder.z_tables) != b.z_string:
        return False
    if arithmetic != "float":  # decoded by the recovery process
        return True
    with torch.inference_mode():
        if isinstance(coder, ContextCoder):
            features = coder.net.h_s(coder._z_hat(z_symbols))
            p = coder.context.decode(b.y_string, features, coder.y_tables)
            return rans.encode(p.symbols, p.indexes, coder.y_tables) == b.y_string
        indexes, _ = coder._prior(z_symbols, "float")
    symbols = rans.decode(b.y_string, indexes, coder.y_tables)
    return rans.encode(symbols, indexes, coder.y_tables) == b.y_string


class Fuzzer:
    """Makes and runs inputs by number: the same seed and number give the same input."""

    def __init__(
        self,
        codecs: dict[int, Codec],
        seeds: list[mutate.Seed],
        seed: int,
        others: Sequence[Codec] = (),
    ) -> None:
        caching = {
            q: replace(c, latent_coder=CachingCoder(c.latent_coder)) for q, c in codecs.items()
        }
        shipped: dict[tuple[int, bitstream.Metric], Codec]
        shipped = {(q, "mse"): c for q, c in caching.items()}
        self.library = Library(shipped, {}, OtherModels(others))
        self.seeds, self.seed = seeds, seed
        self.small = seeds[0].symbols.size < 10**5
        for s in seeds if self.small and not others else ():
            coder = caching_coder(caching[s.parsed.quality])
            caching[s.parsed.quality].latents(s.parsed)
            assert coder.z_symbols is not None
            coder.known.add(coder.z_symbols.tobytes())

    def mutant(self, i: int) -> mutate.Mutant:
        """Return input number `i`."""
        return mutate.mutant(random.Random(f"{self.seed}/{self.small}/{i}"), self.seeds)

    def work(self, shared: Shared, start: int, stop: int, failures: Path) -> None:
        """Run inputs `start` to `stop`; called in a child process."""
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
        if stop - start >= 1000:  # fewer are no evidence of a leak
            now = _memory()
            shared.growth[:] = np.maximum(shared.growth, [now[0] - first[0], now[1] - first[1]])


def keep(failures: Path, m: mutate.Mutant, i: int, what: str) -> None:
    """Save an input, and the file that it is a mutant of, to the folder `failures`."""
    failures.mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() else "-" for c in what)
    (failures / f"{i}-{m.kind.replace(' ', '-')}-{name}.bin").write_bytes(m.data)
    (failures / f"{i}-seed.bin").write_bytes(m.seed.data)


def run(
    fuzzer: Fuzzer, shared: Shared, inputs: int, failures: Path, deadline: float
) -> collections.Counter[str]:
    """Run inputs in child processes until the deadline; count the crashes and hangs."""
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
    """Wait for a child; return "crash", "hang", or "" if it ended normally."""
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
    """Return the resident bytes of this process and of its recovery process."""
    return _resident(os.getpid()), _resident(recovery.PROCESS.pid)


def _resident(pid: int | None) -> int:
    if pid is None:
        return 0
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def report(
    shared: Shared, lost: collections.Counter[str], limits: Mapping[str, float]
) -> tuple[str, bool]:
    """Return the table of results, and True if there was no failure."""
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
    lines.append("CompressAI's format, accepted with other symbols (it has no checksum):")
    lines += [
        f"  {name:15}{n:8} of {of:8}, {most} symbols differ at most"
        for (name, (n, of)), most in zip(passed.items(), shared.changed, strict=True)
    ]
    growth = [int(n) >> 20 for n in shared.growth]
    lines.append(
        f"memory grew by {growth[0]} MiB, the recovery process's by {growth[1]} MiB, at most"
    )
    lines.append(f"crashes: {lost['crash']}, hangs: {lost['hang']}")
    wrong = int(stage["accepted, other symbols"][:2].sum())
    lines.append(f".msh decoded to other symbols: {wrong}")
    too_many = any(
        n > max(TOLERATED, limits[k] * of) for k, (n, of) in passed.items() if k in limits
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


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("inputs", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full-size", type=int, help="inputs of 768×512 (default: N / 1000)")
    parser.add_argument(
        "--cuts", type=int, default=12, help="crops of the photograph to encode and mutate"
    )
    parser.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        help="start no further child process after so many minutes",
    )
    parser.add_argument(
        "--others", type=int, help=f"inputs of other models (default: N / {OTHERS})"
    )
    others = [name for name in ARCHITECTURES if name != DEFAULT]
    parser.add_argument("--models", nargs="+", choices=others, default=others)
    parser.add_argument("--failures", type=Path, default=Path("runs/fuzz"))
    return parser.parse_args()


def main() -> int:
    """Run the fuzzer, print the table, and return the exit status."""
    options = _options()
    large = options.inputs // 1000 if options.full_size is None else options.full_size
    torch.set_num_threads(1)  # OpenMP does not survive a fork once its threads run
    codecs = {q: zoo.load(q) for q in zoo.QUALITIES}
    photo = image.read(PHOTO.read_bytes(), 10**6)
    shared, lost = Shared(), collections.Counter[str]()
    began = time.monotonic()
    deadline = began + 60 * options.minutes
    for inputs, cuts, sides in ((large, 3, (768, 768)), (options.inputs, options.cuts, (40, 128))):
        if inputs:
            seeds = mutate.seeds(list(codecs.values()), photo, cuts, sides)
            fuzzer = Fuzzer(codecs, seeds, options.seed)
            lost += run(fuzzer, shared, inputs, options.failures, deadline)
    used = other_codecs(options.models)
    inputs = options.inputs // OTHERS if options.others is None else options.others
    seeds = mutate.seeds(used, photo, min(options.cuts, 3), (40, 128))
    others = Shared()
    fuzzer = Fuzzer({}, seeds, options.seed, used)
    lost_others = run(fuzzer, others, inputs, options.failures, deadline)
    print(f"seed {options.seed}; {time.monotonic() - began:.0f} s")  # noqa: T201
    results = [
        _print(f"{large} inputs of 768×512, others of at most 128×128", shared, lost, LIMITS),
        _print(
            f"other models ({', '.join(options.models)})", others, lost_others, LIMITS_OF_OTHERS
        ),
    ]
    return 0 if all(results) else 1


def _print(
    what: str, shared: Shared, lost: collections.Counter[str], limits: Mapping[str, float]
) -> bool:
    """Print the table of some inputs, if there are any; return True if there was no failure."""
    if not shared.counts.any():
        return not lost
    table, well = report(shared, lost, limits)
    print(f"{what}: {shared.counts.sum()} in all\n{table}")  # noqa: T201
    return well


if __name__ == "__main__":
    prepare_process(WorkerSettings())
    sys.exit(main())
