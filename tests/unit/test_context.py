"""Autoregressive entropy coding gives CompressAI's symbols, means and bytes."""

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from models import cancellation
from models.codec import context, rans, tables
from models.codec.context import ContextModel, Positions
from models.errors import Canceled, CorruptStream, DesynchronisedStream
from tests.support import zoo

pytestmark = pytest.mark.compressai
NAMES = ("mbt2018", "cheng2020-anchor")


def model(net: Any) -> tuple[ContextModel, rans.Tables]:
    """Our context model with the weights of CompressAI's network, and the tables for y."""
    table = tables.gaussian()
    cdf, offset, length, scales = (table[name] for name in tables.names(tables.Y))
    ours = ContextModel(net.context_prediction, net.entropy_parameters, scales)
    return ours, rans.Tables(cdf.numpy(), length.numpy(), offset.numpy())


def coded(net: Any, height: int, width: int) -> tuple[bytes, torch.Tensor, torch.Tensor]:
    """Encode noise; return the y string, the features of `h_s`, and y_hat as CompressAI decodes it.

    Its `g_s` is replaced.
    """
    with torch.inference_mode():
        encoded = net.compress(torch.rand(1, 3, height, width))
        (y_string,), (z_string,) = encoded["strings"]
        features = net.h_s(net.entropy_bottleneck.decompress([z_string], encoded["shape"]))
        decoded: list[torch.Tensor] = []
        net.g_s = torch.nn.Identity()
        net.g_s.register_forward_pre_hook(lambda _, y_hat: decoded.append(y_hat[0].clone()))
        net.decompress(encoded["strings"], encoded["shape"])
    return y_string, features, decoded[0]


def summed(p: Positions) -> torch.Tensor:
    """y_hat (1, M, h, w): symbols and means."""
    return torch.from_numpy(p.symbols.astype(np.float32) + p.means).permute(2, 0, 1)[None]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("name", "channels"),
    [*((n, zoo.SMALL[n]) for n in NAMES), ("mbt2018", (16, 192)), ("mbt2018", (8, 12))],
)
def test_y_hat_equals_that_of_compressai_bit_by_bit(
    name: str, channels: tuple[int, int], threads: int
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        net = zoo.reference(name, *channels)
        y_string, features, y_hat = coded(net, 64, 128)
        ours, y_tables = model(net)
        p = ours.decode(y_string, features, y_tables)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(summed(p), y_hat)
    assert len(np.unique(p.symbols)) > 8
    assert rans.encode(p.symbols, p.indexes, y_tables) == y_string


@pytest.mark.parametrize("name", NAMES)
def test_the_encoder_writes_the_bytes_of_compressai(name: str) -> None:
    net = zoo.reference(name)
    with torch.inference_mode():
        x = torch.rand(1, 3, 64, 64)
        encoded = net.compress(x)
        features = net.h_s(
            net.entropy_bottleneck.decompress(encoded["strings"][1], encoded["shape"])
        )
        ours, y_tables = model(net)
        p = ours.quantize(net.g_a(x), features)
    assert rans.encode(p.symbols, p.indexes, y_tables) == encoded["strings"][0][0]


def test_other_kernels_give_the_same_symbols(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own convolutions, which are used where no faster kernel agrees with them."""
    net = zoo.reference("mbt2018")
    y_string, features, y_hat = coded(net, 64, 64)
    ours, y_tables = model(net)
    with torch.inference_mode():
        fast = ours.decode(y_string, features, y_tables)
        monkeypatch.setattr(ContextModel, "kernels", lambda _: (None, False))
        slow = ours.decode(y_string, features, y_tables)
    assert np.array_equal(fast.means, slow.means)
    assert np.array_equal(fast.symbols, slow.symbols)


def test_the_fast_kernels_agree_with_torch_at_the_sizes_of_the_zoo() -> None:
    orders = {"AVX2": context.ORDERS[0], "AVX512": context.ORDERS[1]}
    net = zoo.reference("mbt2018", 8, 192)
    with torch.inference_mode():
        assert model(net)[0].kernels() == (orders[torch.backends.cpu.get_cpu_capability()], True)


def test_the_fast_kernels_agree_with_torch_on_machines_with_avx2() -> None:
    code = (
        "import torch; from models.codec import context; from tests.unit.test_context import *\n"
        "with torch.inference_mode(): print(model(zoo.reference('mbt2018', 8, 16))[0].kernels())"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    printed = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert printed == f"({context.ORDERS[0]}, True)\n"


def test_a_kernel_with_another_order_of_sums_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "ORDERS", (context.Order(24, separate=False),))
    with torch.inference_mode():
        assert model(zoo.reference("mbt2018"))[0].kernels()[0] is None


def test_float64_decodes_the_same_symbols() -> None:
    net = zoo.reference("mbt2018")
    y_string, features, y_hat = coded(net, 64, 64)
    ours, y_tables = model(net)
    with torch.inference_mode():
        p = pickle.loads(pickle.dumps(ours)).decode(y_string, features, y_tables, torch.float64)
    torch.testing.assert_close(summed(p), y_hat, rtol=0, atol=1e-4)


def test_damaged_strings_are_refused() -> None:
    net = zoo.reference("mbt2018")
    y_string, features, _ = coded(net, 64, 64)
    ours, y_tables = model(net)
    with torch.inference_mode():
        for wrong in (y_string[:-8], y_string[:8], y_string[:40] + b"\xff" * 4 + y_string[44:]):
            with pytest.raises((CorruptStream, DesynchronisedStream)):
                ours.decode(wrong, features, y_tables)
        with pytest.raises((CorruptStream, DesynchronisedStream)):
            ours.decode(y_string, features + 0.5, y_tables)
        with pytest.raises(DesynchronisedStream, match="bytes remain"):
            ours.decode(y_string + bytes(4), features, y_tables)


class CanceledLater(threading.Event):
    """An event that is set when it has been looked at three times."""

    looks = 0

    def is_set(self) -> bool:
        self.looks += 1
        return self.looks >= 3


def test_decoding_and_encoding_end_soon_after_they_are_canceled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = zoo.reference("mbt2018")
    y_string, features, _ = coded(net, 64, 256)
    ours, y_tables = model(net)
    filled: list[int] = []
    fill = context._Walk.fill

    def note(walk: context._Walk, i: int) -> None:
        filled.append(i)
        fill(walk, i)

    monkeypatch.setattr(context._Walk, "fill", note)
    monkeypatch.setattr(context, "CHECK", 8)
    y = torch.zeros(1, ours.M, *features.shape[2:])
    runs: tuple[Callable[[], Positions], ...] = (
        lambda: ours.decode(y_string, features, y_tables),
        lambda: ours.quantize(y, features),
    )
    for run in runs:
        filled.clear()
        with torch.inference_mode(), cancellation.cancelable(CanceledLater()):
            with pytest.raises(Canceled):
                run()
        assert filled == list(range(16))  # of 64
