"""CompressAI's checkpoints in and out, and which weights are found for a bitstream."""

import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressai.models import MeanScaleHyperprior as Reference
from compressai.zoo import image as published
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import checkpoint, library
from models.codec import bitstream, catalogue, codec, interchange, zoo
from models.codec.bitstream import Bitstream
from models.codec.codec import Codec
from models.diffusion import decoder
from models.diffusion.decoder import Decoder
from models.errors import ParameterError, WeightsError, WrongWeights
from models.image import Pixels
from models.library import Library
from models.tiers import Settings

State = dict[str, Tensor]
FAST = Settings("ddim", 2)


def random_codec(n: int, m: int, seed: int) -> Reference:
    """CompressAI's network with random weights whose latents are spread over several symbols."""
    torch.manual_seed(seed)
    net = Reference(n, m)
    with torch.no_grad():
        net.g_a[6].weight.mul_(30)
        net.h_a[4].weight.mul_(10)
        net.h_s[4].bias[:m] = torch.linspace(0.2, 4, m)
    net.update()
    return net.eval()


@pytest.fixture(scope="module")
def foreign() -> Reference:
    """Of the size that quality 5 has."""
    return random_codec(192, 320, 0)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, foreign: Reference) -> Path:
    """Its checkpoint."""
    path = tmp_path_factory.mktemp("checkpoint") / "foreign.pth.tar"
    torch.save(foreign.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, file: Path) -> Path:
    """The user's, with the checkpoint imported as quality 5."""
    made = tmp_path_factory.mktemp("own")
    interchange.install(file, 5, "mse", made)
    return made


@pytest.fixture
def parameters() -> State:
    """Of quality 2 as shipped, without tables."""
    row = catalogue.find(catalogue.shipped(), 2, "mse")
    assert row is not None
    tensors = checkpoint.load(row.entry, row.folder)
    return {k: v.float() for k, v in tensors.items() if k not in zoo.TABLES}


def compressed(net: Reference, pixels: Pixels, quality: int) -> tuple[Bitstream, Tensor]:
    """What CompressAI itself makes of a picture, and what it decodes that to."""
    x = codec.to_tensor(pixels)
    with torch.inference_mode():
        made = net.compress(codec.pad(x))
        x_hat = net.decompress(made["strings"], made["shape"])["x_hat"]
    strings = made["strings"][0][0], made["strings"][1][0]
    height, width = pixels.shape[:2]
    b = Bitstream("compressai", "float", quality, "mse", height, width, *strings)
    return bitstream.parse(bitstream.serialize(b)), x_hat


def test_streams_of_the_original_encoder_decode_with_its_checkpoint(
    folder: Path, foreign: Reference, small: Pixels
) -> None:
    own = library.load(with_decoder=False, folder=folder)
    b, theirs = compressed(foreign, small, 5)
    latents, ours = own.instant(b)
    assert (ours - theirs).abs().max() < 1e-4
    assert len(np.unique(latents.symbols)) > 8


def test_the_parameters_are_those_of_compressai(foreign: Reference) -> None:
    theirs = {name: tuple(p.shape) for name, p in foreign.named_parameters()}
    assert interchange.parameters(192, 320) == theirs


def test_tables_are_kept_to_the_digit(tmp_path: Path, foreign: Reference) -> None:
    """Also where `update()` would make others: only these decode what was encoded with them."""
    state = {k: v.clone() for k, v in foreign.state_dict().items()}
    cdf = state["gaussian_conditional._quantized_cdf"]
    cdf[7, 3] += 1
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "a.pth")
    entry = interchange.install(tmp_path / "a.pth", 5, "mse", tmp_path)
    kept = checkpoint.load(entry, tmp_path)
    assert set(zoo.TABLES) < set(kept)
    for name, value in kept.items():
        assert value.dtype == (torch.int32 if value.dtype == torch.int32 else torch.float32)
        assert torch.equal(value, state[name]), name


def test_tables_are_made_where_there_are_none(tmp_path: Path, parameters: State) -> None:
    save_file(parameters, tmp_path / "a.safetensors")
    entry = interchange.install(tmp_path / "a.safetensors", 2, "ms-ssim", tmp_path)
    made, shipped = checkpoint.load(entry, tmp_path), zoo.load(2)
    tables = shipped.hyperprior.y_tables
    assert np.array_equal(made["gaussian_conditional._quantized_cdf"].numpy(), tables.cdf)
    assert (entry.quality, entry.metric, entry.source) == (2, "ms-ssim", "a.safetensors")


