"""Bitstreams from machines that round `h_s` differently, and the process that decodes them."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models import cancellation, checkpoint
from models.codec import bitstream, codec, rans, recovery, zoo
from models.codec.architectures import ARCHITECTURES
from models.codec.autoregressive import ContextCoder
from models.codec.bitstream import Bitstream
from models.codec.codec import Codec
from models.codec.context import _Walk
from models.codec.networks import Network
from models.errors import (
    BitstreamError,
    Canceled,
    CorruptStream,
    DesynchronisedStream,
    Unavailable,
)
from models.image import Pixels
from tests.support import zoo as nets
from tests.support.compressai import mean_scale_hyperprior
from tests.support.data import psnr
from tests.support.forked import Forked

pytestmark = pytest.mark.weights


@pytest.fixture(scope="module")
def picture(photo: Pixels) -> Pixels:
    return photo[256:384, 512:640].copy()


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Fork the recovery processes of these tests, without the seconds that imports take.

    Scripts start those that are the subject of a test.
    """

    monkeypatch.setattr(recovery, "_start", partial(start, tmp_path))
    yield
    recovery.PROCESS.close()


@pytest.fixture
def late(forked: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The recovery processes of the test take a while to start, as those that are not forked."""
    monkeypatch.setattr(recovery, "_start", partial(start, tmp_path, 0.5))


def start(folder: Path, after_s: float = 0) -> recovery._Child:
    ours, theirs = Pipe()
    with theirs:
        process = Forked(partial(serve, theirs, after_s), os.environ, folder / "recovery.log")
    return recovery._Child(process, ours, set())  # type: ignore[arg-type]


def serve(connection: "Connection[bytes, bytes]", after_s: float) -> int:
    """What a forked recovery process runs."""
    time.sleep(after_s)
    recovery.serve(connection)
    return 0


@pytest.fixture
def process() -> Iterator[recovery.RecoveryProcess]:
    client = recovery.RecoveryProcess()
    yield client
    client.close()


def encode_elsewhere(
    shipped: Codec, picture: Pixels, arithmetic: str, channels: int = 192
) -> tuple[Bitstream, torch.Tensor]:
    """Encode as a machine that computes in `arithmetic`; return the bitstream and its `y_hat`.

    Its scale indexes differ from those of this process, which is so for about one bitstream in a
    hundred. An encoder may choose any z, so some symbols of z are changed until the indexes of the
    first `channels` differ. Decoded with the wrong indexes, everything behind them is garbled.
    """
    h, rng = shipped.latent_coder, np.random.default_rng(0)
    h_s = recovery.prepare(shipped.net.h_s, arithmetic)
    with torch.inference_mode():
        y = shipped.net.g_a(codec.to_tensor(picture))
        best = torch.round(shipped.net.h_a(y) - h.medians)[0].to(torch.int32).numpy()
        for _ in range(4000):
            z = best.copy()
            for _nudge in range(6):
                z[tuple(rng.integers(0, n) for n in z.shape)] += rng.choice((-1, 1))
            ours = h._prior(z, "float")[0]
            out = recovery.evaluate(h_s, h._z_hat(z), arithmetic)
            scales_hat, means_hat = out.chunk(2, 1)
            theirs = h._indexes(scales_hat)
            if (ours != theirs)[:channels].any():
                break
        else:
            pytest.fail(f"no z found for which {arithmetic} gives other scale indexes")
        symbols = torch.round(y - means_hat)[0].to(torch.int32).numpy()
        contexts = np.broadcast_to(np.arange(len(z))[:, None, None], z.shape)
        height, width = picture.shape[:2]
        b = Bitstream(
            "compressai", "float", shipped.quality, shipped.metric, height, width,
            rans.encode(symbols, theirs, h.y_tables), rans.encode(z, contexts, h.z_tables),
        )  # fmt: skip
        return b, torch.from_numpy(symbols)[None].float() + means_hat


@pytest.fixture(scope="module")
def foreign(shipped: Codec, picture: Pixels) -> tuple[Bitstream, torch.Tensor]:
    return encode_elsewhere(shipped, picture, "float64", 64)


def garbage(b: Bitstream) -> Bitstream:
    """Replace the y string by one that no arithmetic decodes, but with a valid first state."""
    return replace(b, y_string=b.y_string[:8] + bytes(reversed(b.y_string[8:])))


@pytest.mark.compressai
def test_a_bitstream_that_compressai_garbles_is_decoded_exactly(
    shipped: Codec, foreign: tuple[Bitstream, torch.Tensor], picture: Pixels
) -> None:
    b, y_hat = foreign
    weights = {
        k: v.float()
        for k, v in checkpoint.load(
            next(e for e in checkpoint.manifest() if e.quality == shipped.quality)
        ).items()
        if v.is_floating_point()
    }
    reference = mean_scale_hyperprior(128, 192)
    reference.update()
    reference.load_state_dict({**reference.state_dict(), **weights})
    reference.update(force=True)
    # zeros for CompressAI to read: with wrong indexes it reads past the end of the string
    strings = [[b.y_string + bytes(1 << 18)], [b.z_string]]
    with torch.inference_mode():
        theirs = reference.eval().decompress(strings, (2, 2))["x_hat"]

    ours = shipped.latents(bitstream.parse(bitstream.serialize(b)))

    assert psnr(codec.to_pixels(theirs.clamp(0, 1)), picture) < 21
    assert ours.arithmetic == "float64"
    assert torch.equal(ours.y_hat, y_hat)
    assert psnr(codec.to_pixels(shipped.synthesis(ours.y_hat)), picture) > 28


@pytest.mark.parametrize("arithmetic", ["oneDNN off", "channels_last"])
def test_bitstreams_of_other_backends_and_memory_layouts_are_decoded(
    shipped: Codec, picture: Pixels, arithmetic: str
) -> None:
    b, y_hat = encode_elsewhere(shipped, picture, arithmetic)
    latents = shipped.latents(b)
    assert latents.arithmetic in recovery.ARITHMETICS
    assert (latents.y_hat - y_hat).abs().max() < 1e-4


def test_latents_name_the_arithmetic_of_their_profile(shipped: Codec, small: Pixels) -> None:
    for profile in bitstream.PROFILES:
        b = shipped.encode(codec.to_tensor(small), "msh", profile)
        assert shipped.latents(b).arithmetic == profile


def test_an_msh_file_from_another_machine_is_decoded_too(
    shipped: Codec, foreign: tuple[Bitstream, torch.Tensor]
) -> None:
    b, y_hat = foreign
    crc = codec._crc(shipped.latents(b).symbols)
    msh = replace(b, format="msh", weights_id=shipped.weights_id, symbols_crc=crc)
    assert torch.equal(shipped.latents(bitstream.parse(bitstream.serialize(msh))).y_hat, y_hat)


def test_recovery_does_not_change_the_settings_of_this_process(
    shipped: Codec, foreign: tuple[Bitstream, torch.Tensor]
) -> None:
    def settings() -> tuple[object, ...]:
        return torch.get_num_threads(), torch.backends.mkldnn.enabled

    before, changes = settings(), []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            if settings() != before:
                changes.append(settings())

    watcher = threading.Thread(target=watch)
    watcher.start()
    with pytest.raises(BitstreamError):
        shipped.latents(garbage(foreign[0]))
    done.set()
    watcher.join()
    assert not changes


def test_threads_share_one_process(shipped: Codec, foreign: tuple[Bitstream, torch.Tensor]) -> None:
    recovery.PROCESS.close()
    b, y_hat = foreign
    results, pids = [], set()

    def decode() -> None:
        results.append(shipped.latents(b).y_hat)
        pids.add(recovery.PROCESS.pid)

    threads = [threading.Thread(target=decode) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [torch.equal(y, y_hat) for y in results] == [True] * 4
    assert len(pids) == 1


def test_an_invalid_z_string_starts_no_recovery_process(
    shipped: Codec, foreign: tuple[Bitstream, torch.Tensor]
) -> None:
    recovery.PROCESS.close()
    b = foreign[0]
    with pytest.raises(BitstreamError):
        shipped.latents(replace(b, z_string=bytes(reversed(b.z_string))))
    assert recovery.PROCESS.pid is None


@pytest.mark.parametrize("damage", [lambda s: s[:-1], lambda s: bytes(8) + s[8:]])
def test_a_y_string_that_is_invalid_for_any_arithmetic_starts_no_recovery_process(
    shipped: Codec, foreign: tuple[Bitstream, torch.Tensor], damage: Callable[[bytes], bytes]
) -> None:
    recovery.PROCESS.close()
    b = foreign[0]
    with pytest.raises(BitstreamError):
        shipped.latents(replace(b, y_string=damage(b.y_string)))
    assert recovery.PROCESS.pid is None


def test_the_exact_profile_starts_no_recovery_process(shipped: Codec, small_msh: bytes) -> None:
    recovery.PROCESS.close()
    with pytest.raises(BitstreamError):
        shipped.latents(garbage(bitstream.parse(small_msh)))
    assert recovery.PROCESS.pid is None


def test_a_process_that_has_ended_is_started_again(
    shipped: Codec, process: recovery.RecoveryProcess
) -> None:
    z_hat = torch.zeros(1, 128, 1, 1)
    first = process.evaluate("key", shipped.net.h_s, z_hat, "float64")
    pid = process.pid
    assert pid is not None
    os.kill(pid, 9)
    again = process.evaluate("key", shipped.net.h_s, z_hat, "float64")
    assert process.pid != pid
    assert all(map(torch.equal, first, again))


def test_a_process_that_dies_during_a_request_raises_an_error(
    shipped: Codec, process: recovery.RecoveryProcess
) -> None:
    with pytest.raises(Unavailable, match="ended"):
        process.evaluate("key", shipped.net.h_s, torch.zeros(1, 128, 1, 1), "abacus")
    assert process.pid is None


@pytest.mark.usefixtures("late")
def test_an_interrupted_request_leaves_no_reply_for_the_next_one(
    shipped: Codec, process: recovery.RecoveryProcess
) -> None:
    def interrupt(*_: object) -> None:
        raise RuntimeError("out of time")

    ones = torch.ones(1, 128, 1, 1)
    process.close()
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)  # before the process has started
    try:
        with pytest.raises(RuntimeError, match="out of time"):
            process.evaluate("key", shipped.net.h_s, 0 * ones, "float64")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)  # otherwise a late alarm ends the tests
        signal.signal(signal.SIGALRM, before)
    result = process.evaluate("key", shipped.net.h_s, ones, "float64")
    expected = recovery.evaluate(recovery.prepare(shipped.net.h_s, "float64"), ones, "float64")
    assert all(map(torch.equal, result, expected))


def test_after_a_timeout_the_error_asks_to_try_again_and_the_process_has_ended(
    shipped: Codec, foreign: tuple[Bitstream, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    recovery.PROCESS.close()
    monkeypatch.setattr(recovery.PROCESS, "timeout", 1e-3)
    with pytest.raises(Unavailable, match="longer than.*try again later"):
        shipped.latents(foreign[0])
    assert recovery.PROCESS.pid is None


@pytest.mark.parametrize(
    "key", ["key", "another"]
)  # weights with a new key do not fit into the pipe
def test_a_process_that_hangs_is_ended(
    shipped: Codec, process: recovery.RecoveryProcess, key: str
) -> None:
    z_hat = torch.zeros(1, 128, 1, 1)
    process.evaluate("key", shipped.net.h_s, z_hat, "float64")
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    process.timeout = 0.3
    with pytest.raises(Unavailable, match="longer than"):
        process.evaluate(key, shipped.net.h_s, z_hat, "float64")
    assert process.pid is None


def fork_with_a_recovery_process() -> int:
    """Use a recovery process, fork, and use it again in the parent; 0 if both are right."""
    process = recovery.PROCESS
    small = "key", nn.Sequential(nn.Conv2d(2, 2, 1)), torch.zeros(1, 2, 1, 1), "one thread"
    process.evaluate(*small)
    assert process._child is not None
    pid, pipe = process.pid, Path(f"/proc/self/fd/{process._child.connection.fileno()}")
    process._lock.acquire()
    if not (child := os.fork()):
        os._exit(process.pid is not None or pipe.exists() or process._lock.locked())
    _, status = os.waitpid(child, 0)
    process._lock.release()
    process.evaluate(*small)
    return status or process.pid != pid


def die_with_a_recovery_process() -> int:
    """Print the id of a recovery process, and die by SIGKILL."""
    net = nn.Sequential(nn.Conv2d(2, 2, 1))
    recovery.PROCESS.evaluate("key", net, torch.zeros(1, 2, 1, 1), "one thread")
    print(recovery.PROCESS.pid, flush=True)  # noqa: T201
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def test_a_forked_process_leaves_the_recovery_process_to_its_parent(tmp_path: Path) -> None:
    """It closes its copy of the pipe, and does not inherit a lock that a thread held."""
    log = tmp_path / "log"
    assert Forked(fork_with_a_recovery_process, os.environ, log).wait(60) == 0, log.read_text()


def test_the_process_ends_with_its_parent(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert Forked(die_with_a_recovery_process, os.environ, log).wait(60) == -signal.SIGKILL
    status = Path(f"/proc/{int(log.read_text())}/stat")
    deadline = time.monotonic() + 20
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["bmshj2018-hyperprior", "mbt2018-mean", "cheng2020-anchor"])
def test_windows_do_not_change_the_float64_result(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.rint(np.random.default_rng(0).standard_t(3, (1, 16, 20, 11)))
    h_s = recovery.prepare(Network(ARCHITECTURES[name], *nets.SMALL[name]).h_s, "float64")
    z_hat = torch.from_numpy(values).float()
    whole = recovery.evaluate(h_s, z_hat, "float64")
    monkeypatch.setattr(recovery, "WINDOW", 12**2)
    assert torch.equal(whole, recovery.evaluate(h_s, z_hat, "float64"))


def test_an_autoregressive_bitstream_of_another_arithmetic_is_decoded() -> None:
    """The scales of the first position lie at thresholds: roundings move some of them across."""
    tensors = zoo.with_tables(nets.random("mbt2018", 16, 192, seed=1))
    coder = zoo.from_tensors(tensors, 1, model="mbt2018").latent_coder
    assert isinstance(coder, ContextCoder)
    h_s, M = recovery.prepare(coder.net.h_s, "float64"), coder.net.M
    with torch.inference_mode():
        y = coder.net.g_a(torch.rand(1, 3, 64, 64))
        z = torch.round(coder.net.h_a(y) - coder.medians)[0].to(torch.int32).numpy()
        z_hat = coder._z_hat(z)
        features = recovery.evaluate(h_s, z_hat, "float64")
        bias, table = coder.context.layers[-1][1], coder.scale_table[:-1]
        for _ in range(50):
            walk = _Walk(coder.context, coder.net.h_s(z_hat), torch.float32)
            walk.contexts(0)
            scales = torch.from_numpy(walk.sums.output[:M])
            nearest = table[(scales[:, None] - table).abs().argmin(1)]
            bias[:M] += nearest - scales
            ours = coder.context.quantize(y, coder.net.h_s(z_hat))
            theirs = coder.context.quantize(y, features, torch.float64)
            if (ours.indexes != theirs.indexes)[0, 0].any():
                break
            bias[:M] += torch.randn(M) * 1e-6
        else:
            pytest.fail("float64 gives the same scale indexes")
    contexts = np.broadcast_to(np.arange(len(z))[:, None, None], z.shape)
    y_string = rans.encode(theirs.symbols, theirs.indexes, coder.y_tables)
    latents = coder.decode(y_string, rans.encode(z, contexts, coder.z_tables), (64, 64), "float")
    assert latents.arithmetic == "float64"
    assert np.array_equal(latents.symbols, theirs.symbols.transpose(2, 0, 1))
    with pytest.raises((CorruptStream, DesynchronisedStream)):
        coder.decode(y_string[:-4], rans.encode(z, contexts, coder.z_tables), (64, 64), "float")


@pytest.mark.usefixtures("late")
def test_the_recovery_of_an_autoregressive_bitstream_can_be_canceled() -> None:
    tensors = zoo.with_tables(nets.random("mbt2018"))
    coder = zoo.from_tensors(tensors, 1, model="mbt2018").latent_coder
    y_string, z_string, _ = coder.encode(torch.rand(1, 3, 64, 64), "float")

    class OnceStarted(threading.Event):
        """Set once there is a recovery process."""

        def is_set(self) -> bool:
            return recovery.PROCESS.pid is not None

    with cancellation.cancelable(OnceStarted()), pytest.raises(Canceled):
        coder.decode(y_string + bytes(4), z_string, (64, 64), "float")
    assert recovery.PROCESS.pid is None
    with pytest.raises(DesynchronisedStream):
        coder.decode(y_string + bytes(4), z_string, (64, 64), "float")
