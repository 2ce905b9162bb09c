"""Evaluation: summary, baselines, report, plots, contact sheets, and whole runs of the command."""

import functools
import io
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from models import checkpoint, image, library
from models.codec import bitstream, codec, zoo
from models.codec.hyperprior import Latents
from models.diffusion import decoder, schedule
from models.diffusion.decoder import DiffusionInput
from models.diffusion.sampler import DenoiserOutput
from models.evaluate import __main__ as evaluate
from models.evaluate import baselines, calibration, plots, reference_codecs, report
from models.evaluate.contact_sheet import CROP, SCALE, BestAndWorst, Sheet, corner
from models.evaluate.decode_cache import code_digest
from models.evaluate.measure import DecodeMetrics
from models.evaluate.metrics import LpipsAlex, mse, psnr
from models.evaluate.summary import SummaryLine, summary
from models.tiers import TIERS


def row(**changed: object) -> DecodeMetrics:
    values: dict[str, object] = {
        "picture": "a", "quality": 2, "tier": "instant", "seed": 0, "bpp": 0.2, "mse": 1e-3,
        "ms_ssim": 0.9, "lpips": 0.2, "lpips_vgg": None, "dists": None, "nlpd": 0.2, "gmsd": 0.1,
        "niqe": 5.0, "niqe_original": 4.0, "offset": 0.1, "shift": 0.0, "seeds_mse": 0.0,
        "seconds": 1.0,
    }  # fmt: skip
    return DecodeMetrics(**{**values, **changed})  # type: ignore[arg-type]


def test_the_summary_compares_with_the_instant_picture() -> None:
    rows = [
        row(),
        row(picture="b", mse=1e-4, lpips=0.1),
        row(tier="ddim-10", mse=2e-3, lpips=0.1, shift=0.2),
        row(tier="ddim-10", mse=2e-3, lpips=0.1, seed=1, seeds_mse=5e-4),
        row(tier="ddim-10", picture="b", mse=2e-4, lpips=0.2),
    ]
    instant, drawn = (line.figures for line in summary(rows))
    assert instant["psnr"] == pytest.approx(35)
    assert instant["lpips"] == pytest.approx(0.15)
    assert drawn["psnr_loss"] == pytest.approx(10 * math.log10(2))
    assert drawn["seeds_ratio"] == pytest.approx(0.5)
    # each picture has the same weight, whatever its number of seeds
    assert drawn["lpips_ratio"] == pytest.approx(1)
    assert (drawn["worse_lpips"], drawn["shift_max"]) == (1, 0.2)


def test_seeds_of_a_picture_are_compared() -> None:
    rows = [
        row(),
        row(picture="b"),
        row(tier="ddim-10", lpips=0.1),
        row(tier="ddim-10", lpips=0.2, seed=1, seeds_mse=5e-4),
        row(tier="ddim-10", picture="b", seed=1),
    ]
    instant, drawn = (line.figures for line in summary(rows))
    assert drawn["seeds_ratio"] == pytest.approx(0.5)
    assert drawn["lpips_seeds"] == pytest.approx(0.1 / math.sqrt(2))
    assert drawn["psnr_seeds"] == 0
    assert not {"seeds_ratio", "psnr_seeds", "lpips_seeds"} & instant.keys()


def test_intervals_cover_the_pictures_and_differences_are_paired() -> None:
    rows = [row(picture=str(i), mse=10.0 ** (-2 - i / 4)) for i in range(8)]
    rows += [row(picture=str(i), tier="ddim-10", mse=2 * 10.0 ** (-2 - i / 4)) for i in range(8)]
    drawn = summary(rows)[1]
    low, high = drawn.intervals["psnr"]
    assert 20 < low < drawn.figures["psnr"] < high < 40
    assert drawn.intervals["psnr_loss"] == pytest.approx((3.0103, 3.0103), abs=1e-4)


def test_means_leave_out_pictures_that_lack_the_figure() -> None:
    rows = [row(niqe=7.0, ms_ssim=None), row(picture="b", niqe=None, ms_ssim=None)]
    [line] = summary(rows)
    assert line.figures["niqe"] == 7
    assert line.figures["niqe_gap"] == 3
    assert "niqe" not in line.intervals
    assert not {"ms_ssim", "dists", "kid"} & line.figures.keys()


