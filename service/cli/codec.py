"""`afterimage encode`, `decode` and `inspect`."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from models.codec.architectures import DEFAULT
from models.errors import AfterimageError
from models.tiers import (
    MAX_GUIDANCE,
    MAX_STEPS,
    TIERS,
    Sampler,
    Settings,
    check_realism,
    check_seed,
    find,
    vary,
)
from service.cli import options, remote
from service.cli.files import (
    convert_each,
    note_frames,
    output_paths,
    picture_format,
    read_bitstream,
    read_picture,
    reason,
    without_existing,
)
from service.cli.terminal import complain, note, say_json
from service.settings import ServiceSettings
from worker.settings import without_garbage_collection

SAMPLER_SETTINGS = ("sampler", "steps", "eta", "gamma", "guidance")
"""Options of `decode` that override the tier's sampler settings."""


def add(commands: Any) -> None:
    """Add `encode`, `decode` and `inspect` to the parser's commands."""
    encode = commands.add_parser("encode", help="encode pictures as bitstreams")
    options.add_inputs(encode, at_least_one=False)
    options.add_output(encode)
    options.add_quality(
        encode,
        default=2,
        help="1 (smallest file) to 8 (best picture); 4 to 8 need imported weights (default: 2)",
    )
    options.add_metric(
        encode, help="what the weights minimise; ms-ssim needs imported weights (default: mse)"
    )
    options.add_model(
        encode,
        default=DEFAULT,
        help="codec; others than mbt2018-mean need imported weights and --format compressai "
        "(default: mbt2018-mean)",
    )
    encode.add_argument(
        "--format",
        choices=("msh", "compressai"),
        default="msh",
        help="msh has checksums; compressai is read by CompressAI's examples (default: msh)",
    )
    options.add_service(encode)
    encode.set_defaults(run=_encode)

    decode = commands.add_parser(
        "decode", help="decode bitstreams to pictures: PNG, JPEG, WebP, AVIF or NPY"
    )
    options.add_inputs(decode, at_least_one=False)
    options.add_output(decode)
    _add_tier(decode)
    add_sampler(decode)
    options.add_service(decode)
    decode.set_defaults(run=_decode)

    inspect = commands.add_parser("inspect", help="print the headers of bitstreams as JSON lines")
    options.add_inputs(inspect)
    inspect.set_defaults(run=_inspect)


def _add_tier(decode: argparse.ArgumentParser) -> None:
    decode.add_argument(
        "--tier",
        choices=tuple(TIERS),
        default="instant",
        help="instant: the codec's picture; perceptual: the most natural picture; others: random "
        "pictures that the bitstream may stand for (default: instant)",
    )


def add_sampler(decode: argparse.ArgumentParser) -> None:
    """Add the options of a diffusion picture besides the tier: seed, sampler settings, realism."""
    decode.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the noise, 0 to 2^64 - 1: equal seeds give equal pictures (default: 0)",
    )
    sampler = decode.add_argument_group("sampler settings", "Default: those of the tier.")
    sampler.add_argument("--steps", type=int, help=f"1 to {MAX_STEPS}; time is proportional to it")
    sampler.add_argument(
        "--eta", type=float, help="noise that each DDIM step adds: 0 (none) to 1 (as DDPM)"
    )
    sampler.add_argument("--gamma", type=float, help="scale of the initial noise, 0 to 1")
    sampler.add_argument(
        "--guidance",
        type=float,
        help=f"strength of autoguidance, 0 to {MAX_GUIDANCE:g}; 1 is off, others double the time",
    )
    sampler.add_argument("--sampler", choices=get_args(Sampler), help="sampling method")
    decode.add_argument(
        "--realism",
        type=float,
        default=1.0,
        help="0: the instant picture, 1: the tier's picture; between 0 and 1, a mix (default: 1)",
    )


def _encode(args: argparse.Namespace) -> int:
    remote.check(args)
    suffix = ".msh" if args.format == "msh" else ".bin"
    chosen = {name: getattr(args, name) for name in ("quality", "metric", "format", "model")}
    if args.source or args.target:
        return remote.encode_objects(args, chosen)
    targets = output_paths(args.inputs, args.output, suffix, remote.PICTURES if args.url else ())
    targets = without_existing(targets) if args.skip_existing else targets
    if args.url:
        return remote.encode_files(args, chosen, targets)
    return convert_each(targets, _local_encoder(args)) if targets else 0


