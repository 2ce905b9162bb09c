"""`afterimage encode`, `decode` and `inspect`."""

import argparse
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from models.codec.bitstream import METRICS
from models.errors import AfterimageError
from models.files import atomic_write
from models.tiers import TIERS, Sampler, check_realism, check_seed, find, vary
from service.cli.terminal import complain
from service.settings import ServiceSettings
from worker.settings import without_garbage_collection

if TYPE_CHECKING:  # it brings Pillow
    from models.image import OutputFormat


def add(commands: Any) -> None:
    """Add the commands `encode`, `decode` and `inspect`."""
    encode = commands.add_parser("encode", help="photographs to bitstreams")
    _files(encode)
    encode.add_argument(
        "--quality", "-q", type=int, choices=range(1, 9), default=2, help="above 3 if imported"
    )
    encode.add_argument("--metric", choices=METRICS, default="mse", help="ms-ssim if imported")
    encode.add_argument("--format", choices=("msh", "compressai"), default="msh")
    encode.set_defaults(run=_encode)

    decode = commands.add_parser("decode", help="bitstreams to pictures: png, jpg, webp, avif, npy")
    _files(decode)
    decode.add_argument("--tier", choices=tuple(TIERS), default="instant")
    decode.add_argument("--seed", type=int, default=0)
    for name in ("steps", "eta", "gamma", "guidance"):
        kind = int if name == "steps" else float
        decode.add_argument(f"--{name}", type=kind, help=f"instead of the tier's {name}")
    decode.add_argument("--sampler", choices=get_args(Sampler), help="instead of the tier's")
    decode.add_argument(
        "--realism", type=float, default=1.0, help="0: the instant picture; 1: the tier's (default)"
    )
    decode.add_argument("--url", help="a service that draws it; the draft is written meanwhile")
    decode.set_defaults(run=_decode)

    inspect = commands.add_parser("inspect", help="what bitstreams' headers say, a JSON line each")
    inspect.add_argument("inputs", type=Path, nargs="+", metavar="IN")
    inspect.set_defaults(run=_inspect)


def _files(command: argparse.ArgumentParser) -> None:
    command.add_argument("inputs", type=Path, nargs="+", metavar="IN")
    command.add_argument(
        "-o", "--output", required=True, help="a file; or a folder, which ends with / or is one"
    )


def _encode(args: argparse.Namespace) -> int:
    with without_garbage_collection():
        import torch

        from models import image
        from models.codec import bitstream, catalogue, codec, zoo

    settings = ServiceSettings()
    suffix = ".msh" if args.format == "msh" else ".bin"
    targets = _targets(args.inputs, args.output, suffix)
    rows = [*catalogue.imported(settings.weights_dir), *catalogue.shipped()]
    found = catalogue.find(rows, args.quality, args.metric)
    if found is None:
        raise catalogue.wrong_weights(args.quality, args.metric)
    used = zoo.from_file(found)
    if settings.threads:
        torch.set_num_threads(settings.threads)

    def one(source: Path) -> bytes:
        pixels = image.read(source.read_bytes(), settings.max_pixels)
        return bitstream.serialize(used.encode(codec.to_tensor(pixels), args.format, "exact"))

    return _each(targets, one)


def _decode(args: argparse.Namespace) -> int:
    tier, seed, alpha = find(args.tier), check_seed(args.seed), check_realism(args.realism)
    names = ("sampler", "steps", "eta", "gamma", "guidance")
    settings = tier.settings and vary(tier.settings, **{n: getattr(args, n) for n in names})
    targets = _targets(args.inputs, args.output, ".png")
    for target in targets.values():
        _picture_format(target)
    if args.url:
        asked = {"seed": seed, "realism": alpha, **{n: getattr(args, n) for n in names}}
        return _each(targets, partial(_decode_there, args.url, args.tier, asked, targets))

    with without_garbage_collection():
        from torch import Tensor
        from tqdm import tqdm

        from models import image, library
        from models.codec import bitstream, codec

    own = ServiceSettings()
    loaded = library.load(own.threads, settings is not None, own.weights_dir)

    def one(source: Path) -> bytes:
        b = bitstream.parse(source.read_bytes(), own.max_pixels)
        text: dict[str, str] = {}
        if settings is None:
            pixels = codec.to_pixels(codec.crop(loaded.instant(b)[1], b.height, b.width))
        else:
            with tqdm(
                total=settings.steps, desc=source.name, unit="step", leave=False, disable=None
            ) as bar:

                def on_step(_step: int, _steps: int, _picture: Callable[[], Tensor]) -> None:
                    bar.update()

                pixels = loaded.perceptual(b, settings, seed, on_step, alpha)
            ids = loaded.weights_ids(b)
            text = library.provenance(tier.name, settings, seed, *ids, alpha)
        return image.write(pixels, _picture_format(targets[source]), text)

    return _each(targets, one)


