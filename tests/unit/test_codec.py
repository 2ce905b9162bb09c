"""Pictures to bitstreams and back with the shipped weights, and CompressAI beside them."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from compressai.models import MeanScaleHyperprior as Reference

from models import checkpoint, geometry
from models.codec import bitstream, codec, rans, zoo
from models.codec.codec import Codec
from models.codec.hyperprior import Hyperprior
from models.errors import BitstreamError, ChecksumMismatch, WeightsError, WrongWeights
from models.image import Pixels
from tests.support.data import psnr

pytestmark = pytest.mark.weights


@pytest.fixture(scope="module")
def reference() -> Reference:
    """CompressAI's own model with the shipped weights and the tables that it makes of them."""
    entry = next(e for e in checkpoint.manifest() if e.quality == 2)
    weights = {k: v.float() for k, v in checkpoint.load(entry).items() if v.is_floating_point()}
    net = Reference(128, 192)
    net.update()
    net.load_state_dict({**net.state_dict(), **weights})
    net.update(force=True)
    return net.eval()


@pytest.mark.parametrize("profile", ["float", "exact"])
def test_a_picture_comes_back_from_its_bytes(
    shipped: Codec, small: Pixels, profile: bitstream.Profile
) -> None:
    b = shipped.encode(codec.to_tensor(small), "msh", profile)
    again = bitstream.parse(bitstream.serialize(b))
    x = codec.crop(shipped.synthesis(shipped.latents(again).y_hat), b.height, b.width)
    assert codec.to_pixels(x).shape == small.shape
    assert psnr(codec.to_pixels(x), small) > 28


def test_compressai_writes_the_same_strings(
    shipped: Codec, reference: Reference, small: Pixels
) -> None:
    x = codec.to_tensor(small)
    with torch.inference_mode():
        theirs = reference.compress(codec.pad(x))
    ours = shipped.encode(x, "compressai", "float")
    assert [ours.y_string] == theirs["strings"][0]
    assert [ours.z_string] == theirs["strings"][1]


def test_compressai_decodes_the_same_picture(
    shipped: Codec, reference: Reference, small: Pixels
) -> None:
    b = shipped.encode(codec.to_tensor(small), "compressai", "float")
    with torch.inference_mode():
        theirs = reference.decompress([[b.y_string], [b.z_string]], (2, 3))["x_hat"]
    ours = shipped.synthesis(shipped.latents(b).y_hat)
    assert (ours - theirs).abs().max() < 1e-4