def test_an_infinite_psnr_is_left_out() -> None:
    [line] = summary([row(mse=0.0), row(picture="b")])
    assert "psnr" not in line.figures
    json.dumps(line.document(), allow_nan=False)


def test_kid_uses_the_features_of_the_tier() -> None:
    rng = np.random.default_rng(0)
    originals = {name: rng.standard_normal((3, 4)) for name in "abc"}
    moved = {name: f + 1 for name, f in originals.items()}
    rows = [row(picture=p, tier=t) for t in ("instant", "ddim-10") for p in "abc"]
    features = {(0, "original"): originals, (2, "instant"): originals, (2, "ddim-10"): moved}
    instant, drawn = summary(rows, features)
    assert instant.figures["kid"] == pytest.approx(0, abs=1e-12)
    assert drawn.figures["kid"] > 0.5
    low, high = drawn.intervals["kid"]
    assert 0 < low <= drawn.figures["kid"] <= high


def lines() -> list[SummaryLine]:
    """Lines of three qualities and five tiers, two of them baselines."""
    tiers = ("instant", "perceptual", "ddim-10", *baselines.NAMES)
    out = []
    for quality in (1, 2, 3):
        for i, tier in enumerate(tiers):
            figures = {
                "bpp": 0.1 * quality, "psnr": 27.0 + quality - i / 5, "lpips": 0.3 - i / 20,
                "niqe_gap": 0.5 + i / 3, "kid": 0.02 / (i + 1), "worse_lpips": 1,
            }  # fmt: skip
            out.append(SummaryLine(quality, tier, 24, figures, {"lpips": (0.2, 0.31)}))
    return out


def test_the_report_has_intervals_and_names_baselines_that_miss_their_psnr() -> None:
    some = lines()
    some[4].figures["null_gap"] = 0.31
    some[3].figures["null_gap"] = 0.001
    text = report.markdown(some, "abcd", ["rate.png"])
    assert "| 1 | instant | 24 | 0.1000 | 28.00 | 0.3000 | 0.02000 |" in text
    assert "| 1 | instant | 24 | 28.00 | 0.300 [0.200, 0.310] | 0.500 | 0.0200 |" in text
    assert "| 1 | instant | 24 | 1 |" in text
    assert "`msh+unsharp` at quality 1 misses the PSNR of `perceptual` by up to 0.31 dB" in text
    assert "`msh+noise` at" not in text
    assert "![rate.png](rate.png)" in text


def test_plots_are_drawn_for_any_number_of_qualities(tmp_path: Path) -> None:
    for some in (lines(), lines()[:1]):
        for draw in (plots.rate, plots.perception):
            draw(some, tmp_path / "plot.png")
            with Image.open(tmp_path / "plot.png") as picture:
                assert np.asarray(picture.convert("L")).std() > 5


def test_the_gap_between_codecs_is_averaged_over_the_rates_of_both() -> None:
    above = [(0.1, 28.0), (0.2, 30.0), (0.4, 32.0)]  # 2 dB for twice the rate
    gap = reference_codecs.gap
    assert gap(above, [(bpp / 2, db - 3) for bpp, db in above]) == pytest.approx(1.0)
    # from 1 dB at the lower rate to 0 dB at the higher
    assert gap(above, [(0.2, 29.0), (0.8, 35.0)]) == pytest.approx(0.5)
    assert gap([(0.2, 30.5)], above) == pytest.approx(0.5)
    assert gap(above, [(0.5, 20.0), (0.6, 21.0)]) is None
    assert gap(above, []) is None


def test_other_codecs_are_in_the_report_and_the_plot(tmp_path: Path) -> None:
    figures = {"bpp": 0.2, "psnr": 28.0, "kid": 0.04}
    others = [
        SummaryLine(5, "webp", 24, figures),
        SummaryLine(10, "webp", 24, figures | {"bpp": 0.3}),
    ]
    gaps = reference_codecs.gaps(lines(), others)
    assert {g.tier: round(g.db, 6) for g in gaps if g.rival == "webp"}["instant"] > 1
    text = report.markdown(lines(), "abcd", [], others, gaps)
    assert "| 5 | webp | 24 | 0.2000 | 28.00 | 0.04000 |" in text
    assert "| PSNR at equal rate, dB | over webp |" in text
    assert f"| instant | {gaps[0].db:+.2f} |" in text
    fewer = [replace(line, pictures=3) if line.tier == "ddim-10" else line for line in lines()]
    assert {g.tier for g in reference_codecs.gaps(fewer, others)} == {g.tier for g in gaps} - {
        "ddim-10"
    }
    plots.rate(lines(), tmp_path / "with.png", others)
    plots.rate(lines(), tmp_path / "without.png")
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()


