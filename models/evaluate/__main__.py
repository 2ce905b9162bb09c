"""Encode pictures, decode them from the real bytes at each tier, and measure what comes out.

python -m models.evaluate --pictures KODAK --lpips lpips_alex.safetensors --out FOLDER

Writes evaluation.json, evaluation.md, rate.png, perception.png, sheet.webp and, where the
diffusion decoder draws, calibration.png, crops.webp and the drawn pictures, in decodes/. What lies
there already is not drawn again and, at the qualities asked for, is reported too: an evaluation can
be interrupted, and made in parts. `--rivals` measures what other codecs make of the pictures.
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
from models.evaluate.contact_sheet import Crops, Sheet
from models.evaluate.decode_cache import Kept
from models.evaluate.dists import Dists
from models.evaluate.measure import NAMES, ORIGINAL, Evaluation, Measured, Networks, Row
from models.evaluate.metrics import Lpips, LpipsAlex
from models.evaluate.summary import summary

SUFFIXES = {".png", ".jpg", ".jpeg"}


class Results:
    """What is kept of the pictures that have passed."""

    def __init__(self, lpips: LpipsAlex, names: Sequence[str]) -> None:
        self.lpips, self.sheet, self.crops = lpips, Sheet(names), Crops(lpips)
        self.rows: list[Row] = []
        self.others: list[Row] = []  # of other codecs
        self.curves: dict[int, list[list[calibration.Point]]] = {}
        self.features: dict[tuple[int, str], dict[str, NDArray[np.float64]]] = {}

    def add(self, measured: Measured) -> None:
        """One picture at one quality."""
        first = measured.rows[0]
        self.rows += measured.rows
        if measured.calibration:
            self.curves.setdefault(first.quality, []).append(measured.calibration)
        self.sheet.add(first.picture, first.quality, first.bpp, measured.pictures)
        self.crops.add(first.picture, first.quality, measured.pictures)
        for tier, picture in measured.pictures.items():
            self._add_features(0 if tier == ORIGINAL else first.quality, tier, first, picture)

    def add_other(self, row: Row, picture: Tensor) -> None:
        """One picture of another codec."""
        self.others.append(row)
        self._add_features(row.quality, row.tier, row, picture)

    def _add_features(self, quality: int, tier: str, row: Row, picture: Tensor) -> None:
        known = self.features.setdefault((quality, tier), {})
        if row.picture not in known:  # originals come once per quality
            known[row.picture] = kid.features(self.lpips, picture)

    def write(self, out: Path, weights_id: str) -> str:
        """All files into `out`; returns the Markdown."""
        out.mkdir(parents=True, exist_ok=True)
        lines, others = (summary(rows, self.features) for rows in (self.rows, self.others))
        gaps = reference_codecs.gaps(lines, others)
        curves = {quality: calibration.mean(own) for quality, own in self.curves.items()}
        document = {
            "decoder": weights_id,
            "summary": [line.document() for line in lines],
            "others": [line.document() for line in others],
            "gaps": [asdict(gap) for gap in gaps],
            "calibration": {q: [asdict(point) for point in own] for q, own in curves.items()},
            "rows": [asdict(row) for row in (*self.rows, *self.others)],
        }
        (out / "evaluation.json").write_text(json.dumps(document, indent=1))
        images = ["rate.png", "perception.png", "sheet.webp"]
        most = max(line.pictures for line in lines)
        whole = [line for line in lines if line.pictures == most]  # others' means are not theirs
        plots.rate(whole, out / images[0], others)
        plots.perception(whole, out / images[1])
        self.sheet.save(out / images[2])
        if self.crops.save(out / "crops.webp"):
            images.append("crops.webp")
        if curves:
            images.append("calibration.png")
            plots.calibration(curves, out / "calibration.png")
        text = report.markdown(lines, weights_id, images, others, gaps)
        (out / "evaluation.md").write_text(text)
        return text


def evaluate(args: argparse.Namespace) -> str:
    """All pictures at all qualities; `AfterimageError` or `OSError` at the first that fails."""
    files = sorted(p for p in args.pictures.iterdir() if p.suffix.lower() in SUFFIXES)[: args.limit]
    if not files:
        raise PictureError(f"{args.pictures}: no pictures ({', '.join(sorted(SUFFIXES))})")
    networks = Networks(
        LpipsAlex(args.lpips),
        Lpips("vgg", args.lpips_vgg) if args.lpips_vgg else None,
        Dists(args.dists) if args.dists else None,
    )
    device = library.device()
    drawing = decoder.opened(args.decoder, device) if args.decoder else decoder.load(device=device)
    kept = Kept(args.out / "decodes")
    results = Results(networks.lpips, [p.name for p in files])
    with tqdm(total=len(files) * len(args.qualities), unit="picture") as bar:
        for quality in args.qualities:
            evaluation = Evaluation(zoo.load(quality), drawing, networks, kept)
            for path in files:
                results.add(evaluation.measure(path, args.tiers, args.seeds))
                bar.update()
    for path in tqdm(files, desc="rivals", unit="picture", disable=not args.rivals):
        for row, picture in reference_codecs.rows(path, args.rivals, networks):
            results.add_other(row, picture)
    return results.write(args.out, drawing.weights_id)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.evaluate", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--pictures", type=Path, required=True, help="folder of .png and .jpg files")
    add("--out", type=Path, required=True)
    add("--lpips", type=Path, help="LPIPS-Alex under lpips' names, or AlexNet; else downloaded")
    add("--lpips-vgg", type=Path, help="LPIPS-VGG under lpips' names, or torchvision's VGG-16")
    add("--dists", type=Path, help="torchvision's VGG-16, for DISTS")
    add("--decoder", type=Path, help="decoder.safetensors of a training run, if not the shipped")
    add("--qualities", type=int, nargs="+", default=[1, 2, 3])
    add("--tiers", nargs="+", choices=NAMES, default=["perceptual"], help="beside instant")
    add("--seeds", type=int, nargs="+", default=[0])
    add(
        "--rivals",
        nargs="+",
        choices=list(reference_codecs.SETTINGS),
        default=[],
        help="other codecs",
    )
    add("--limit", type=int, help="only the first so many pictures")
    return parser


def main() -> None:
    try:
        print(evaluate(_parser().parse_args()))  # noqa: T201
    except (AfterimageError, OSError) as e:
        raise SystemExit(f"evaluate: {e}") from e


if __name__ == "__main__":
    main()