def test_exact_latents_do_not_depend_on_threads_or_on_neighbours(
    shipped: Codec, photo: Pixels
) -> None:
    """Bit equality over threads, and against another order of sums: one batch of two pictures."""
    x = codec.to_tensor(photo)
    b = shipped.encode(x, "msh", "exact")
    exact = shipped.hyperprior._exact
    z = torch.round(shipped.net.h_a(shipped.net.g_a(codec.pad(x))) - shipped.hyperprior.medians)
    threads = torch.get_num_threads()
    try:
        found = []
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(shipped.latents(b).y_hat)
            whole = exact(z.int(), shipped.hyperprior.medians)[1]
            part = exact(z[..., :6].int(), shipped.hyperprior.medians)[1]
            flipped = exact(torch.cat([z.flip(0), z]).int(), shipped.hyperprior.medians)[1][1:]
            assert torch.equal(whole, flipped)
            assert torch.equal(whole[..., :16], part[..., :16])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_a_stream_of_another_arithmetic_is_decoded_by_trying_others(
    shipped: Codec, small: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine whose float32 puts one index across a table's edge still decodes the stream."""
    b = shipped.encode(codec.to_tensor(small), "compressai", "float")
    expected = shipped.latents(b).symbols
    prior = Hyperprior._prior
    rng = random.Random(0)
    for _ in range(10):
        at = tuple(rng.randrange(n) for n in expected.shape)

        def other(self: Hyperprior, z: rans.Int32Array, arithmetic: str, at=at):  # type: ignore[no-untyped-def]
            indexes, means = prior(self, z, arithmetic)
            if arithmetic == "float":
                indexes = indexes.copy()
                indexes[at] += 1 if indexes[at] < 32 else -1
            return indexes, means

        monkeypatch.setattr(Hyperprior, "_prior", other)
        assert np.array_equal(shipped.latents(b).symbols, expected)


def test_exact_costs_no_more_than_half_a_percent(shipped: Codec, photo: Pixels) -> None:
    x = codec.to_tensor(photo)
    exact, plain = (
        len(bitstream.serialize(shipped.encode(x, "msh", p))) for p in ("exact", "float")
    )
    assert exact <= 1.005 * plain


def test_other_weights_are_named(shipped: Codec, small_msh: bytes) -> None:
    b = replace(bitstream.parse(small_msh), weights_id="00" * 8)
    with pytest.raises(WrongWeights, match="0000000000000000"):
        shipped.latents(b)


def test_a_wrong_symbol_checksum_is_never_a_picture(shipped: Codec, small_msh: bytes) -> None:
    b = bitstream.parse(small_msh)
    assert b.symbols_crc is not None
    with pytest.raises(ChecksumMismatch, match="symbols"):
        shipped.latents(replace(b, symbols_crc=b.symbols_crc ^ 1))


def test_a_flipped_bit_of_a_compressai_stream_is_refused(
    shipped: Codec, small_compressai: bytes
) -> None:
    """Also by the other arithmetics. This format has no checksum: a few in 10,000 would pass."""
    good = bitstream.parse(small_compressai)
    rng = random.Random(0)
    for _ in range(20):
        name = rng.choice(["y_string", "z_string"])
        old = getattr(good, name)
        with pytest.raises(BitstreamError):
            shipped.latents(replace(good, **{name: flipped(old, rng.randrange(8 * len(old)))}))


def test_a_flipped_bit_passes_only_where_an_encoder_would_have_written_it(
    shipped: Codec, small_compressai: bytes
) -> None:
    """Every bit of y: what passes is another stream of the encoder, about one symbol away."""
    b, h = bitstream.parse(small_compressai), shipped.hyperprior
    rows, columns = geometry.padded(b.height, b.width)
    channel = np.arange(128, dtype=np.int32)[:, None, None]
    contexts = np.broadcast_to(channel, (128, rows // 64, columns // 64))
    z_symbols = rans.decode(b.z_string, contexts, h.z_tables)
    with torch.inference_mode():
        indexes = h._prior(z_symbols, "float")[0]
    symbols = rans.decode(b.y_string, indexes, h.y_tables)
    bits, passed = 8 * len(b.y_string), 0
    for bit in range(bits):
        bad = flipped(b.y_string, bit)
        try:
            found = rans.decode(bad, indexes, h.y_tables)
        except BitstreamError:
            continue
        passed += 1
        assert rans.encode(found, indexes, h.y_tables) == bad
        assert 1 <= np.count_nonzero(found != symbols) <= 8
    assert passed < 2e-3 * bits


def test_swapped_strings_are_an_error(shipped: Codec, small_compressai: bytes) -> None:
    good = bitstream.parse(small_compressai)
    with pytest.raises(BitstreamError):
        shipped.latents(replace(good, y_string=good.z_string, z_string=good.y_string))


def flipped(string: bytes, bit: int) -> bytes:
    bad = bytearray(string)
    bad[bit // 8] ^= 1 << bit % 8
    return bytes(bad)


def test_padding_is_centred_and_taken_away_again() -> None:
    x = torch.rand(1, 3, 65, 130)
    padded = codec.pad(x)
    assert padded.shape == (1, 3, 128, 192)
    assert torch.equal(padded[:, :, 31, 31:161], x[:, :, 0])
    assert torch.equal(codec.crop(padded, 65, 130), x)


def test_pixels_survive_the_way_to_tensors_and_back(small: Pixels) -> None:
    assert np.array_equal(codec.to_pixels(codec.to_tensor(small)), small)


@pytest.mark.parametrize("quality", zoo.QUALITIES)
def test_every_shipped_quality_loads_and_bears_its_manifest_id(quality: int) -> None:
    loaded = zoo.load(quality)
    entry = next(e for e in checkpoint.manifest() if e.quality == quality)
    assert loaded.weights_id == entry.weights_id


def test_an_altered_weights_file_is_refused(tmp_path: Path) -> None:
    entry = next(e for e in checkpoint.manifest() if e.quality == 2)
    data = bytearray((checkpoint.WEIGHTS / entry.file).read_bytes())
    data[-1] ^= 1
    (tmp_path / entry.file).write_bytes(data)
    with pytest.raises(WeightsError, match="not the file"):
        checkpoint.load(entry, tmp_path)


def test_a_weights_id_that_is_not_the_tensors_is_refused() -> None:
    entry = next(e for e in checkpoint.manifest() if e.quality == 2)
    with pytest.raises(WeightsError, match="weights id"):
        checkpoint.load(replace(entry, weights_id="00" * 8))


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(WeightsError):
        zoo.from_tensors({"conv.weight": torch.zeros(1)}, 2)


def test_tables_are_those_of_compressai(shipped: Codec) -> None:
    entry = next(e for e in checkpoint.manifest() if e.quality == 2)
    tensors = checkpoint.load(entry)
    made = zoo.with_tables({k: v for k, v in tensors.items() if v.dtype == torch.float16})
    for name in ("entropy_bottleneck._quantized_cdf", "gaussian_conditional._quantized_cdf"):
        assert torch.equal(made[name], tensors[name])