def test_calibration_measures_the_posterior_variance_and_overconfidence() -> None:
    x0 = 0.7 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    steps = schedule.Continuous().steps(8)[1:]

    def gaussian(variance: float) -> list[calibration.Point]:
        def denoise(x_t: Tensor, t: float, a: float) -> DenoiserOutput:
            return DenoiserOutput(a**0.5 * variance / (a * variance + 1 - a) * x_t, x_t)

        return calibration.curve(denoise, x0, steps, torch.Generator().manual_seed(1))

    for step, point in zip(steps, gaussian(0.49), strict=True):
        posterior = 0.49 * (1 - step.a) / (0.49 * step.a + 1 - step.a)
        assert point.predicted == pytest.approx(posterior, rel=1e-3)
        assert point.actual == pytest.approx(posterior, rel=0.05)
        assert point.zero == pytest.approx(0.49, rel=0.05)
    assert all(p.actual > 1.1 * p.predicted for p in gaussian(0.1))
    both = calibration.mean([gaussian(0.49), gaussian(0.1)])
    assert both[3].predicted == pytest.approx(
        (gaussian(0.49)[3].predicted + gaussian(0.1)[3].predicted) / 2
    )


@pytest.mark.weights
def test_the_error_of_the_shipped_denoiser_matches_its_prediction(photo: image.Pixels) -> None:
    q2, diffusion, x = zoo.load(2), decoder.load(), codec.to_tensor(photo)
    latents = q2.latents(bitstream.parse(bitstream.serialize(q2.encode(x, "msh", "exact"))))
    whole = DiffusionInput(latents, q2.synthesis(latents.y_hat), 2, seed=0)
    centre = calibration.middle(whole, x)
    assert centre is not None
    item, x_cut = centre
    assert x_cut.shape[2:] == item.x_hat.shape[2:] == (256, 256)
    assert mse(item.x_hat.clamp(0, 1), x_cut) < 3e-3  # both are cut at the same place
    x0 = diffusion.target(item, x_cut)
    steps = diffusion.process.steps(8)[2:]
    generator = torch.Generator().manual_seed(0)
    for point in calibration.curve(diffusion.denoiser(item), x0, steps, generator):
        assert point.predicted == pytest.approx(point.actual, rel=0.3)


def test_calibration_skips_pictures_below_64_pixels() -> None:
    latents = Latents(
        torch.zeros(1, 4, 4, 4), np.zeros((4, 4, 4), np.int32), np.zeros((4, 4), np.float32)
    )
    item = DiffusionInput(latents, torch.zeros(1, 3, 64, 64), 2, seed=0)
    assert calibration.middle(item, torch.zeros(1, 3, 63, 64)) is None
    assert calibration.middle(item, torch.zeros(1, 3, 64, 64)) is not None