def old_names(state: State) -> State:
    """As `DataParallel` and CompressAI before 1.2.7 wrote them."""
    for new, old in (("matrices.", "_matrix"), ("biases.", "_bias"), ("factors.", "_factor")):
        state = {k.replace(f"neck.{new}", f"neck.{old}"): v for k, v in state.items()}
    return {f"module.{k}": v for k, v in state.items()}


def oldest_names(state: State) -> State:
    """As CompressAI 1.0 wrote them."""
    for new in ("matrices.", "biases.", "factors."):
        state = {k.replace(f"neck.{new}", f"neck._{new}"): v for k, v in state.items()}
    return state


def test_the_id_does_not_depend_on_the_form_of_the_checkpoint(
    tmp_path: Path, foreign: Reference, folder: Path
) -> None:
    (entry,) = checkpoint.manifest(folder)
    state = foreign.state_dict()
    torch.save({"state_dict": old_names(state), "loss": 1.0}, tmp_path / "old.pth")
    torch.save(oldest_names(state), tmp_path / "oldest.pth.tar")
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "a.safetensors")
    for name in ("old.pth", "oldest.pth.tar", "a.safetensors"):
        tensors = interchange.checked(interchange.read(tmp_path / name), 5)
        assert checkpoint.weights_id(tensors) == entry.weights_id, name


