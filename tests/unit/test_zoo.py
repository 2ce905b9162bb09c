"""Import and export of checkpoints, and the choice of weights for a bitstream."""

import os
import pickle
import shutil
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import checkpoint, library
from models.codec import bitstream, catalogue, codec, interchange, published, state_dicts, zoo
from models.codec.bitstream import Bitstream, Metric
from models.codec.codec import Codec
from models.diffusion import decoder
from models.diffusion.decoder import Decoder
from models.errors import ParameterError, WeightsError, WrongWeights
from models.image import Pixels
from models.library import Library
from models.tiers import Settings
from tests.support.compressai import Reference, mean_scale_hyperprior

State = dict[str, Tensor]
FAST = Settings("ddim", 2)


def random_codec(n: int, m: int, seed: int) -> Reference:
    """CompressAI's network with random weights, scaled so that its latents have many values."""
    torch.manual_seed(seed)
    net = mean_scale_hyperprior(n, m)
    with torch.no_grad():
        net.g_a[6].weight.mul_(30)
        net.h_a[4].weight.mul_(10)
        net.h_s[4].bias[:m] = torch.linspace(0.2, 4, m)
    net.update()
    return net.eval()


@pytest.fixture(scope="module")
def foreign(compressai: ModuleType) -> Reference:
    """A random codec with the size of quality 5."""
    return random_codec(192, 320, 0)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, foreign: Reference) -> Path:
    """The checkpoint of `foreign`."""
    path = tmp_path_factory.mktemp("checkpoint") / "foreign.pth.tar"
    torch.save(foreign.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, file: Path) -> Path:
    """A user's weights folder, into which `file` was imported as quality 5."""
    path = tmp_path_factory.mktemp("imported")
    interchange.install(file, 5, "mse", path)
    return path


@pytest.fixture(scope="module")
def parameters() -> State:
    """The parameters of the shipped quality 2, without CDF tables. Tests must not change them."""
    row = catalogue.find(catalogue.shipped(), 2, "mse")
    assert row is not None
    tensors = checkpoint.load(row.entry, row.folder)
    return {k: v.float() for k, v in tensors.items() if k not in zoo.TABLES}


@pytest.fixture(scope="module")
def complete(parameters: State) -> State:
    """The same with CDF tables."""
    return parameters | zoo.with_tables(parameters)


def compressed(net: Reference, pixels: Pixels, quality: int) -> tuple[Bitstream, Tensor]:
    """Encode a picture with CompressAI; return the bitstream and the picture it decodes."""
    x = codec.to_tensor(pixels)
    with torch.inference_mode():
        encoded = net.compress(codec.pad(x))
        x_hat = net.decompress(encoded["strings"], encoded["shape"])["x_hat"]
    strings = encoded["strings"][0][0], encoded["strings"][1][0]
    height, width = pixels.shape[:2]
    b = Bitstream("compressai", "float", quality, "mse", height, width, *strings)
    return bitstream.parse(bitstream.serialize(b)), x_hat


def test_bitstreams_of_compressai_decode_with_its_checkpoint(
    folder: Path, foreign: Reference, small: Pixels
) -> None:
    installed = library.load(with_decoders=False, folder=folder)
    b, theirs = compressed(foreign, small, 5)
    latents, ours = installed.codec(b).reconstruct(b)
    assert (ours - theirs).abs().max() < 1e-4
    assert len(np.unique(latents.symbols)) > 8


def test_a_shipped_codec_is_loaded_on_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[int] = []
    load = zoo.load

    def counted(quality: int, metric: Metric) -> Codec:
        loaded.append(quality)
        return load(quality, metric)

    monkeypatch.setattr(zoo, "load", counted)
    installed = library.load(with_decoders=False, lazily=True)
    assert list(installed.codecs) == [(1, "mse"), (2, "mse"), (3, "mse")]
    assert (9, "mse") not in installed.codecs
    assert not loaded
    assert installed.find(2, "mse") is installed.find(2, "mse")
    with pytest.raises(WrongWeights):
        installed.find(9, "mse")
    assert loaded == [2]


