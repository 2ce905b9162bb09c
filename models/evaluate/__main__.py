"""Evaluate codec and diffusion decoders: encode pictures, decode the bytes, measure the result.

python -m models.evaluate --pictures KODAK --lpips lpips_alex.safetensors --out FOLDER

Writes evaluation.json, evaluation.md, rate.png, perception.png and sheet.webp, and with a diffusion
tier also calibration.png, crops.webp and the decoded pictures in decodes/. An evaluation can be
interrupted, resumed and extended: decoded pictures in decodes/ are reused, and the report includes
those of the chosen qualities. `--rivals` also measures reference codecs such as JPEG.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from models import library
from models.codec import zoo
from models.diffusion import decoder
from models.errors import AfterimageError, PictureError
from models.evaluate import calibration, kid, plots, reference_codecs, report
from models.evaluate.contact_sheet import BestAndWorst, Sheet
from models.evaluate.decode_cache import DecodeCache
from models.evaluate.dists import Dists
from models.evaluate.measure import (
    NAMES,
    ORIGINAL,
    DecodeMetrics,
    Evaluation,
    Networks,
    PictureResult,
)
from models.evaluate.metrics import LpipsAlex, LpipsMetric
from models.evaluate.summary import SummaryLine, summary

SUFFIXES = {".png", ".jpg", ".jpeg"}


class Results:
    """Results of all pictures, collected one picture at a time."""

    def __init__(self, lpips: LpipsAlex, names: Sequence[str]) -> None:
        self.lpips, self.sheet, self.crops = lpips, Sheet(names), BestAndWorst(lpips)
        self.rows: list[DecodeMetrics] = []
        self.other_rows: list[DecodeMetrics] = []  # rows of the reference codecs
        self.curves: dict[int, list[list[calibration.Point]]] = {}  # by quality
        self.features: dict[tuple[int, str], dict[str, NDArray[np.float64]]] = {}

    def add(self, result: PictureResult) -> None:
        """Add one picture at one quality."""
        first = result.rows[0]
        self.rows += result.rows
        if result.calibration:
            self.curves.setdefault(first.quality, []).append(result.calibration)
        self.sheet.add(first.picture, first.quality, first.bpp, result.pictures)
        self.crops.add(first.picture, first.quality, result.pictures)
        for tier, picture in result.pictures.items():
            self._add_features(0 if tier == ORIGINAL else first.quality, tier, first, picture)

    def add_other(self, row: DecodeMetrics, picture: Tensor) -> None:
        """Add one picture of a reference codec."""
        self.other_rows.append(row)
        self._add_features(row.quality, row.tier, row, picture)

    def _add_features(self, quality: int, tier: str, row: DecodeMetrics, picture: Tensor) -> None:
        by_picture = self.features.setdefault((quality, tier), {})
        if row.picture not in by_picture:  # each quality brings the originals again
            by_picture[row.picture] = kid.features(self.lpips, picture)

    def write(self, out: Path, decoders: Sequence[str]) -> str:
        """Write all files into `out`; return the Markdown report.

        `decoders` are the weights ids of the diffusion decoders.
        """
        out.mkdir(parents=True, exist_ok=True)
        lines, others = (summary(rows, self.features) for rows in (self.rows, self.other_rows))
        gaps = reference_codecs.gaps(lines, others)
        curves = {quality: calibration.mean(points) for quality, points in self.curves.items()}
        document = {
            "decoders": list(decoders),
            "summary": [line.document() for line in lines],
            "others": [line.document() for line in others],
            "gaps": [asdict(gap) for gap in gaps],
            "calibration": {q: [asdict(point) for point in points] for q, points in curves.items()},
            "rows": [asdict(row) for row in (*self.rows, *self.other_rows)],
        }
        (out / "evaluation.json").write_text(json.dumps(document, indent=1))
        images = self._write_images(out, lines, others, curves)
        text = report.markdown(lines, decoders, images, others, gaps)
        (out / "evaluation.md").write_text(text)
        return text

    def _write_images(
        self,
        out: Path,
        lines: Sequence[SummaryLine],
        others: Sequence[SummaryLine],
        curves: dict[int, list[calibration.Point]],
    ) -> list[str]:
        """Write plots and contact sheets into `out`; return their file names."""
        images = ["rate.png", "perception.png", "sheet.webp"]
        most = max(line.pictures for line in lines)
        complete = [line for line in lines if line.pictures == most]  # means of the same pictures
        plots.rate(complete, out / images[0], others)
        plots.perception(complete, out / images[1])
        self.sheet.save(out / images[2])
        if self.crops.save(out / "crops.webp"):
            images.append("crops.webp")
        if curves:
            images.append("calibration.png")
            plots.calibration(curves, out / "calibration.png")
        return images


def evaluate(args: argparse.Namespace) -> str:
    """Evaluate all pictures at all qualities; return the Markdown report.

    Raises `AfterimageError` or `OSError` for the first picture that fails.
    """
    files = sorted(p for p in args.pictures.iterdir() if p.suffix.lower() in SUFFIXES)[: args.limit]
    if not files:
        suffixes = ", ".join(sorted(SUFFIXES))
        raise PictureError(f"{args.pictures}: no pictures in this folder; use files of {suffixes}")
    networks = Networks(
        LpipsAlex(args.lpips),
        LpipsMetric("vgg", args.lpips_vgg) if args.lpips_vgg else None,
        Dists(args.dists) if args.dists else None,
    )
    device = library.device()
    decoders = (
        {0: decoder.from_file(args.decoder, device)}
        if args.decoder
        else decoder.load_all(device=device)
    )
    cache = DecodeCache(args.out / "decodes")
    results = Results(networks.lpips, [p.name for p in files])
    with tqdm(total=len(files) * len(args.qualities), unit="picture") as bar:
        for quality in args.qualities:
            evaluation = Evaluation(zoo.load(quality), decoders, networks, cache)
            for path in files:
                results.add(evaluation.measure(path, args.tiers, args.seeds))
                bar.update()
    for path in tqdm(files, desc="rivals", unit="picture", disable=not args.rivals):
        for row, picture in reference_codecs.rows(path, args.rivals, networks):
            results.add_other(row, picture)
    return results.write(args.out, [decoders[steps].weights_id for steps in sorted(decoders)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.evaluate", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--pictures", type=Path, required=True, help="folder of .png and .jpg files")
    add("--out", type=Path, required=True, help="folder for the results")
    add(
        "--lpips",
        type=Path,
        help="file with the weights of LPIPS-Alex, with tensor names of the package lpips, or of "
        "torchvision's AlexNet; downloaded by default",
    )
    add(
        "--lpips-vgg",
        type=Path,
        help="file with the weights of LPIPS-VGG, with tensor names of the package lpips, or of "
        "torchvision's VGG-16; without it LPIPS-VGG is not measured",
    )
    add("--dists", type=Path, help="file of torchvision's VGG-16; without it no DISTS")
    add(
        "--decoder",
        type=Path,
        help="decoder.safetensors of a training run, for all tiers; default: the shipped decoders",
    )
    add("--qualities", type=int, nargs="+", default=[1, 2, 3], help="default: 1 2 3")
    add(
        "--tiers",
        nargs="+",
        choices=NAMES,
        default=["perceptual"],
        help="tiers to measure besides instant; default: perceptual",
    )
    add(
        "--seeds", type=int, nargs="+", default=[0], help="seeds of the diffusion tiers; default: 0"
    )
    add(
        "--rivals",
        nargs="+",
        choices=list(reference_codecs.SETTINGS),
        default=[],
        help="reference codecs to measure too",
    )
    add("--limit", type=int, help="use only the first LIMIT pictures")
    return parser


def main() -> None:
    try:
        print(evaluate(_parser().parse_args()))  # noqa: T201
    except (AfterimageError, OSError) as e:
        raise SystemExit(f"evaluate: {e}") from e


if __name__ == "__main__":
    main()
