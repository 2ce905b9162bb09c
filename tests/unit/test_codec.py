"""Encoding and decoding with the shipped weights, compared with CompressAI."""

import random
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from models import checkpoint, geometry
from models.codec import bitstream, codec, rans, zoo
from models.codec.codec import Codec
from models.codec.hyperprior import LatentCoder
from models.errors import BitstreamError, ChecksumMismatch, WeightsError, WrongWeights
from models.image import Pixels
from tests.support.compressai import Reference, mean_scale_hyperprior
from tests.support.data import psnr

pytestmark = pytest.mark.weights


@pytest.fixture(scope="module")
def reference(compressai: ModuleType) -> Reference:
    """CompressAI's model with the shipped weights, and with CDF tables that it computed itself."""
    entry = next(e for e in checkpoint.manifest() if e.quality == 2)
    weights = {k: v.float() for k, v in checkpoint.load(entry).items() if v.is_floating_point()}
    net = mean_scale_hyperprior(128, 192)
    net.update()
    net.load_state_dict({**net.state_dict(), **weights})
    net.update(force=True)
    return net.eval()


@pytest.mark.parametrize("profile", ["float", "exact"])
def test_a_picture_decodes_from_its_serialised_bitstream(
    shipped: Codec, small: Pixels, profile: bitstream.Profile
) -> None:
    b = shipped.encode(codec.to_tensor(small), "msh", profile)
    again = bitstream.parse(bitstream.serialize(b))
    ended: list[codec.Stage] = []
    pixels = shipped.decode(again, ended.append)
    assert pixels.shape == small.shape
    assert psnr(pixels, small) > 28
    assert ended == ["entropy", "g_s"]


