"""Bitstreams of every architecture of CompressAI's zoo decode to its symbols and its picture."""

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from models import geometry, tiles
from models.codec import architectures, bitstream, codec, state_dicts
from models.codec import zoo as codecs
from models.codec.architectures import ARCHITECTURES
from models.codec.bitstream import Bitstream, Metric
from models.codec.codec import Codec
from models.errors import CorruptStream, DesynchronisedStream, ParameterError
from tests.support import zoo

SIZES = ((1, 1), (17, 33), (64, 64), (150, 100))


@pytest.fixture(scope="module", params=ARCHITECTURES)
def theirs(request: pytest.FixtureRequest, compressai: ModuleType) -> Any:
    """CompressAI's network of one architecture; its name is `theirs.name`."""
    net = zoo.reference(request.param)
    net.name = request.param
    return net


@pytest.fixture(scope="module")
def ours(theirs: Any) -> Codec:
    """The codec with the same weights and tables, imported as quality 1."""
    return codecs.from_tensors(codecs.with_tables(zoo.parameters(theirs)), 1, model=theirs.name)


def encoded(net: Any, x: torch.Tensor, metric: Metric = "mse") -> Bitstream:
    """Encode `x` with CompressAI; return the parsed file, as its `examples/codec.py` writes it."""
    with torch.inference_mode():
        strings = [group[0] for group in net.compress(codec.pad(x))["strings"]]
    height, width = x.shape[2:]
    z_string = strings[1] if len(strings) > 1 else b""
    b = Bitstream(
        "compressai", "float", 1, metric, height, width, strings[0], z_string, model=net.name
    )
    return bitstream.parse(bitstream.serialize(b))


@pytest.mark.parametrize("size", SIZES)
def test_bitstreams_of_compressai_decode_to_its_picture(
    theirs: Any, ours: Codec, size: tuple[int, int]
) -> None:
    torch.manual_seed(3)
    x = torch.rand(1, 3, *size)
    b = encoded(theirs, x, "ms-ssim" if size == (1, 1) else "mse")
    strings = [[b.y_string], [b.z_string]][: len(ARCHITECTURES[theirs.name].strings)]
    stride = 64 if b.z_string else 16
    shape = [side // stride for side in geometry.padded(*size)]
    with torch.inference_mode():
        x_hat = theirs.decompress(strings, shape)["x_hat"]
    latents, picture = ours.reconstruct(b)
    torch.testing.assert_close(picture, x_hat, rtol=0, atol=1e-4)
    assert len(np.unique(latents.symbols)) > 8
    assert latents.bits.shape == latents.symbols.shape[1:]
    assert ours.decode(b).shape == (*size, 3)


def test_the_encoder_writes_the_bytes_of_compressai(theirs: Any, ours: Codec) -> None:
    x = torch.rand(1, 3, 64, 128)
    b = encoded(theirs, x)
    mine = ours.encode(x, "compressai", "float")
    assert (mine.y_string, mine.z_string) == (b.y_string, b.z_string)
    assert mine.model == theirs.name


def test_only_the_default_model_is_written_as_msh(theirs: Any, ours: Codec) -> None:
    x = torch.zeros(1, 3, 64, 64)
    if theirs.name == architectures.DEFAULT:
        assert ours.encode(x, "msh", "exact").format == "msh"
    else:
        with pytest.raises(ParameterError, match="mbt2018-mean only; .* format compressai"):
            ours.encode(x, "msh", "exact")


def test_damaged_strings_are_refused(theirs: Any, ours: Codec) -> None:
    b = encoded(theirs, torch.rand(1, 3, 64, 64))
    at = len(b.y_string) // 2
    for wrong in (b.y_string[:at] + b"\xff" * 8 + b.y_string[at + 8 :], b.y_string[: at & ~3], b""):
        with pytest.raises((CorruptStream, DesynchronisedStream)):
            ours.latents(replace(b, y_string=wrong))
    if b.z_string:
        with pytest.raises((CorruptStream, DesynchronisedStream)):
            ours.latents(replace(b, z_string=b.z_string[:-4]))


def test_large_pictures_in_windows_equal_whole_ones(
    theirs: Any, ours: Codec, monkeypatch: pytest.MonkeyPatch
) -> None:
    y_hat = torch.randn(1, ours.net.M, 30, 40) * 3
    with torch.inference_mode():
        x_hat = ours.net.g_s(y_hat).clamp(0, 1)
        y = ours.net.g_a(x_hat)
        monkeypatch.setattr(tiles, "CODEC_WINDOW", 26**2)
        overlap = ARCHITECTURES[theirs.name].overlap
        torch.testing.assert_close(ours.synthesis(y_hat), x_hat, rtol=0, atol=1e-4)
        again = tiles.analyse(ours.net.g_a, x_hat, ours.net.M, overlap)
    torch.testing.assert_close(again, y, rtol=1e-4, atol=1e-4)


def test_the_model_is_told_from_the_tensors(theirs: Any, ours: Codec) -> None:
    assert state_dicts.detect(zoo.parameters(theirs)) == theirs.name


def test_an_exported_state_dict_is_that_of_compressai(theirs: Any) -> None:
    tensors = codecs.with_tables(zoo.parameters(theirs))
    state = state_dicts.to_compressai(tensors, theirs.name)
    expected = theirs.state_dict()
    assert set(state) == set(expected)
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