def test_parameter_names_and_shapes_equal_those_of_compressai(foreign: Reference) -> None:
    theirs = {name: tuple(p.shape) for name, p in foreign.named_parameters()}
    assert state_dicts.parameters("mbt2018-mean", 192, 320) == theirs


def test_tables_in_a_checkpoint_are_kept_unchanged(tmp_path: Path, foreign: Reference) -> None:
    """Even if `update()` computes others: only the same tables decode existing bitstreams."""
    state = {k: v.clone() for k, v in foreign.state_dict().items()}
    cdf = state["gaussian_conditional._quantized_cdf"]
    cdf[7, 3] += 1
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "a.pth")
    entry = interchange.install(tmp_path / "a.pth", 5, "mse", tmp_path)
    stored = checkpoint.load(entry, tmp_path)
    assert set(zoo.TABLES) < set(stored)
    for name, value in stored.items():
        assert value.dtype == (torch.int32 if value.dtype == torch.int32 else torch.float32)
        assert torch.equal(value, state[name]), name


def test_missing_tables_are_computed(tmp_path: Path, parameters: State) -> None:
    save_file(parameters, tmp_path / "a.safetensors")
    entry = interchange.install(tmp_path / "a.safetensors", 2, "ms-ssim", tmp_path)
    stored, shipped = checkpoint.load(entry, tmp_path), zoo.load(2)
    tables = shipped.latent_coder.y_tables
    assert np.array_equal(stored["gaussian_conditional._quantized_cdf"].numpy(), tables.cdf)
    assert (entry.quality, entry.metric, entry.source) == (2, "ms-ssim", "a.safetensors")


def old_names(state: State) -> State:
    """Rename as `DataParallel` and CompressAI before 1.2.7 did."""
    for new, old in (("matrices.", "_matrix"), ("biases.", "_bias"), ("factors.", "_factor")):
        state = {k.replace(f"neck.{new}", f"neck.{old}"): v for k, v in state.items()}
    return {f"module.{k}": v for k, v in state.items()}


def oldest_names(state: State) -> State:
    """Rename as CompressAI 1.0 did."""
    for new in ("matrices.", "biases.", "factors."):
        state = {k.replace(f"neck.{new}", f"neck._{new}"): v for k, v in state.items()}
    return state


def test_the_weights_id_does_not_depend_on_the_format_of_the_checkpoint(
    tmp_path: Path, foreign: Reference, folder: Path
) -> None:
    (entry,) = checkpoint.manifest(folder)
    state = foreign.state_dict()
    torch.save({"state_dict": old_names(state), "loss": 1.0}, tmp_path / "old.pth")
    torch.save(oldest_names(state), tmp_path / "oldest.pth.tar")
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "a.safetensors")
    for name in ("old.pth", "oldest.pth.tar", "a.safetensors"):
        tensors = interchange.validate(interchange.read(tmp_path / name), 5)
        assert checkpoint.weights_id(tensors) == entry.weights_id, name


def prefixed(prefix: str) -> Callable[[State], object]:
    return lambda state: {prefix + k: v for k, v in state.items()}


def wrapped(*wrappers: str) -> Callable[[State], object]:
    """Put a state dict under `wrappers`, innermost last, each beside other entries."""

    def wrap(state: State) -> object:
        found: object = state
        for wrapper in reversed(wrappers):
            found = {"epoch": 3, wrapper: found, "optimizer": {"state": {0: {"step": 1.0}}}}
        return found

    return wrap


def compiled_in_part(state: State) -> State:
    """Rename as `torch.compile` does if it is given `g_a` alone, and `DataParallel` given `h_s`."""
    state = {k.replace("g_a.", "g_a._orig_mod."): v for k, v in state.items()}
    return {k.replace("h_s.", "h_s.module."): v for k, v in state.items()}