class Harm:
    """What a checkpoint must not be able to do."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return os.system, ("exit 1",)


def without(name: str) -> Callable[[State], object]:
    return lambda state: {k: v for k, v in state.items() if k != name}


def with_tensor(name: str, value: Tensor) -> Callable[[State], object]:
    return lambda state: {**state, name: value}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without("h_s.2.bias"), "h_s.2.bias is missing"),
        (
            with_tensor("g_s.0.weight", torch.zeros(320, 192, 5, 5)),
            r"g_s.0.weight has the shape \(320, 192, 5, 5\); quality 2 \(N = 128, M = 192\) has "
            r"\(192, 128, 5, 5\)",
        ),
        (with_tensor("context_prediction.bias", torch.zeros(3)), "context_prediction.bias is no"),
        (with_tensor("h_a.0.bias", torch.full((128,), torch.nan)), "h_a.0.bias holds"),
        (with_tensor("h_a.0.bias", torch.zeros(128, dtype=torch.int32)), "h_a.0.bias holds"),
        (
            with_tensor("entropy_bottleneck._offset", torch.zeros(128, dtype=torch.int32)),
            "_quantized_cdf is missing, while entropy_bottleneck._offset",
        ),
        (lambda state: [state], "but a list"),
        (lambda state: {"net": state}, "'net' is no plain tensor"),
        (with_tensor("h_a.0.bias", torch.zeros(128).to_sparse()), "'h_a.0.bias' is no plain"),
        (with_tensor("h_a.0.bias", torch.zeros(128, device="meta")), "'h_a.0.bias' is no plain"),
        (with_tensor("h_a.0.bias", torch.zeros(1).expand(10**13)), "'h_a.0.bias' is no plain"),
        (lambda state: {"state_dict": 3}, "but a int"),
        (lambda state: state | {"x": Harm()}, "tensors alone"),
    ],
)
def test_what_is_wrong_with_a_checkpoint_is_named(
    tmp_path: Path, parameters: State, change: Callable[[State], object], said: str
) -> None:
    torch.save(change(parameters), tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match=f"bad.pth: .*{said}") as caught:
        interchange.install(tmp_path / "bad.pth", 2, "mse", tmp_path / "own")
    assert str(caught.value).isprintable()
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("data", [b"", b"hello", bytes(1000), pickle.dumps(Harm())])
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(WeightsError, match="tensors alone"):
        interchange.install(tmp_path / name, 2, "mse", tmp_path / "own")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("gaussian_conditional._quantized_cdf", torch.ones(64, 9, dtype=torch.int32), "CDF"),
        ("gaussian_conditional._offset", torch.full((64,), 2**32), "_offset holds"),
        ("gaussian_conditional._offset", torch.tensor(0), "1] CDFs"),
        ("gaussian_conditional._cdf_length", torch.zeros(64), "_cdf_length holds"),
        ("gaussian_conditional.scale_table", torch.full((64,), torch.nan), "scale_table holds"),
        ("gaussian_conditional.scale_table", torch.linspace(0.1, 1, 64)[:, None], "scale table"),
        ("gaussian_conditional.scale_table", torch.linspace(0.1, 1, 63), "63 scales"),
        ("gaussian_conditional.scale_table", torch.zeros(64), "scale table"),
    ],
)
def test_tables_that_cannot_be_are_refused(
    tmp_path: Path, foreign: Reference, name: str, value: Tensor, said: str
) -> None:
    torch.save(foreign.state_dict() | {name: value}, tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match=said):
        interchange.install(tmp_path / "bad.pth", 5, "mse", tmp_path / "own")


def test_weights_of_any_precision_are_kept_in_float32(tmp_path: Path, parameters: State) -> None:
    """So that an export comes back under the same id."""
    for i, kind in enumerate((torch.float16, torch.float32, torch.float64)):  # shipped: float16
        torch.save({k: v.to(kind) for k, v in parameters.items()}, tmp_path / f"{i}.pth")
        interchange.install(tmp_path / f"{i}.pth", 2, "mse", tmp_path)
    (entry,) = checkpoint.manifest(tmp_path)
    assert checkpoint.load(entry, tmp_path)["g_s.0.weight"].dtype == torch.float32


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(OSError, match="a.safetensors"):
        catalogue.install({"a": torch.zeros(1)}, "a", tmp_path, {"kind": "codec"})
    with pytest.raises(OSError, match="a.safetensors"):
        interchange.write({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("name", ["q2.pth", "q2.pth.tar", "q2.safetensors"])
def test_compressai_decodes_with_what_is_exported(
    tmp_path: Path, shipped: Codec, small: Pixels, name: str
) -> None:
    row = catalogue.find(catalogue.shipped(), 2, "mse")
    assert row is not None
    tensors = checkpoint.load(row.entry, row.folder)
    interchange.write(interchange.to_compressai(tensors), tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    torch_file = name != "q2.safetensors"
    state = torch.load(tmp_path / name) if torch_file else load_file(tmp_path / name)
    net = Reference(128, 192)
    net.load_state_dict(state)
    b, theirs = compressed(net.eval(), small, 2)
    assert (shipped.synthesis(shipped.latents(b).y_hat) - theirs).abs().max() < 1e-4


def test_an_export_is_written_by_known_names_only(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=".safetensors"):
        interchange.write({}, tmp_path / "a.bin")


def test_what_is_exported_is_imported_under_the_same_id(tmp_path: Path, folder: Path) -> None:
    (entry,) = checkpoint.manifest(folder)
    state = interchange.to_compressai(checkpoint.load(entry, folder))
    interchange.write(state, tmp_path / "out.pth")
    assert interchange.install(tmp_path / "out.pth", 5, "mse", tmp_path).weights_id == (
        entry.weights_id
    )


def test_the_zoo_is_a_download_and_an_import(
    tmp_path: Path, file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = sha256(file.read_bytes()).hexdigest()[:8]
    for name, said in ((digest, ""), ("0" * 8, "hash"), ("f" * 8, "No such file")):
        stored = tmp_path / f"mbt2018-mean-ms-ssim-5-{name}.pth.tar"
        if name != "f" * 8:
            shutil.copy(file, stored)
        monkeypatch.setitem(published.model_urls["mbt2018-mean"]["ms-ssim"], 5, stored.as_uri())
        if said:
            with pytest.raises(WeightsError, match=f"{stored.name} cannot be .*{said}"):
                interchange.install_from_zoo(5, "ms-ssim", tmp_path / "own")
        else:
            entry = interchange.install_from_zoo(5, "ms-ssim", tmp_path / "own")
            assert (entry.metric, entry.source) == ("ms-ssim", f"zoo: {stored.name}")
            assert entry.weights_id == checkpoint.manifest(folder)[0].weights_id
    assert len(checkpoint.manifest(tmp_path / "own")) == 1


@pytest.fixture(scope="module")
def rivals(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Reference]]:
    """A user's folder with two codecs for the quality 2 that is shipped, in this order."""
    made = tmp_path_factory.mktemp("rivals")
    nets = [random_codec(128, 192, seed) for seed in (1, 2)]
    for net in nets:
        torch.save(net.state_dict(), made / "a.pth")
        interchange.install(made / "a.pth", 2, "mse", made)
    return made, nets


def test_streams_find_their_own_weights(
    rivals: tuple[Path, list[Reference]], small: Pixels, small_msh: bytes
) -> None:
    """By id, whatever else was imported; without an id the last import counts."""
    folder, nets = rivals
    own = library.load(with_decoder=False, folder=folder)
    first, last = (e.weights_id for e in checkpoint.manifest(folder))
    b = bitstream.parse(small_msh)
    assert own.codec(b).weights_id == b.weights_id == zoo.load(2).weights_id
    assert own.find(2, "mse").weights_id == last
    for weights_id in (first, last):
        made = own.find(2, "mse", weights_id).encode(codec.to_tensor(small), "msh", "exact")
        b = bitstream.parse(bitstream.serialize(made))
        assert b.weights_id == weights_id == own.codec_id(b)
        own.instant(b)
    b, theirs = compressed(nets[1], small, 2)
    assert (own.instant(b)[1] - theirs).abs().max() < 1e-4