def test_compressai_encodes_the_same_strings(
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
    ours = shipped.reconstruct(b)[1]
    assert (ours - theirs).abs().max() < 1e-4


def test_exact_latents_do_not_depend_on_threads_or_on_other_pictures_in_the_batch(
    shipped: Codec, photo: Pixels
) -> None:
    """A batch of two pictures also changes the order of the sums."""
    x = codec.to_tensor(photo)
    b = shipped.encode(x, "msh", "exact")
    exact = shipped.latent_coder._exact
    z = torch.round(shipped.net.h_a(shipped.net.g_a(codec.pad(x))) - shipped.latent_coder.medians)
    threads = torch.get_num_threads()
    try:
        results = []
        for n in (1, 2):
            torch.set_num_threads(n)
            results.append(shipped.latents(b).y_hat)
            whole = exact(z.int(), shipped.latent_coder.medians)[1]
            part = exact(z[..., :6].int(), shipped.latent_coder.medians)[1]
            flipped = exact(torch.cat([z.flip(0), z]).int(), shipped.latent_coder.medians)[1][1:]
            assert torch.equal(whole, flipped)
            assert torch.equal(whole[..., :16], part[..., :16])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


def test_a_bitstream_from_a_machine_that_rounds_differently_is_decoded_by_trying_other_arithmetics(
    shipped: Codec, small: Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One scale index differs from the encoder's, because a scale lies at the edge of the table."""
    b = shipped.encode(codec.to_tensor(small), "compressai", "float")
    expected = shipped.latents(b).symbols
    prior = LatentCoder._prior
    rng = random.Random(0)
    for _ in range(10):
        at = tuple(rng.randrange(n) for n in expected.shape)

        def other(self: LatentCoder, z: rans.Int32Array, arithmetic: str, at=at):  # type: ignore[no-untyped-def]
            indexes, means = prior(self, z, arithmetic)
            if arithmetic == "float":
                indexes = indexes.copy()
                indexes[at] += 1 if indexes[at] < 32 else -1
            return indexes, means

        monkeypatch.setattr(LatentCoder, "_prior", other)
        assert np.array_equal(shipped.latents(b).symbols, expected)


def test_the_exact_profile_makes_files_at_most_half_a_percent_larger(
    shipped: Codec, photo: Pixels
) -> None:
    x = codec.to_tensor(photo)
    exact, plain = (
        len(bitstream.serialize(shipped.encode(x, "msh", p))) for p in ("exact", "float")
    )
    assert exact <= 1.005 * plain


def test_the_error_names_weights_that_do_not_match(shipped: Codec, small_msh: bytes) -> None:
    b = replace(bitstream.parse(small_msh), weights_id="00" * 8)
    with pytest.raises(WrongWeights, match="0000000000000000"):
        shipped.latents(b)


def test_a_wrong_symbol_checksum_raises_an_error(shipped: Codec, small_msh: bytes) -> None:
    b = bitstream.parse(small_msh)
    assert b.symbols_crc is not None
    with pytest.raises(ChecksumMismatch, match="symbols"):
        shipped.latents(replace(b, symbols_crc=b.symbols_crc ^ 1))


def test_a_compressai_bitstream_with_a_flipped_bit_is_refused(
    shipped: Codec, small_compressai: bytes
) -> None:
    """Other arithmetics are tried too. Without a checksum, a few of 10,000 flips are accepted."""
    good = bitstream.parse(small_compressai)
    rng = random.Random(0)
    for _ in range(20):
        name = rng.choice(["y_string", "z_string"])
        old = getattr(good, name)
        changes: dict[str, Any] = {name: flipped(old, rng.randrange(8 * len(old)))}
        with pytest.raises(BitstreamError):
            shipped.latents(replace(good, **changes))


def test_a_flipped_bit_is_accepted_only_if_an_encoder_could_have_written_those_bytes(
    shipped: Codec, small_compressai: bytes
) -> None:
    """Flips every bit of y. Accepted bytes encode symbols of which at most 8 differ."""
    b, h = bitstream.parse(small_compressai), shipped.latent_coder
    rows, columns = geometry.padded(b.height, b.width)
    channel = np.arange(128, dtype=np.int32)[:, None, None]
    contexts = np.broadcast_to(channel, (128, rows // 64, columns // 64))
    z_symbols = rans.decode(b.z_string, contexts, h.z_tables)
    with torch.inference_mode():
        indexes = h._prior(z_symbols, "float")[0]
    symbols = rans.decode(b.y_string, indexes, h.y_tables)
    bits, accepted = 8 * len(b.y_string), 0
    for bit in range(bits):
        bad = flipped(b.y_string, bit)
        try:
            decoded = rans.decode(bad, indexes, h.y_tables)
        except BitstreamError:
            continue
        accepted += 1
        assert rans.encode(decoded, indexes, h.y_tables) == bad
        assert 1 <= np.count_nonzero(decoded != symbols) <= 8
    assert accepted < 2e-3 * bits


def test_swapped_strings_raise_an_error(shipped: Codec, small_compressai: bytes) -> None:
    good = bitstream.parse(small_compressai)
    with pytest.raises(BitstreamError):
        shipped.latents(replace(good, y_string=good.z_string, z_string=good.y_string))


def flipped(string: bytes, bit: int) -> bytes:
    bad = bytearray(string)
    bad[bit // 8] ^= 1 << bit % 8
    return bytes(bad)


def test_padding_is_centred_and_crop_removes_it() -> None:
    x = torch.rand(1, 3, 65, 130)
    padded = codec.pad(x)
    assert padded.shape == (1, 3, 128, 192)
    assert torch.equal(padded[:, :, 31, 31:161], x[:, :, 0])
    assert torch.equal(codec.crop(padded, 65, 130), x)


def test_pixels_round_trip_through_tensors(small: Pixels) -> None:
    assert np.array_equal(codec.to_pixels(codec.to_tensor(small)), small)


@pytest.mark.parametrize("quality", zoo.QUALITIES)
def test_every_shipped_quality_loads_with_the_weights_id_of_its_manifest(quality: int) -> None:
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


def test_a_file_whose_weights_id_differs_from_the_manifest_is_refused() -> None:
    entry = next(e for e in checkpoint.manifest() if e.quality == 2)
    with pytest.raises(WeightsError, match="weights id"):
        checkpoint.load(replace(entry, weights_id="00" * 8))


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(WeightsError):
        zoo.from_tensors({"conv.weight": torch.zeros(1)}, 2)


def test_shipped_tables_equal_those_that_compressai_computes(shipped: Codec) -> None:
    entry = next(e for e in checkpoint.manifest() if e.quality == 2)
    tensors = checkpoint.load(entry)
    computed = zoo.with_tables({k: v for k, v in tensors.items() if v.dtype == torch.float16})
    for name in ("entropy_bottleneck._quantized_cdf", "gaussian_conditional._quantized_cdf"):
        assert torch.equal(computed[name], tensors[name])