def _decode_there(
    url: str, tier: str, asked: dict[str, Any], targets: dict[Path, Path], source: Path
) -> bytes:
    """The picture that the service at `url` draws; its draft is in the target meanwhile."""
    from httpx import InvalidURL, TransportError
    from tqdm import tqdm

    from service.client import Client

    format = _picture_format(targets[source])
    data = source.read_bytes()
    try:
        with (
            Client(url, os.environ.get("AFTERIMAGE_API_KEY", "")) as client,
            tqdm(desc=source.name, unit="step", leave=False, disable=None) as bar,
        ):
            for update in client.decode(data, tier, format=format, previews=False, **asked):
                if update.kind == "draft" and update.picture:
                    _write(targets[source], update.picture)
                bar.total = update.total or bar.total
                bar.update(max(update.step - bar.n, 0))
    except (TransportError, InvalidURL) as e:
        raise AfterimageError(f"{url}: {e}") from e
    assert update.picture is not None
    return update.picture


def _inspect(args: argparse.Namespace) -> int:
    from models.codec import bitstream, catalogue
    from service.schemas import Inspection

    settings = ServiceSettings()
    rows = [*catalogue.imported(settings.weights_dir), *catalogue.shipped()]
    failures = 0
    for source in args.inputs:
        try:
            data = source.read_bytes()
            b = bitstream.parse(data, settings.max_pixels)
        except (AfterimageError, OSError) as e:
            failures += 1
            complain(f"{source}: {e}")
            continue
        found = catalogue.find(rows, b.quality, b.metric, b.weights_id)
        print(Inspection.of(b, len(data), found is not None).model_dump_json())  # noqa: T201
    return 1 if failures else 0


def _targets(inputs: Sequence[Path], given: str, suffix: str) -> dict[Path, Path]:
    """Input -> output file. `given` is a folder if it is one, ends with / or must hold several."""
    output = Path(given)
    if len(set(inputs)) < len(inputs):
        raise AfterimageError("an input is named twice")
    if len(inputs) == 1 and not output.is_dir() and not given.endswith("/"):
        targets = {inputs[0]: output}
    else:
        if output.exists() and not output.is_dir():
            raise AfterimageError(f"{output} is a file; several inputs need a folder")
        targets = {source: output / f"{source.stem}{suffix}" for source in inputs}
    if len(set(targets.values())) < len(targets):
        raise AfterimageError("several inputs would be written to the same file")
    for source, target in targets.items():
        if source.resolve() == target.resolve():
            raise AfterimageError(f"{source} would be overwritten by its own output")
    return targets


def _each(targets: dict[Path, Path], one: Callable[[Path], bytes]) -> int:
    """Write `one(source)` to each target; a source that fails is told, the others go on."""
    from tqdm import tqdm

    failures = 0
    for source, target in tqdm(targets.items(), unit="file", disable=None):
        try:
            _write(target, one(source))
        except (AfterimageError, OSError) as e:
            failures += 1
            complain(f"{source}: {e}")
    return 1 if failures else 0


def _write(target: Path, data: bytes) -> None:
    """All of it or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as part:
        part.write_bytes(data)


def _picture_format(target: Path) -> "OutputFormat":
    from models.image import SUFFIXES

    try:
        return SUFFIXES[target.suffix.lower()]
    except KeyError:
        raise AfterimageError(f"{target}: write {', '.join(SUFFIXES)}") from None
