"""Streams that `h_s` of another machine made, and the process that computes as that one did."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from compressai.models import MeanScaleHyperprior as Reference

from models import checkpoint
from models.codec import bitstream, codec, rans, recovery
from models.codec.bitstream import Bitstream
from models.codec.codec import Codec
from models.errors import BitstreamError
from models.image import Pixels
from tests.support.data import psnr

pytestmark = pytest.mark.weights


@pytest.fixture(scope="module")
def picture(photo: Pixels) -> Pixels:
    return photo[256:384, 512:640].copy()


@pytest.fixture
def helper() -> Iterator[recovery.Helper]:
    made = recovery.Helper()
    yield made
    made.close()


def made_elsewhere(
    own: Codec, picture: Pixels, arithmetic: str, channels: int = 192
) -> tuple[Bitstream, torch.Tensor]:
    """A stream of a machine that computes in `arithmetic`, and its `y_hat`.

    Of all streams of the picture, one whose scale indexes are not those of this process: about one
    in a hundred. An encoder is free to choose z; here it nudges some symbols until it finds one
    where the first `channels` differ: what follows is garbled.
    """
    h, rng = own.hyperprior, np.random.default_rng(0)
    h_s = recovery.prepare(own.net.h_s, arithmetic)
    with torch.inference_mode():
        y = own.net.g_a(codec.to_tensor(picture))
        best = torch.round(own.net.h_a(y) - h.medians)[0].to(torch.int32).numpy()
        for _ in range(4000):
            z = best.copy()
            for _nudge in range(6):
                z[tuple(rng.integers(0, n) for n in z.shape)] += rng.choice((-1, 1))
            ours = h._prior(z, "float")[0]
            scales_hat, means_hat = recovery.evaluate(h_s, h._z_hat(z), arithmetic)
            theirs = h._indexes(scales_hat)
            if (ours != theirs)[:channels].any():
                break
        else:
            pytest.fail("no picture tells these two arithmetics apart")
        symbols = torch.round(y - means_hat)[0].to(torch.int32).numpy()
        contexts = np.broadcast_to(np.arange(len(z))[:, None, None], z.shape)
        b = Bitstream(
            "compressai", "float", own.quality, own.metric, *picture.shape[:2],
            rans.encode(symbols, theirs, h.y_tables), rans.encode(z, contexts, h.z_tables),
        )  # fmt: skip
        return b, torch.from_numpy(symbols)[None].float() + means_hat


@pytest.fixture(scope="module")
def foreign(shipped: Codec, picture: Pixels) -> tuple[Bitstream, torch.Tensor]:
    return made_elsewhere(shipped, picture, "float64", 64)


def garbage(b: Bitstream) -> Bitstream:
    """Its y string decodes under no arithmetic; its start state is one that is taken."""
    return replace(b, y_string=b.y_string[:8] + bytes(reversed(b.y_string[8:])))


def test_what_compressai_garbles_is_decoded_to_the_last_bit(
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
    reference = Reference(128, 192)
    reference.update()
    reference.load_state_dict({**reference.state_dict(), **weights})
    reference.update(force=True)
    # out of step it reads beyond the string, so it is given room: zeros instead of the heap
    strings = [[b.y_string + bytes(1 << 18)], [b.z_string]]
    with torch.inference_mode():
        theirs = reference.eval().decompress(strings, (2, 2))["x_hat"]

    ours = shipped.latents(bitstream.parse(bitstream.serialize(b)))

    assert psnr(codec.to_pixels(theirs.clamp(0, 1)), picture) < 21
    assert ours.arithmetic == "float64"
    assert torch.equal(ours.y_hat, y_hat)
    assert psnr(codec.to_pixels(shipped.synthesis(ours.y_hat)), picture) > 28


@pytest.mark.parametrize("arithmetic", ["oneDNN off", "channels_last"])
def test_streams_of_other_backends_and_layouts_are_decoded(
    shipped: Codec, picture: Pixels, arithmetic: str
) -> None:
    b, y_hat = made_elsewhere(shipped, picture, arithmetic)
    found = shipped.latents(b)
    assert found.arithmetic in recovery.ARITHMETICS
    assert (found.y_hat - y_hat).abs().max() < 1e-4


def test_the_arithmetic_that_held_is_named(shipped: Codec, small: Pixels) -> None:
    for profile in bitstream.PROFILES:
        b = shipped.encode(codec.to_tensor(small), "msh", profile)
        assert shipped.latents(b).arithmetic == profile


def test_a_foreign_stream_in_msh_is_decoded_too(
    shipped: Codec, foreign: tuple[Bitstream, torch.Tensor]
) -> None:
    b, y_hat = foreign
    crc = codec._crc(shipped.latents(b).symbols)
    msh = replace(b, format="msh", weights_id=shipped.weights_id, symbols_crc=crc)
    assert torch.equal(shipped.latents(bitstream.parse(bitstream.serialize(msh))).y_hat, y_hat)


def test_this_process_keeps_its_settings(
    shipped: Codec, foreign: tuple[Bitstream, torch.Tensor]
) -> None:
    def settings() -> tuple[object, ...]:
        return torch.get_num_threads(), torch.backends.mkldnn.enabled

    before, wrong = settings(), []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            if settings() != before:
                wrong.append(settings())

    watcher = threading.Thread(target=watch)
    watcher.start()
    with pytest.raises(BitstreamError):
        shipped.latents(garbage(foreign[0]))
    done.set()
    watcher.join()
    assert not wrong


def test_threads_share_one_process(shipped: Codec, foreign: tuple[Bitstream, torch.Tensor]) -> None:
    recovery.HELPER.close()
    b, y_hat = foreign
    found, pids = [], set()

    def decode() -> None:
        found.append(shipped.latents(b).y_hat)
        pids.add(recovery.HELPER.pid)

    threads = [threading.Thread(target=decode) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert [torch.equal(y, y_hat) for y in found] == [True] * 4
    assert len(pids) == 1


def test_no_process_is_started_for_a_z_string_that_is_wrong(
    shipped: Codec, foreign: tuple[Bitstream, torch.Tensor]
) -> None:
    recovery.HELPER.close()
    b = foreign[0]
    with pytest.raises(BitstreamError):
        shipped.latents(replace(b, z_string=bytes(reversed(b.z_string))))
    assert recovery.HELPER.pid is None


@pytest.mark.parametrize("damage", [lambda s: s[:-1], lambda s: bytes(8) + s[8:]])
def test_no_process_is_started_for_a_y_string_that_no_arithmetic_decodes(
    shipped: Codec, foreign: tuple[Bitstream, torch.Tensor], damage: Callable[[bytes], bytes]
) -> None:
    recovery.HELPER.close()
    b = foreign[0]
    with pytest.raises(BitstreamError):
        shipped.latents(replace(b, y_string=damage(b.y_string)))
    assert recovery.HELPER.pid is None


def test_no_process_is_started_for_the_exact_profile(shipped: Codec, small_msh: bytes) -> None:
    recovery.HELPER.close()
    with pytest.raises(BitstreamError):
        shipped.latents(garbage(bitstream.parse(small_msh)))
    assert recovery.HELPER.pid is None


def test_a_process_that_has_ended_is_started_again(shipped: Codec, helper: recovery.Helper) -> None:
    z_hat = torch.zeros(1, 128, 1, 1)
    first = helper.evaluate("key", shipped.net.h_s, z_hat, "float64")
    pid = helper.pid
    assert pid is not None
    os.kill(pid, 9)
    again = helper.evaluate("key", shipped.net.h_s, z_hat, "float64")
    assert helper.pid != pid
    assert all(map(torch.equal, first, again))


def test_a_process_that_dies_at_work_is_an_error(shipped: Codec, helper: recovery.Helper) -> None:
    with pytest.raises(recovery.Unavailable, match="ended"):
        helper.evaluate("key", shipped.net.h_s, torch.zeros(1, 128, 1, 1), "abacus")
    assert helper.pid is None


def test_an_interrupted_question_leaves_no_answer_behind(
    shipped: Codec, helper: recovery.Helper
) -> None:
    def interrupt(*_: object) -> None:
        raise RuntimeError("out of time")

    ones = torch.ones(1, 128, 1, 1)
    helper.close()
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)  # the process takes longer to start
    try:
        with pytest.raises(RuntimeError, match="out of time"):
            helper.evaluate("key", shipped.net.h_s, 0 * ones, "float64")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)  # it would end these tests
        signal.signal(signal.SIGALRM, before)
    found = helper.evaluate("key", shipped.net.h_s, ones, "float64")
    expected = recovery.evaluate(recovery.prepare(shipped.net.h_s, "float64"), ones, "float64")
    assert all(map(torch.equal, found, expected))


def test_slowness_is_a_bitstream_error_and_ends_the_process(
    shipped: Codec, foreign: tuple[Bitstream, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    recovery.HELPER.close()
    monkeypatch.setattr(recovery.HELPER, "timeout", 1e-3)
    with pytest.raises(BitstreamError, match="longer than"):
        shipped.latents(foreign[0])
    assert recovery.HELPER.pid is None


@pytest.mark.parametrize("key", ["key", "another"])  # whose weights do not fit into the pipe
def test_a_process_that_stands_still_is_ended(
    shipped: Codec, helper: recovery.Helper, key: str
) -> None:
    z_hat = torch.zeros(1, 128, 1, 1)
    helper.evaluate("key", shipped.net.h_s, z_hat, "float64")
    assert helper.pid is not None
    os.kill(helper.pid, signal.SIGSTOP)
    helper.timeout = 0.3
    with pytest.raises(recovery.Unavailable, match="longer than"):
        helper.evaluate(key, shipped.net.h_s, z_hat, "float64")
    assert helper.pid is None


def test_a_fork_leaves_the_process_to_its_parent() -> None:
    """Neither its pipe nor a lock that another thread held comes along."""
    script = (
        "import os, torch; from models.codec import recovery; h = recovery.HELPER;"
        "ask = 'key', torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1)), torch.zeros(1, 2, 1, 1);"
        "h.evaluate(*ask, 'one thread'); pipe = f'/proc/self/fd/{h._running.connection.fileno()}';"
        "h._lock.acquire(); child = os.fork();"
        "child or os._exit(h.pid is not None or os.path.exists(pipe) or h._lock.locked());"
        "print(os.waitpid(child, 0)[1], end=' '); h._lock.release(); pid = h.pid;"
        "h.evaluate(*ask, 'one thread'); print(h.pid == pid)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], stdout=subprocess.PIPE, text=True)
    assert done.stdout == "0 True\n"


def test_the_process_ends_with_its_parent() -> None:
    script = (
        "import os, torch; from models.codec import recovery;"
        "net = torch.nn.Sequential(torch.nn.Conv2d("
        "2, 2, 1)); recovery.HELPER.evaluate('key', net, torch.zeros(1, 2, 1, 1), 'one thread');"
        "print(recovery.HELPER.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], stdout=subprocess.PIPE, text=True)
    status = Path(f"/proc/{int(done.stdout)}/stat")
    deadline = time.monotonic() + 20
    while status.exists() and status.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_windows_do_not_show_in_float64(shipped: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = np.rint(np.random.default_rng(0).standard_t(3, (1, 128, 9, 8)))
    z_hat, h_s = torch.from_numpy(drawn).float(), recovery.prepare(shipped.net.h_s, "float64")
    whole = recovery.evaluate(h_s, z_hat, "float64")
    monkeypatch.setattr(recovery, "WINDOW", 36)
    assert all(map(torch.equal, whole, recovery.evaluate(h_s, z_hat, "float64")))
