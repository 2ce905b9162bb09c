"""Photographs and banks: encoding, storage on disk or in memory, random crops."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from models import image
from models.codec import codec, zoo
from models.errors import PictureError, WeightsError
from models.train import bank, photos
from models.train.encoder import Encoder
from models.train.photos import CropSampler, Ragged

CPU = torch.device("cpu")
shipped = partial(Encoder.load, folder=None, device=CPU)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, photo: image.Pixels) -> Path:
    """Three training photographs, one of them too small, and a held-out one."""
    folder = tmp_path_factory.mktemp("photos")
    for i, name in enumerate(("a", "b", "bsds_val_c")):
        Image.fromarray(photo[:170, 180 * i : 180 * (i + 1)]).save(folder / f"{name}.png")
    Image.fromarray(photo[:40, :200]).save(folder / "small.png")
    return folder


@pytest.fixture(scope="module")
def built(folder: Path) -> Path:
    bank.build(photos.photographs(folder, False), folder / "bank/q2", 2, shipped(2), variants=2)
    return folder / "bank"


def test_held_out_photographs_are_never_trained_on(tmp_path: Path) -> None:
    for name in ("bsds_val_1.jpg", "bsds_test_1.jpg", "in_1.PNG", "notes.txt"):
        (tmp_path / name).touch()
    names = [[p.name for p in photos.photographs(tmp_path, held)] for held in (False, True)]
    assert names == [["bsds_test_1.jpg", "in_1.PNG"], ["bsds_val_1.jpg"]]


def test_a_bank_with_held_out_photographs_is_not_trained_on(built: Path, tmp_path: Path) -> None:
    for file in ("q2/bsds_val_1.safetensors", "others/q2/codec/bsds_val_1.safetensors"):
        (tmp_path / file).parent.mkdir(parents=True)
        shutil.copy(built / "q2/a.safetensors", tmp_path / file)
    assert len(bank.Bank.read(tmp_path, CPU, held_out=True).entry_qualities) == 1
    with pytest.raises(ValueError, match="bsds_val_1.safetensors: photographs bsds_val_"):
        bank.Bank.read(tmp_path, CPU, held_out=False)
    with pytest.raises(ValueError, match="never trained on"):
        bank.Bank.read_hidden(tmp_path / "others", 192, CPU)


def test_photographs_that_are_all_too_small_are_an_error(tmp_path: Path) -> None:
    Image.new("RGB", (63, 640)).save(tmp_path / "thin.png")
    files = photos.photographs(tmp_path, False)
    with pytest.raises(PictureError, match="all 1 photographs have a side below 64 pixels"):
        bank.build(files, tmp_path / "bank/q2", 2, shipped(2))
    with pytest.raises(PictureError, match="below 64 pixels"):
        bank.Bank.encode(files, (2,), None, 1, CPU)


def test_a_folder_without_photographs_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no photographs"):
        photos.photographs(tmp_path, False)


def test_large_photographs_are_reduced(tmp_path: Path) -> None:
    Image.new("RGB", (4096, 512)).save(tmp_path / "wide.png")
    assert photos.read(tmp_path / "wide.png").shape == (3, 256, 2048)
    assert bank.Variant(tmp_path / "wide.png", 1, 0).positions() == (16, 128)


def test_bits_and_latents_agree_with_the_real_encoder(photo: image.Pixels) -> None:
    pixels = photo[100:356, 200:456].copy()
    real = zoo.load(2)
    *_, latents = real.latent_coder.encode(codec.to_tensor(pixels), "exact")
    ours = Encoder.load(2, None, CPU)(torch.from_numpy(pixels).permute(2, 0, 1))
    assert float(ours["bits"].sum()) == pytest.approx(float(latents.bits.sum()), rel=0.02)
    difference = (ours["y_hat"].float() - latents.y_hat[0]).abs()
    assert float((difference < 0.05).float().mean()) > 0.999  # ties may be rounded differently
    x_hat = real.synthesis(latents.y_hat)[0]
    assert float((ours["x_hat"].float() / 255 - x_hat).square().mean()) < 1e-5


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="not a mean-scale hyperprior"):
        Encoder({"g_a.6.weight": torch.zeros(8, 4, 5, 5)}, CPU)
    with pytest.raises(WeightsError, match="No such file"):
        Encoder.load(2, tmp_path, CPU)


def test_crops_of_all_tensors_show_the_same_place() -> None:
    sizes = [(7, 5), (4, 9), (3, 30)]
    entries = []
    for i, (rows, columns) in enumerate(sizes):
        # number every position of the latents, and write the number into its pixels as well
        mark = torch.arange(rows * columns).reshape(1, rows, columns) + 100 * i
        fine = mark.repeat_interleave(16, 1).repeat_interleave(16, 2).to(torch.uint8)
        entries.append((i + 1, {"x": fine, "x_hat": fine, "y_hat": mark.half(), "bits": mark}))
    held = bank.Bank(sizes, entries, CPU)
    batch = held.batch(200, 64, torch.Generator().manual_seed(0))
    assert torch.equal((batch.x[:, :, ::16, ::16] * 255).round(), batch.bits % 256)
    assert torch.equal(batch.y_hat, batch.bits)
    assert torch.equal(batch.quality, batch.bits[:, 0, 0, 0].long() // 100 + 1)
    assert set(batch.quality.tolist()) == {1, 2}  # the third is lower than the crop


def test_crops_are_drawn_by_area_and_at_every_corner() -> None:
    draw = CropSampler([(4, 4), (4, 8), (2, 90)], CPU)
    which, top, left = draw.corners(4000, 3, torch.Generator().manual_seed(0))
    assert float((which == 1).float().mean()) == pytest.approx(2 / 3, abs=0.03)
    assert set(top.tolist()) == {0, 1}
    assert set(left[which == 1].tolist()) == set(range(6))
    with pytest.raises(ValueError, match="as large as a crop"):
        draw.corners(1, 5, torch.Generator())


def test_ragged_storage_returns_pictures_of_any_size() -> None:
    pictures = [torch.rand(3, 5, 7), torch.rand(3, 2, 9)]
    flat = Ragged([(5, 7), (2, 9)], 3, torch.float32, CPU)
    for i, picture in enumerate(pictures):
        flat.put(i, picture)
    assert all(torch.equal(flat.get(i), picture) for i, picture in enumerate(pictures))


def test_building_a_bank_again_keeps_its_files(folder: Path, built: Path) -> None:
    files = sorted((built / "q2").iterdir())
    names = ["a.safetensors", "a.v1.safetensors", "b.safetensors", "b.v1.safetensors"]
    assert [f.name for f in files] == names
    shapes = {k: (v.dtype, *v.shape) for k, v in load_file(files[0]).items()}
    assert shapes == {
        "x": (torch.uint8, 3, 160, 176),
        "x_hat": (torch.uint8, 3, 160, 176),
        "y_hat": (torch.float16, 192, 10, 11),
        "bits": (torch.float16, 10, 11),
    }
    before = [f.stat().st_mtime_ns for f in files]
    bank.build(photos.photographs(folder, False), built / "q2", 2, shipped(2), variants=2)
    assert [f.stat().st_mtime_ns for f in files] == before


def test_files_of_another_codec_are_encoded_again(folder: Path, tmp_path: Path) -> None:
    files = photos.photographs(folder, False)
    bank.build(files, tmp_path / "q2", 1, shipped(1))
    shutil.copy(tmp_path / "q2/a.safetensors", tmp_path / "kept")
    bank.build(files, tmp_path / "q2", 2, shipped(2))
    ours = load_file(tmp_path / "q2/a.safetensors")
    assert not torch.equal(ours["y_hat"], load_file(tmp_path / "kept")["y_hat"])
    shutil.copy(tmp_path / "kept", tmp_path / "q2/a.safetensors")
    with pytest.raises(WeightsError, match="several codecs"):
        bank.Bank.read(tmp_path, CPU, held_out=False)


def test_two_photographs_with_the_same_name_are_refused(folder: Path, tmp_path: Path) -> None:
    for place in ("x", "y"):
        (tmp_path / place).mkdir()
        shutil.copy(folder / "a.png", tmp_path / place / "a.png")
    with pytest.raises(PictureError, match="the same name"):
        bank.build(photos.photographs(tmp_path, False), tmp_path / "bank/q2", 2, shipped(2))


def test_a_bank_in_memory_equals_the_one_on_disk(folder: Path, built: Path) -> None:
    disk = bank.Bank.read(built, CPU, held_out=False)
    memory = bank.Bank.encode(photos.photographs(folder, False), (2,), None, 2, CPU)
    assert disk.latents == memory.latents == 192
    order = [0, 2, 1, 3]  # on disk the variants of a photograph are adjacent
    for name, field in disk.fields.items():
        for i, j in enumerate(order):
            assert torch.equal(field.get(i), memory.fields[name].get(j))


def test_variants_are_deterministic_and_of_several_sizes(folder: Path) -> None:
    shapes = {}
    for number in range(12):
        variant = bank.Variant(folder / "a.png", 2, number)
        x = variant.pixels()
        assert x.shape == (3, *(16 * side for side in variant.positions()))
        assert torch.equal(x, bank.Variant(folder / "a.png", 2, number).pixels())
        shapes[number] = tuple(x.shape)
    assert shapes[0] == (3, 160, 176)
    assert len(set(shapes.values())) > 2


def test_the_codecs_picture_is_near_the_original(built: Path) -> None:
    batch = bank.Bank.read(built, CPU, held_out=False).batch(
        4, 64, torch.Generator().manual_seed(0)
    )
    assert batch.x.shape == batch.x_hat.shape == (4, 3, 64, 64)
    assert batch.y_hat.shape == (4, 192, 4, 4)
    assert batch.bits.shape == (4, 1, 4, 4)
    assert float((batch.x - batch.x_hat).square().mean()) < 10**-2.6


def test_augmented_crops_are_reproducible(folder: Path) -> None:
    held = photos.Photos(photos.photographs(folder, False), CPU)
    x = held.batch(16, 64, 1.5, torch.Generator().manual_seed(0))
    assert x.shape == (16, 3, 64, 64)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert 0 <= float(x.min()) < float(x.max()) <= 1
    again = held.batch(16, 64, 1.5, torch.Generator().manual_seed(0))
    assert torch.equal(x, again)