@pytest.mark.parametrize(
    "change",
    [
        *(wrapped(w) for w in ("state_dict", "net", "model", "network")),
        *(wrapped(w) for w in ("model_state_dict", "net_state_dict")),
        wrapped("model", "state_dict"),
        wrapped("state_dict", "net"),
        *(prefixed(p) for p in ("module.", "_orig_mod.", "model.", "net.")),
        *(prefixed(p) for p in ("module._orig_mod.", "_orig_mod.module.", "net.model.model.")),
        compiled_in_part,
        lambda state: wrapped("state_dict")(prefixed("model._orig_mod.")(old_names(state))),  # type: ignore[arg-type]
        lambda state: wrapped("net")(state) | {"model": {"fc.bias": torch.zeros(1)}},  # type: ignore[operator]
        lambda state: wrapped("net")(state) | {"model": "mbt2018-mean"},  # type: ignore[operator]
        wrapped("params_ema"),
        wrapped("checkpoint", "netG", "state_dict"),
        prefixed("codec."),
        lambda state: state | {"epoch": 3, "name": "a"},
        lambda state: {"ema": state, "model": {"fc.weight": torch.zeros(1)}},
        lambda state: {"model": state, "ema": {k: v[:0] for k, v in state.items()}},
        lambda state: {
            "state_dict": {f"model.{k}": v for k, v in state.items()}
            | {"criterion.lpips.weight": torch.zeros(1)}
        },
    ],
)
def test_checkpoints_are_read_as_training_scripts_write_them(
    tmp_path: Path, parameters: State, change: Callable[[State], object]
) -> None:
    torch.save(change(parameters), tmp_path / "a.pth")
    state = interchange.read(tmp_path / "a.pth")
    assert state.keys() == parameters.keys()
    assert all(torch.equal(value, parameters[name]) for name, value in state.items())


def test_a_checkpoint_with_the_state_of_an_optimiser_is_read(
    tmp_path: Path, parameters: State
) -> None:
    trained = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([trained])
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3])
    trained.sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    rest = {"optimizer": optimizer.state_dict(), "lr_scheduler": scheduler.state_dict()}
    torch.save({**rest, "net": parameters, "loss": torch.tensor(1.0)}, tmp_path / "a.pth")
    assert interchange.read(tmp_path / "a.pth").keys() == parameters.keys()


TABLES_OF_Z = tuple(name for name in zoo.TABLES if name.startswith("entropy_bottleneck"))


@pytest.mark.parametrize(
    "kept",
    [
        (),
        ("gaussian_conditional.scale_table",),
        TABLES_OF_Z,
        TABLES_OF_Z[:1],
        ("entropy_bottleneck._offset", "gaussian_conditional._cdf_length"),
    ],
    ids=["none", "scales", "z", "part of z", "parts of both"],
)
@pytest.mark.parametrize("others", ["empty", "absent"])
def test_empty_and_partial_tables_are_computed(
    tmp_path: Path, complete: State, kept: tuple[str, ...], others: str
) -> None:
    state = {k: v for k, v in complete.items() if k in kept or k not in zoo.TABLES}
    if others == "empty":
        state |= {k: complete[k][:0] for k in zoo.TABLES if k not in kept}
    torch.save(state, tmp_path / "a.pth")
    entry = interchange.install(tmp_path / "a.pth", 2, "mse", tmp_path)
    assert entry.weights_id == checkpoint.weights_id(complete)


def test_tables_of_z_alone_are_kept_unchanged(parameters: State, complete: State) -> None:
    """As CompressAI's `update()` does: only they decode existing bitstreams."""
    changed = complete["entropy_bottleneck._offset"] - 1
    of_z = {k: v for k, v in complete.items() if k in TABLES_OF_Z}
    state = parameters | of_z | {"entropy_bottleneck._offset": changed}
    assert torch.equal(zoo.with_tables(state)["entropy_bottleneck._offset"], changed)