def test_weights_that_are_not_installed_are_named(folder: Path, small_msh: bytes) -> None:
    own = library.load(with_decoder=False, folder=folder)
    b = bitstream.parse(small_msh)
    for wrong, said in (
        (replace(b, weights_id="00" * 8), "0000000000000000"),
        (replace(b, quality=3), "quality 3"),
        (replace(b, metric="ms-ssim"), "metric ms-ssim"),
        (replace(b, quality=5), b.weights_id),
        (replace(b, quality=6, weights_id=""), "no weights for quality 6"),
    ):
        for look in (own.codec, own.codec_id):
            with pytest.raises(WrongWeights, match=said):
                look(wrong)


def test_imports_are_loaded_when_they_are_needed_and_few_are_kept(
    rivals: tuple[Path, list[Reference]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo, "KEPT", 1)
    rows = [*catalogue.imported(rivals[0]), *catalogue.imported(folder)]
    imports = zoo.Imports(rows)
    found = [imports.find(r.entry.quality, "mse", r.entry.weights_id) for r in rows]
    assert found == rows
    assert not imports._loaded
    first = imports.load(rows[0])
    assert imports.load(rows[0]) is first
    assert imports.load(rows[2]).net.M == 320
    assert list(imports._loaded) == [rows[2]]


def test_the_diffusion_decoder_is_not_shown_latents_of_imports(
    tiny_decoder: Decoder, shipped: Codec, folder: Path, foreign: Reference, small: Pixels
) -> None:
    imports = zoo.Imports(catalogue.imported(folder))
    own = Library({(2, "mse"): shipped}, tiny_decoder, imports)
    b, _ = compressed(foreign, small, 5)
    latents, x_hat = own.instant(b)
    assert latents.y_hat.shape[1] == 320
    hidden = tiny_decoder.sample(latents, x_hat, 5, FAST, 3, latents_visible=False)
    drawn = codec.to_pixels(codec.crop(hidden, b.height, b.width))
    assert np.array_equal(own.perceptual(b, FAST, 3), drawn)

    b = shipped.encode(codec.to_tensor(small), "msh", "exact")
    seen = tiny_decoder.sample(*own.instant(b), 2, FAST, 3)
    drawn = codec.to_pixels(codec.crop(seen, b.height, b.width))
    assert np.array_equal(own.perceptual(b, FAST, 3), drawn)


@pytest.mark.weights
def test_the_shipped_decoder_draws_from_a_foreign_codec(
    folder: Path, foreign: Reference, small: Pixels
) -> None:
    own = Library({}, decoder.load(), zoo.Imports(catalogue.imported(folder)))
    b, _ = compressed(foreign, small, 5)
    assert own.perceptual(b, Settings("ddim", 1), 0).shape == small.shape


def test_removed_weights_are_gone(tmp_path: Path, folder: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(folder, own)
    (row,) = catalogue.imported(own)
    catalogue.remove(row)
    assert catalogue.imported(own) == []
    assert [p.name for p in own.iterdir()] == [catalogue.MANIFEST]


def test_sources_of_any_name_go_into_the_manifest(tmp_path: Path) -> None:
    names = ['a "b" \\ c', "ü 🦜", "line\nbreak \x7f \x1b", "bad \udcff"]
    for quality, source in enumerate(names, 1):
        row = {"kind": "codec", "quality": quality, "metric": "mse", "source": source}
        catalogue.install({"a": torch.zeros(quality)}, f"q{quality}", tmp_path, row)
    told = [e.source for e in checkpoint.manifest(tmp_path)]
    assert told == ['a "b" \\ c', "ü 🦜", "line?break ? ?", "bad ?"]


@pytest.mark.parametrize("folder", ["../", "/etc/", "sub/"])
def test_a_manifest_names_files_of_its_own_folder_only(tmp_path: Path, folder: str) -> None:
    row = {"kind": "codec", "quality": 2, "metric": "mse"}
    catalogue.install({"a": torch.zeros(1)}, "a", tmp_path, row)
    manifest = tmp_path / catalogue.MANIFEST
    manifest.write_text(manifest.read_text().replace('"a.safe', f'"{folder}a.safe'))
    with pytest.raises(WeightsError, match="lies outside"):
        catalogue.imported(tmp_path)


def test_a_broken_manifest_of_the_users_is_named(tmp_path: Path) -> None:
    (tmp_path / catalogue.MANIFEST).write_bytes(b"[[weights]]\nname = \xff")
    with pytest.raises(WeightsError, match="manifest.toml"):
        library.load(with_decoder=False, folder=tmp_path)
    assert catalogue.imported(tmp_path / "nothing") == []