def _local_encoder(args: argparse.Namespace) -> Callable[[Path], bytes]:
    """Load the codec; returns the function that encodes a picture file."""
    with without_garbage_collection():
        import torch

        from models import image
        from models.codec import bitstream, catalogue, codec, zoo

    settings = ServiceSettings()
    rows = [*catalogue.imported(settings.weights_dir), *catalogue.shipped()]
    installed = catalogue.find(rows, args.quality, args.metric, model=args.model)
    if installed is None:
        raise catalogue.wrong_weights(args.quality, args.metric, models=(args.model,))
    network = zoo.from_file(installed)
    if settings.threads:
        torch.set_num_threads(settings.threads)

    def encode(source: Path) -> bytes:
        data = read_picture(source)
        picture = image.read_with_notes(data, settings.max_pixels)
        for text in picture.notes:
            note(f"{source}: {text}")
        note_frames(source, data)
        x = codec.to_tensor(picture.pixels)
        return bitstream.serialize(network.encode(x, args.format, "exact"))

    return encode


def _decode(args: argparse.Namespace) -> int:
    tier = find(args.tier)
    check_seed(args.seed)
    check_realism(args.realism)
    overrides = {name: getattr(args, name) for name in SAMPLER_SETTINGS}
    overridden = [f"--{name}" for name, value in overrides.items() if value is not None]
    if tier.settings is None and overridden:
        raise AfterimageError(
            f"{', '.join(overridden)}: the tier {tier.name} has no sampler; choose another --tier"
        )
    sampling = tier.settings and vary(tier.settings, **overrides)
    remote.check(args)
    request = {"seed": args.seed, "realism": args.realism, **overrides}
    if args.source or args.target:
        return remote.decode_objects(args, request)
    targets = output_paths(args.inputs, args.output, ".png", remote.BITSTREAMS if args.url else ())
    for target in targets.values():
        picture_format(target)
    targets = without_existing(targets) if args.skip_existing else targets
    if args.url:
        return remote.decode_files(args, request, targets)
    return convert_each(targets, _local_decoder(args, sampling, targets)) if targets else 0


def _local_decoder(
    args: argparse.Namespace, sampling: Settings | None, targets: dict[Path, Path]
) -> Callable[[Path], bytes]:
    """Load the models; returns the function that decodes a file to a picture file.

    `sampling` is None for the instant tier.
    """
    with without_garbage_collection():
        from torch import Tensor
        from tqdm import tqdm

        from models import image, library
        from models.codec import bitstream

    settings = ServiceSettings()
    models = library.load(settings.threads, sampling is not None, settings.weights_dir, lazily=True)

    def decode(source: Path) -> bytes:
        b = bitstream.parse(read_bitstream(source), settings.max_pixels)
        text: dict[str, str] = {}
        used = models.codec(b)
        used.synthesis.prepare()
        if sampling is None:
            pixels = used.decode(b)
        else:
            with tqdm(
                total=sampling.steps, desc=source.name, unit="step", leave=False, disable=None
            ) as bar:

                def on_step(_step: int, _steps: int, _picture: Callable[[], Tensor]) -> None:
                    bar.update()

                pixels = models.draw(b, sampling, args.seed, on_step, args.realism)
            ids = models.weights_ids(b, sampling)
            text = library.provenance(args.tier, sampling, args.seed, *ids, args.realism)
        return image.write(pixels, picture_format(targets[source]), text)

    return decode


def _inspect(args: argparse.Namespace) -> int:
    from models.codec import bitstream, catalogue
    from service.schemas import Inspection

    settings = ServiceSettings()
    rows = [*catalogue.imported(settings.weights_dir), *catalogue.shipped()]
    failures = 0
    for source in args.inputs:
        line: dict[str, Any] = {"file": str(source)}
        try:
            data = read_bitstream(source)
            b = bitstream.parse(data, settings.max_pixels)
        except (AfterimageError, OSError) as e:
            failures += 1
            line["error"] = reason(e)
            complain(f"{source}: {line['error']}")
        else:
            installed = [
                r
                for r in b.readings
                if catalogue.find(rows, r.quality, r.metric, r.weights_id, r.model)
            ]
            read = installed[0] if installed else b
            line |= Inspection.of(read, len(data), bool(installed)).model_dump(mode="json")
        say_json(line)
    return 1 if failures else 0