class Exploit:
    """Runs a command when it is unpickled, which reading a checkpoint must not do."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return os.system, ("exit 1",)


def without(name: str) -> Callable[[State], object]:
    return lambda state: {k: v for k, v in state.items() if k != name}


def with_tensor(name: str, value: Tensor) -> Callable[[State], object]:
    return lambda state: {**state, name: value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("h_s.2.bias"), "h_s.2.bias is missing"),
        (
            with_tensor("g_s.0.weight", torch.zeros(320, 192, 5, 5)),
            r"g_s.0.weight has the shape \(320, 192, 5, 5\); quality 2 \(N = 128, M = 192\) has "
            r"\(192, 128, 5, 5\)",
        ),
        (with_tensor("context_prediction.bias", torch.zeros(3)), "context_prediction.bias is not"),
        (with_tensor("h_a.0.bias", torch.full((128,), torch.nan)), "h_a.0.bias holds"),
        (with_tensor("h_a.0.bias", torch.zeros(128, dtype=torch.int32)), "h_a.0.bias holds"),
        (lambda state: [state], "holds a list"),
        (lambda state: state | {"epoch": {}}, "'epoch' is not a plain tensor"),
        (
            lambda state: {"epoch": 3, "ema": {}, "model": {"fc.weight": torch.zeros(1)}},
            r"has tensors like g_a.0.weight: the file holds 'epoch', 'ema', 'model' "
            r"\(with 'fc.weight'\)",
        ),
        (lambda state: {}, "the file holds nothing"),
        (lambda state: {"net": state, "model": state}, "than one .* at /net and at /model;"),
        (
            lambda state: {f"{p}.{k}": v for k, v in state.items() for p in ("net", "model")},
            "than one .* at /net and at /model;",
        ),
        (lambda state: {"params": state, "ema": state}, "than one .* at /params and at /ema;"),
        (lambda _: Namespace(lr=1), "the file holds nothing"),
        (with_tensor("h_a.0.bias", torch.zeros(128).to_sparse()), "'h_a.0.bias' is not a plain"),
        (with_tensor("h_a.0.bias", torch.zeros(128, device="meta")), "'h_a.0.bias' is not a plain"),
        (with_tensor("h_a.0.bias", torch.zeros(1).expand(10**13)), "'h_a.0.bias' is not a plain"),
        (lambda state: {"state_dict": 3}, "the file holds 'state_dict'"),
        (lambda state: state | {"x": Exploit()}, "tensors only.* needs posix.system, but no code"),
    ],
)
def test_the_error_says_what_is_wrong_with_a_checkpoint(
    tmp_path: Path, parameters: State, change: Callable[[State], object], message: str
) -> None:
    torch.save(change(parameters), tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match=f"bad.pth: .*{message}") as caught:
        interchange.install(tmp_path / "bad.pth", 2, "mse", tmp_path / "imported")
    assert str(caught.value).isprintable()
    assert not (tmp_path / "imported").exists()


class Options(dict[str, int]):
    """Settings of a training script, in a class of its own."""

    size = 3


def touch(path: str) -> None:
    """Create a file: code that reading a checkpoint must not run."""
    Path(path).touch()


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return touch, (str(self.path),)


def test_objects_beside_the_state_dict_are_ignored_and_no_code_is_run(
    tmp_path: Path, parameters: State
) -> None:
    beside = {
        "args": Namespace(lr=1e-4, out=tmp_path), "options": Options(a=1), "when": datetime.now(),
        "loss": np.float64(0.5), "losses": np.zeros(3), "touch": Touch(tmp_path / "created"),
    }  # fmt: skip
    torch.save({"state_dict": parameters, **beside}, tmp_path / "a.ckpt")
    assert interchange.read(tmp_path / "a.ckpt").keys() == parameters.keys()
    assert not (tmp_path / "created").exists()


@pytest.mark.parametrize("name", ["a.pth", "a.ckpt", "a.safetensors"])
def test_the_format_of_a_checkpoint_is_told_by_its_content(
    tmp_path: Path, parameters: State, name: str
) -> None:
    torch.save(parameters, tmp_path / name)
    assert interchange.read(tmp_path / name).keys() == parameters.keys()
    save_file(parameters, tmp_path / name)
    assert interchange.read(tmp_path / name).keys() == parameters.keys()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b"<!DOCTYPE html><html>", "the file's format is HTML"),
        (b"\x1f\x8b\x08" + bytes(50), "the file's format is gzip"),
    ],
)
def test_the_error_about_a_file_of_another_format_names_it(
    tmp_path: Path, data: bytes, reason: str
) -> None:
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(WeightsError, match=reason):
        interchange.read(tmp_path / "a.pth")


def test_a_truncated_checkpoint_is_refused(tmp_path: Path, parameters: State) -> None:
    torch.save(parameters, tmp_path / "a.pth")
    (tmp_path / "a.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:5000])
    with pytest.raises(WeightsError, match="not a safetensors file or a PyTorch checkpoint"):
        interchange.read(tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("data", [b"", b"hello", bytes(1000), pickle.dumps(Exploit())])
def test_files_that_are_not_checkpoints_are_refused(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(WeightsError, match="tensors only"):
        interchange.install(tmp_path / name, 2, "mse", tmp_path / "imported")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("gaussian_conditional._quantized_cdf", torch.ones(64, 9, dtype=torch.int32), "CDF"),
        ("gaussian_conditional._offset", torch.full((64,), 2**32), "_offset holds"),
        ("gaussian_conditional._offset", torch.tensor(0), "128 and 1 CDFs"),
        ("gaussian_conditional._cdf_length", torch.zeros(64), "_cdf_length holds"),
        ("gaussian_conditional.scale_table", torch.full((64,), torch.nan), "scale_table holds"),
        ("gaussian_conditional.scale_table", torch.linspace(0.1, 1, 64)[:, None], "scale table"),
        ("gaussian_conditional.scale_table", torch.linspace(0.1, 1, 63), "63 scales"),
        ("gaussian_conditional.scale_table", torch.zeros(64), "scale table"),
    ],
)
def test_invalid_tables_are_refused(
    tmp_path: Path, complete: State, name: str, value: Tensor, message: str
) -> None:
    torch.save(complete | {name: value}, tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match=message):
        interchange.install(tmp_path / "bad.pth", 2, "mse", tmp_path / "imported")


def test_weights_of_any_precision_are_stored_in_float32(tmp_path: Path, parameters: State) -> None:
    """So that an exported checkpoint has the same id when it is imported again."""
    for i, kind in enumerate(
        (torch.float16, torch.float32, torch.float64)
    ):  # the shipped ones are float16
        torch.save({k: v.to(kind) for k, v in parameters.items()}, tmp_path / f"{i}.pth")
        interchange.install(tmp_path / f"{i}.pth", 2, "mse", tmp_path)
    (entry,) = checkpoint.manifest(tmp_path)
    assert checkpoint.load(entry, tmp_path)["g_s.0.weight"].dtype == torch.float32


def test_a_failed_write_leaves_no_files_behind(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(OSError, match="a.safetensors"):
        catalogue.install({"a": torch.zeros(1)}, "a", tmp_path, {"kind": "codec"})
    with pytest.raises(OSError, match="a.safetensors"):
        interchange.write({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.compressai
@pytest.mark.parametrize("name", ["q2.pth", "q2.pth.tar", "q2.safetensors"])
def test_compressai_decodes_with_an_exported_checkpoint(
    tmp_path: Path, shipped: Codec, small: Pixels, name: str
) -> None:
    row = catalogue.find(catalogue.shipped(), 2, "mse")
    assert row is not None
    tensors = checkpoint.load(row.entry, row.folder)
    interchange.write(state_dicts.to_compressai(tensors), tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    torch_file = name != "q2.safetensors"
    state = torch.load(tmp_path / name) if torch_file else load_file(tmp_path / name)
    net = mean_scale_hyperprior(128, 192)
    net.load_state_dict(state)
    b, theirs = compressed(net.eval(), small, 2)
    assert (shipped.synthesis(shipped.latents(b).y_hat) - theirs).abs().max() < 1e-4


def test_an_export_to_an_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=".safetensors"):
        interchange.write({}, tmp_path / "a.bin")


def test_an_exported_checkpoint_is_imported_with_the_same_id(tmp_path: Path, folder: Path) -> None:
    (entry,) = checkpoint.manifest(folder)
    state = state_dicts.to_compressai(checkpoint.load(entry, folder))
    interchange.write(state, tmp_path / "out.pth")
    assert interchange.install(tmp_path / "out.pth", 5, "mse", tmp_path).weights_id == (
        entry.weights_id
    )


def test_a_checkpoint_of_the_zoo_is_downloaded_and_imported(
    tmp_path: Path, file: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = sha256(file.read_bytes()).hexdigest()[:8]
    for name, message in ((digest, ""), ("0" * 8, "hash"), ("f" * 8, "No such file")):
        stored = tmp_path / f"mbt2018-mean-ms-ssim-5-{name}.pth.tar"
        if name != "f" * 8:
            shutil.copy(file, stored)
        url = stored.as_uri()
        monkeypatch.setattr(published, "url", lambda *_, url=url: url)
        if message:
            with pytest.raises(WeightsError, match=f"{stored.name} cannot be .*{message}"):
                interchange.install_from_zoo(5, "ms-ssim", tmp_path / "imported")
        else:
            entry = interchange.install_from_zoo(5, "ms-ssim", tmp_path / "imported")
            assert (entry.metric, entry.source) == ("ms-ssim", f"zoo: {stored.name}")
            assert entry.weights_id == checkpoint.manifest(folder)[0].weights_id
    assert len(checkpoint.manifest(tmp_path / "imported")) == 1


@pytest.fixture(scope="module")
def rivals(
    tmp_path_factory: pytest.TempPathFactory, compressai: ModuleType
) -> tuple[Path, list[Reference]]:
    """A user's folder with two imports of quality 2, which is shipped too, and their networks."""
    path = tmp_path_factory.mktemp("rivals")
    nets = [random_codec(128, 192, seed) for seed in (1, 2)]
    for net in nets:
        torch.save(net.state_dict(), path / "a.pth")
        interchange.install(path / "a.pth", 2, "mse", path)
    return path, nets