def test_calibration_is_plotted(tmp_path: Path) -> None:
    points = [calibration.Point(t, 0.5 * t, 0.6 * t, 1.0) for t in (0.25, 0.5, 0.75)]
    plots.calibration({1: points, 2: points}, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5


def test_labels_keep_their_order_and_do_not_overlap() -> None:
    heights = [0.5, 0.51, 0.1, 0.505, 0.99, 1.0]
    spread = plots._spread(heights)
    assert np.argsort(spread).tolist() == np.argsort(heights).tolist()
    assert np.diff(sorted(spread)).min() > 0.06
    assert max(spread) <= 1


@pytest.fixture(scope="module")
def degraded(photo: image.Pixels) -> tuple[Tensor, Tensor]:
    """A photograph and a lossy decode of it."""
    data = io.BytesIO()
    Image.fromarray(photo[:256, :384]).save(data, "JPEG", quality=25)
    with Image.open(data) as decoded:
        return codec.to_tensor(photo[:256, :384].copy()), codec.to_tensor(np.array(decoded))


@pytest.mark.parametrize("name", baselines.NAMES)
@pytest.mark.parametrize("loss", [0.1, 0.5, 2.0])
def test_baselines_lose_the_given_psnr(
    degraded: tuple[Tensor, Tensor], name: str, loss: float
) -> None:
    x, msh = degraded
    target = mse(msh, x) * 10 ** (loss / 10)
    picture = baselines.baseline(name, msh, x, target)
    assert psnr(mse(msh, x)) - psnr(mse(picture, x)) == pytest.approx(loss, abs=0.02)
    torch.testing.assert_close(picture * 255, (picture * 255).round(), atol=1e-3, rtol=0)


def test_baselines_come_as_close_as_possible_to_a_psnr_out_of_reach(
    degraded: tuple[Tensor, Tensor],
) -> None:
    x, msh = degraded
    better = baselines.baseline(baselines.NOISE, msh, x, mse(msh, x) / 2)
    torch.testing.assert_close(better, msh)
    flat = torch.full_like(x, 0.5)  # nothing to sharpen
    torch.testing.assert_close(
        baselines.baseline(baselines.UNSHARP, flat, x, 0.5), flat, atol=2e-3, rtol=0
    )


def test_the_crop_is_where_two_pictures_differ_most() -> None:
    a = torch.zeros(1, 3, 300, 400)
    b = a.clone()
    b[:, :, 40:50, 300:310] = 0.5
    b[:, :, 150 : 150 + CROP, 60 : 60 + CROP] = 0.1
    assert corner(a, b) == (150, 60)
    assert corner(a[:, :, :20, :30], b[:, :, :20, :30]) == (0, 0)


def test_the_sheet_has_the_same_enlarged_crop_of_every_tier(tmp_path: Path) -> None:
    original = torch.rand(1, 3, 200, 200)
    pictures = {"original": original, "instant": original * 0.9, "perceptual": original * 0.5}
    pictures["instant"][:, :, 50:, 50:] = original[:, :, 50:, 50:]
    sheet = Sheet(["a.png"])
    sheet.add("a.png", 2, 0.25, pictures)
    sheet.add("b.png", 2, 0.25, pictures)  # not among the names given to the constructor
    sheet.save(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as drawn:
        values = np.asarray(drawn)
    top, left = corner(pictures["instant"], pictures["perceptual"])
    side, found = CROP * SCALE, 0
    for picture in pictures.values():
        crop = codec.to_pixels(picture)[top : top + CROP, left : left + CROP]
        crop = crop.repeat(SCALE, 0).repeat(SCALE, 1)
        places = np.argwhere((values == crop[0, 0]).all(2))
        found += any(np.array_equal(values[y : y + side, x : x + side], crop) for y, x in places)
    assert found == 3


def test_the_best_and_the_worst_crops_are_found(tmp_path: Path, lpips_file: Path) -> None:
    rng = np.random.default_rng(0)
    crops = BestAndWorst(LpipsAlex(lpips_file))
    for name in ("a", "b"):
        x = torch.from_numpy(rng.random((1, 3, 2 * CROP, 2 * CROP + 9))).float()
        blurred = torch.full_like(x, 0.5)
        drawn = blurred.clone()
        perfect = (..., slice(CROP), slice(CROP, 2 * CROP))
        drawn[perfect] = x[perfect]
        instant = blurred.clone()
        if name == "b":
            instant[:, :, CROP:, :CROP] = x[
                :, :, CROP:, :CROP
            ]  # only the instant picture equals the original
        crops.add(name, 2, {"original": x, "instant": instant, "perceptual": drawn})
        crops.add(name, 2, {"original": x, "instant": instant})  # ignored: no perceptual picture
    assert crops.save(tmp_path / "crops.webp")
    with Image.open(tmp_path / "crops.webp") as picture:
        values = np.asarray(picture.convert("L")).astype(float)
    rows = 3  # the best of each, and the worst of all
    height = CROP * SCALE + 32
    assert values.shape[0] == 32 + rows * height
    spread = [
        [values[top : top + CROP * SCALE, left : left + CROP * SCALE].std() for left in columns]
        for top in (32 + j * height + 24 for j in range(rows))
        for columns in [[8 + i * (CROP * SCALE + 8) for i in range(3)]]
    ]
    flat = [[value < 1 for value in row] for row in spread]
    assert flat == [[False, True, False]] * 2 + [[False, False, True]]


Command = Callable[..., None]


@pytest.fixture(scope="module")
def lpips() -> Callable[[Path], LpipsAlex]:
    """`LpipsAlex`, which loads each file once: to make its network takes half a second."""
    return functools.cache(LpipsAlex)


@pytest.fixture
def command(
    tmp_path: Path, lpips_file: Path, lpips: Callable[[Path], LpipsAlex],
    monkeypatch: pytest.MonkeyPatch,
) -> Command:  # fmt: skip
    """Run the command with the pictures in `in` and the results in `out`."""
    (tmp_path / "in").mkdir()
    monkeypatch.setattr(evaluate, "LpipsAlex", lpips)

    def run(*arguments: str) -> None:
        options = {"--pictures": tmp_path / "in", "--lpips": lpips_file, "--out": tmp_path / "out"}
        paths = [str(word) for pair in options.items() for word in pair]
        monkeypatch.setattr(sys, "argv", ["evaluate", *paths, *arguments])
        evaluate.main()

    return run


@pytest.mark.weights
def test_the_command_writes_metrics_of_real_bytes(
    command: Command, tmp_path: Path, photo: image.Pixels, small: image.Pixels
) -> None:
    pictures = {"a": photo[:161, :192].copy(), "b": photo[200:361, 300:492].copy(), "c": small}
    for name, pixels in pictures.items():
        (tmp_path / f"in/{name}.png").write_bytes(image.write(pixels, "png"))
    tiers = ["instant", "perceptual"]
    command("--qualities", "2", "--tiers", *tiers, "--seeds", "0", "1", "--rivals", "webp")
    document = json.loads((tmp_path / "out/evaluation.json").read_text())
    by_tier = {line["tier"]: line for line in document["summary"]}
    assert list(by_tier) == [*tiers, *baselines.NAMES]
    instant, drawn = by_tier["instant"], by_tier["perceptual"]
    assert instant["psnr"] > 28
    assert instant["bpp"] > 0.1
    assert instant["intervals"]["psnr"][0] < instant["psnr"] < instant["intervals"]["psnr"][1]
    assert drawn["seeds_ratio"] >= 0
    assert drawn["psnr_loss"] != 0
    assert drawn["shift_max"] < 0.5
    assert {"ms_ssim", "nlpd", "gmsd", "niqe", "niqe_gap", "kid"} <= drawn.keys()
    webp = document["others"]
    assert [line["quality"] for line in webp] == list(reference_codecs.SETTINGS["webp"])
    assert all(a["bpp"] < b["bpp"] and a["psnr"] < b["psnr"] for a, b in pairwise(webp))
    assert {"lpips", "ms_ssim", "niqe_gap", "kid"} <= webp[0].keys()
    rows = [r for r in document["rows"] if r["tier"] != "webp"]
    assert len(rows) == 3 * (1 + 2 + 2)
    too_small = rows[-1]
    assert (too_small["picture"], too_small["ms_ssim"], too_small["niqe"]) == ("c.png", None, None)
    for name in baselines.NAMES:
        assert by_tier[name]["null_gap"] < baselines.TOLERANCE_DB
    assert "| 2 | perceptual | 3 |" in (tmp_path / "out/evaluation.md").read_text()
    assert document["decoders"] == [d.weights_id for d in decoder.load_all().values()]
    (points,) = document["calibration"].values()
    assert [round(16 * p["t"]) for p in points] == list(range(15, 0, -1))
    assert all(0 < point["actual"] < point["zero"] for point in points)
    assert (
        points[-1]["actual"] < 0.1 * points[-1]["zero"]
    )  # measured at the same place, without padding
    for name in ("rate.png", "perception.png", "sheet.webp", "crops.webp", "calibration.png"):
        assert (tmp_path / "out" / name).stat().st_size > 10_000


@pytest.mark.weights
def test_cached_decodes_are_reused_unless_the_bitstream_changed(
    command: Command, tmp_path: Path, photo: image.Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, int]] = []
    sample = decoder.Decoder.sample

    def record(self: decoder.Decoder, *args: Any, **options: Any) -> Tensor:
        drawn.append((args[3].sampler, args[4]))
        return sample(self, *args, **options)

    def rows() -> dict[tuple[str, str, int], float]:
        document = json.loads((tmp_path / "out/evaluation.json").read_text())
        return {(r["picture"], r["tier"], r["seed"]): r["lpips"] for r in document["rows"]}

    plotted: list[set[str]] = []
    monkeypatch.setattr(plots, "rate", lambda lines, *_: plotted.append({x.tier for x in lines}))
    monkeypatch.setattr(decoder.Decoder, "sample", record)
    for name in "ab":
        (tmp_path / f"in/{name}.png").write_bytes(image.write(photo[:96, :128].copy(), "png"))
    command("--qualities", "2", "--tiers", "ddim-10", "--limit", "1")
    before = rows()
    decodes = tmp_path / "out/decodes/q2"
    (decodes / "a.png/perceptual.seed0.png").write_bytes(b"broken")
    (decodes / "a.png/mine.seed0.png").write_bytes(b"no tier")
    drawn.clear()
    shipped = checkpoint.WEIGHTS / "decoder_compact.safetensors"
    perceptual = ("--qualities", "2", "--tiers", "perceptual", "--decoder", str(shipped))
    command(*perceptual)
    assert len(drawn) == 2  # only `perceptual` of both: the file holds the weights of the first run
    after = rows()
    assert before.items() <= after.items()
    assert {("a.png", "ddim-10", 0), ("b.png", "perceptual", 0)} <= after.keys()
    assert ("b.png", "ddim-10", 0) not in after
    assert plotted == [{"instant", "ddim-10"}, {"instant", "perceptual", *baselines.NAMES}]

    (tmp_path / "in/a.png").write_bytes(image.write(photo[100:196, :128].copy(), "png"))
    drawn.clear()
    command(*perceptual, "--seeds", "0", "1")
    # seed 0 of the unchanged picture is cached
    assert sorted(seed for _, seed in drawn) == [0, 1, 1]
    assert ("a.png", "ddim-10", 0) not in rows()
    assert rows()["b.png", "perceptual", 0] == after["b.png", "perceptual", 0]
    assert (decodes / "b.png/perceptual.seed1.png").exists()


@pytest.mark.weights
def test_pictures_equal_the_services_even_if_the_decoder_was_not_trained_with_the_codec(
    command: Command, tmp_path: Path, small: image.Pixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = library.load()
    settings = TIERS["perceptual"].settings
    assert settings is not None
    diffusion = models.decoder(settings)
    diffusion.codecs = frozenset()
    monkeypatch.setattr(decoder, "load_all", lambda **_: models.decoders)
    (tmp_path / "in/a.png").write_bytes(image.write(small, "png"))
    command("--qualities", "2")
    drawn = image.read((tmp_path / "out/decodes/q2/a.png/perceptual.seed0.png").read_bytes(), 10**6)
    b = models.codecs[2, "mse"].encode(codec.to_tensor(small), "msh", "exact")
    assert np.array_equal(drawn, models.draw(b, settings, 0))
    diffusion.codecs = None
    assert not np.array_equal(drawn, models.draw(b, settings, 0))


@pytest.mark.weights
def test_errors_are_reported_in_one_line(command: Command, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="in: no pictures"):
        command()
    file = tmp_path / "in/a.png"
    file.write_bytes(b"no picture")
    with pytest.raises(SystemExit, match=r"a\.png: the file is not a picture in a known format"):
        command("--qualities", "2")
    file.write_bytes(image.write(np.zeros((20, 40, 3), np.uint8), "png"))
    with pytest.raises(SystemExit, match=r"a\.png: 40x20; LPIPS needs sides of 31 or more"):
        command("--qualities", "2")
    with pytest.raises(SystemExit, match=r"msh_q2\.safetensors: not a diffusion decoder"):
        command("--decoder", str(checkpoint.WEIGHTS / "msh_q2.safetensors"))
    with pytest.raises(SystemExit, match=r"a\.png: "):
        command("--decoder", str(file))
    with pytest.raises(SystemExit, match="not a weights file"):
        command("--qualities", "2", "--dists", str(file))


def test_the_code_digest_ignores_wording_and_imports_only() -> None:
    source = 'import a\n\ndef f(x):\n    """Twice."""\n    return 2 * x  # why\n'
    reworded = 'from b import a\n\n\ndef f(x):\n    """Double of x."""\n    return 2 * x\n'
    assert code_digest(reworded) == code_digest(source)
    assert code_digest(source.replace("2 * x", "3 * x")) != code_digest(source)
