"""Imported models of CompressAI's zoo: which decodes a file, and all tiers of their pictures."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from models import checkpoint, library
from models.codec import bitstream, catalogue, codec, context, interchange
from models.codec import zoo as codecs
from models.codec.bitstream import Bitstream, Reading
from models.codec.codec import Codec
from models.diffusion.decoder import Decoder
from models.errors import LengthMismatch, ParameterError, WeightsError, WrongWeights
from models.image import Pixels
from models.library import Library
from models.tiers import Settings
from tests.support import zoo
from tests.unit.test_bitstream import compressai_header

NAMES = ("bmshj2018-hyperprior", "bmshj2018-factorized", "bmshj2018-factorized-relu")
CODEC_PY = Reading("bmshj2018-factorized", "1.2.2 and later")


@pytest.fixture(scope="module")
def nets(compressai: ModuleType) -> dict[str, Any]:
    """CompressAI's networks of three models at quality 2."""
    return {name: zoo.reference(name, 128, 192) for name in NAMES}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, nets: dict[str, Any]) -> Path:
    """A folder into which the checkpoints of two of them were imported."""
    path = tmp_path_factory.mktemp("models")
    for name in NAMES[:2]:
        torch.save({"state_dict": nets[name].state_dict()}, path / "checkpoint.pth.tar")
        entry = interchange.install(path / "checkpoint.pth.tar", 2, "mse", path)
        assert catalogue.model_of(entry) == name  # told from the tensors
    return path


def written(net: Any, name: str, pixels: Pixels) -> bytes:
    """A file as CompressAI's `examples/codec.py` writes it."""
    x = codec.to_tensor(pixels)
    with torch.inference_mode():
        strings = [group[0] for group in net.compress(codec.pad(x))["strings"]] + [b""]
    height, width = pixels.shape[:2]
    y_string, z_string = strings[:2]
    return bitstream.serialize(
        Bitstream("compressai", "float", 2, "mse", height, width, y_string, z_string, model=name)
    )


def test_a_file_of_two_models_is_read_as_the_one_that_decodes_it(
    folder: Path, nets: dict[str, Any], small: Pixels, shipped: Codec
) -> None:
    """Id 2 was that of mbt2018-mean in CompressAI 1.2.0, and is that of a hyperprior today."""
    installed = library.load(with_decoders=False, folder=folder)
    today = bitstream.parse(written(nets[NAMES[0]], NAMES[0], small))
    encoded = shipped.encode(codec.to_tensor(small), "compressai", "float")
    data = bytearray(bitstream.serialize(encoded))
    data[0] = 2
    old = bitstream.parse(bytes(data))
    for b, model in ((today, NAMES[0]), (old, "mbt2018-mean")):
        assert {r.model for r in b.readings} == {NAMES[0], "mbt2018-mean"}
        assert installed.read(b).model == installed.codec(b).model == model
        assert installed.codec_id(b) == installed.codec(b).weights_id
        assert installed.codec(b).decode(b).shape == small.shape
    without = library.load(with_decoders=False)
    assert without.read(today).model == "mbt2018-mean"


def test_a_relu_file_of_compressais_program_is_decoded_with_the_weights_it_used(
    folder: Path, nets: dict[str, Any], small: Pixels
) -> None:
    """`examples/codec.py` loads the weights of bmshj2018-factorized under both names."""
    installed = library.load(with_decoders=False, folder=folder)
    b = bitstream.parse(written(nets[NAMES[1]], "bmshj2018-factorized-relu", small))
    assert (b.model, b.others) == ("bmshj2018-factorized-relu", (CODEC_PY,))
    assert installed.codec(b).model == "bmshj2018-factorized"
    assert len(np.unique(installed.codec(b).latents(b).symbols)) > 8


def test_the_error_for_missing_weights_names_all_models_of_a_file() -> None:
    installed = library.load(with_decoders=False)
    b = Bitstream("compressai", "float", 6, "mse", 64, 64, bytes(8), bytes(8))
    b = bitstream.parse(bitstream.serialize(b))
    for find in (installed.codec, installed.codec_id):
        with pytest.raises(WrongWeights, match="weights of mbt2018-mean or mbt2018 for quality 6"):
            find(b)


def test_a_model_with_the_same_id_in_all_versions_is_one_reading(
    nets: dict[str, Any], small: Pixels
) -> None:
    b = bitstream.parse(written(nets[NAMES[1]], NAMES[1], small))
    assert (b.versions, b.others) == ("1.2.2 and later", ())


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (compressai_header(model=5, code=7, z=(2, 3)), "quality 8; cheng2020-anchor has 1 to 6"),
        (compressai_header(model=0, z=(7, 10), strings=1), "y as 7×10 .* needs 8×12"),
        (compressai_header(model=0, z=(8, 12)), "2 strings; bmshj2018-factorized has 1"),
        (compressai_header(model=4, strings=1), "1 strings; mbt2018 .* 'cheng2020-anchor' "),
    ],
)
def test_a_header_that_contradicts_its_model_is_refused(header: bytes, message: str) -> None:
    with pytest.raises(LengthMismatch, match=message):
        bitstream.parse(header)


def test_a_diffusion_tier_takes_the_picture_of_any_codec(
    folder: Path, nets: dict[str, Any], small: Pixels, tiny_decoder: Decoder
) -> None:
    """The latents are hidden from the diffusion decoder, the bit map is that of y."""
    listed = library.load(with_decoders=False, folder=folder)
    installed = Library({}, {0: tiny_decoder}, listed.imports)
    for name in NAMES[:2]:
        b = bitstream.parse(written(nets[name], name, small))
        given = installed.diffusion_input(b, Settings("ddim", 1), 0)
        assert not given.latents_visible
        assert given.latents.bits.sum() == pytest.approx(8 * len(b.y_string), rel=0.05)
        assert installed.draw(b, Settings("ddim", 1), 0).shape == small.shape


def test_a_checkpoint_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    file = folder / "checkpoint.pth.tar"
    with pytest.raises(WeightsError, match="N = 192.*; it seems to be of bmshj2018-fac"):
        interchange.install(file, 2, "mse", tmp_path, model="mbt2018")
    with pytest.raises(ParameterError, match="quality is 9; bmshj2018-factorized has"):
        interchange.install(file, 9, "mse", tmp_path)
    with pytest.raises(ParameterError, match="--model bmshj2018-factorized$"):
        interchange.install_from_zoo(2, "mse", tmp_path, "bmshj2018-factorized-relu")


def test_warming_up_compiles_the_context_model_only_if_such_a_model_is_imported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(context, "warm_up", lambda: calls.append(True))
    for model, expected in (("", 0), ("bmshj2018-factorized", 0), ("cheng2020-attn", 1)):
        entry = checkpoint.Entry("codec", "", "", "", "", 1, "mse", model=model)
        rows = [catalogue.Installed(entry, Path())] if model else []
        Library({}, {}, codecs.Imports(rows)).warm_up()
        assert len(calls) == expected, model


def test_after_warming_up_the_first_autoregressive_decode_compiles_nothing() -> None:
    context.warm_up()
    kernels = context._convolve, context._crop, context._scale_indexes
    compiled = [len(kernel.signatures) for kernel in kernels]
    tensors = codecs.with_tables(zoo.random("mbt2018"))
    used = codecs.from_tensors(tensors, 1, model="mbt2018")
    x = torch.rand(1, 3, 64, 64)
    used.latents(used.encode(x, "compressai", "float"))
    assert [len(kernel.signatures) for kernel in kernels] == compiled
    assert all(compiled)