def test_bitstreams_are_decoded_with_the_weights_that_encoded_them(
    rivals: tuple[Path, list[Reference]], small: Pixels, small_msh: bytes
) -> None:
    """Weights are found by id. A bitstream without an id is decoded with the latest import."""
    folder, nets = rivals
    installed = library.load(with_decoders=False, folder=folder)
    first, last = (e.weights_id for e in checkpoint.manifest(folder))
    b = bitstream.parse(small_msh)
    assert installed.codec(b).weights_id == b.weights_id == zoo.load(2).weights_id
    assert installed.find(2, "mse").weights_id == last
    for weights_id in (first, last):
        encoder = installed.find(2, "mse", weights_id)
        data = bitstream.serialize(encoder.encode(codec.to_tensor(small), "msh", "exact"))
        b = bitstream.parse(data)
        assert b.weights_id == weights_id == installed.codec_id(b)
        installed.codec(b).decode(b)
    b, theirs = compressed(nets[1], small, 2)
    assert (installed.codec(b).reconstruct(b)[1] - theirs).abs().max() < 1e-4


def test_the_error_names_weights_that_are_not_installed(folder: Path, small_msh: bytes) -> None:
    installed = library.load(with_decoders=False, folder=folder)
    b = bitstream.parse(small_msh)
    for wrong, message in (
        (replace(b, weights_id="00" * 8), "0000000000000000"),
        (replace(b, quality=3), "quality 3"),
        (replace(b, metric="ms-ssim"), "metric ms-ssim"),
        (replace(b, quality=5), b.weights_id),
        (replace(b, quality=6, weights_id=""), "no weights for quality 6"),
    ):
        for find in (installed.codec, installed.codec_id):
            with pytest.raises(WrongWeights, match=message):
                find(wrong)


def test_imports_are_loaded_on_first_use_and_the_least_recently_used_is_dropped(
    rivals: tuple[Path, list[Reference]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo, "MAX_LOADED", 1)
    rows = [*catalogue.imported(rivals[0]), *catalogue.imported(folder)]
    imports = zoo.Imports(rows)
    assert [imports.find(r.entry.quality, "mse", r.entry.weights_id) for r in rows] == rows
    assert not imports._loaded
    first = imports.load(rows[0])
    assert imports.load(rows[0]) is first
    assert imports.load(rows[2]).net.M == 320
    assert list(imports._loaded) == [rows[2]]


def test_latents_of_imported_codecs_are_hidden_from_the_diffusion_decoder(
    tiny_decoder: Decoder, shipped: Codec, folder: Path, foreign: Reference, small: Pixels
) -> None:
    imports = zoo.Imports(catalogue.imported(folder))
    installed = Library({(2, "mse"): shipped}, {0: tiny_decoder}, imports)
    b, _ = compressed(foreign, small, 5)
    latents, x_hat = installed.codec(b).reconstruct(b)
    assert latents.y_hat.shape[1] == 320
    hidden = tiny_decoder.sample(latents, x_hat, 5, FAST, 3, latents_visible=False)
    expected = codec.crop_to_pixels(hidden, b.height, b.width)
    assert np.array_equal(installed.draw(b, FAST, 3), expected)

    b = shipped.encode(codec.to_tensor(small), "msh", "exact")
    visible = tiny_decoder.sample(*installed.codec(b).reconstruct(b), 2, FAST, 3)
    expected = codec.crop_to_pixels(visible, b.height, b.width)
    assert np.array_equal(installed.draw(b, FAST, 3), expected)


@pytest.mark.weights
def test_the_shipped_diffusion_decoder_works_with_an_imported_codec(
    folder: Path, foreign: Reference, small: Pixels
) -> None:
    installed = Library({}, {0: decoder.load()}, zoo.Imports(catalogue.imported(folder)))
    b, _ = compressed(foreign, small, 5)
    assert installed.draw(b, Settings("ddim", 1), 0).shape == small.shape


def test_realism_mixes_the_instant_and_the_finished_picture(shipped: Codec, small: Pixels) -> None:
    installed = Library({(2, "mse"): shipped})
    b = shipped.encode(codec.to_tensor(small), "msh", "exact")
    finished = small[::-1].copy()
    assert np.array_equal(installed.at_realism(b, finished, 1), finished)
    assert np.array_equal(installed.at_realism(b, finished, 0), shipped.decode(b))


def test_removing_weights_deletes_their_entry_and_file(tmp_path: Path, folder: Path) -> None:
    copy = tmp_path / "imported"
    shutil.copytree(folder, copy)
    (row,) = catalogue.imported(copy)
    catalogue.remove(row)
    assert catalogue.imported(copy) == []
    assert [p.name for p in copy.iterdir()] == [catalogue.MANIFEST]


def test_the_manifest_can_hold_any_source_name(tmp_path: Path) -> None:
    names = ['a "b" \\ c', "ü 🦜", "line\nbreak \x7f \x1b", "bad \udcff"]
    for quality, source in enumerate(names, 1):
        row: dict[str, str | int] = {
            "kind": "codec",
            "quality": quality,
            "metric": "mse",
            "source": source,
        }
        catalogue.install({"a": torch.zeros(quality)}, f"q{quality}", tmp_path, row)
    sources = [e.source for e in checkpoint.manifest(tmp_path)]
    assert sources == ['a "b" \\ c', "ü 🦜", "line?break ? ?", "bad ?"]


@pytest.mark.parametrize("folder", ["../", "/etc/", "sub/"])
def test_a_manifest_with_a_file_outside_its_folder_is_refused(tmp_path: Path, folder: str) -> None:
    row: dict[str, str | int] = {"kind": "codec", "quality": 2, "metric": "mse"}
    catalogue.install({"a": torch.zeros(1)}, "a", tmp_path, row)
    manifest = tmp_path / catalogue.MANIFEST
    manifest.write_text(manifest.read_text().replace('"a.safe', f'"{folder}a.safe'))
    with pytest.raises(WeightsError, match="lies outside"):
        catalogue.imported(tmp_path)


def test_the_error_names_a_broken_manifest(tmp_path: Path) -> None:
    (tmp_path / catalogue.MANIFEST).write_bytes(b"[[weights]]\nname = \xff")
    with pytest.raises(WeightsError, match="manifest.toml"):
        library.load(with_decoders=False, folder=tmp_path)
    assert catalogue.imported(tmp_path / "nothing") == []
