"""`python -m models.train msh | bank | diffusion | follow | export`; each has `--help`.

To train on several devices: `torchrun --nproc-per-node N -m models.train …` with the same options.
"""

import argparse
from pathlib import Path
from typing import Any

from models.errors import AfterimageError
from models.train import bank
from models.train.adapt import adapt
from models.train.config import RunConfig, add_options
from models.train.decoder_config import DiffusionConfig, resolve
from models.train.diffusion import DiffusionTask
from models.train.distributed import ProcessGroup
from models.train.encoder import Encoder
from models.train.msh import MshConfig, MshTask, with_init_sizes
from models.train.photos import photographs
from models.train.run import Run
from models.train.task import Task


def main() -> None:
    parser = _parser()
    args = vars(parser.parse_args())
    command = args.pop("command")
    try:
        if command == "bank":
            _bank(**args)
        elif command == "export":
            _export(**args)
        elif command == "follow":
            unexplained = adapt(**args)
            print(f"fraction of latent power that the map does not explain: {unexplained:.4f}")  # noqa: T201
        else:
            _train(command, args)
    except (ValueError, OSError, AfterimageError) as e:
        parser.error(str(e))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models.train", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_options(
        commands.add_parser("msh", help="train the codec, a mean-scale hyperprior (msh)"), MshConfig
    )
    add_options(
        commands.add_parser("diffusion", help="train the diffusion decoder"), DiffusionConfig
    )

    _add_bank(commands)

    f = commands.add_parser("follow", help="adapt a decoder to a codec that was trained further")
    f.add_argument("decoder", type=Path, help="decoder.safetensors of a run, or the shipped one")
    f.add_argument("--quality", type=int, choices=(1, 2, 3), required=True, help="codec quality")
    f.add_argument("--before", type=Path, required=True, help="codec that the decoder knows")
    f.add_argument("--after", type=Path, required=True, help="the same codec, trained further")
    f.add_argument("--photos", type=Path, required=True, help="folder of photographs")
    f.add_argument("--out", type=Path, required=True, help="file to write")

    e = commands.add_parser("export", help="install weights into models/weights/")
    e.add_argument("file", type=Path, help="decoder.safetensors of a run, or a codec's state dict")
    e.add_argument(
        "--quality", type=int, choices=(1, 2, 3), help="quality, if the file holds a codec"
    )
    e.add_argument(
        "--steps", type=int, default=0,
        help="install the decoder for DDIM with beta 1 and exactly this number of steps, as in the "
        "tier perceptual (default: for all other settings)",
    )  # fmt: skip
    e.add_argument(
        "--sizes", type=int, nargs=2, metavar=("N", "M"),
        help="widen the codec to N hidden and M latent channels; its output stays the same",
    )  # fmt: skip
    return parser


def _add_bank(commands: Any) -> None:
    b = commands.add_parser("bank", help="encode photographs once, for `diffusion --bank`")
    b.add_argument("--photos", type=Path, required=True, help="folder of photographs")
    b.add_argument("--out", type=Path, required=True, help="folder of the bank")
    b.add_argument("--quality", type=int, choices=range(1, 9), required=True, help="codec quality")
    b.add_argument(
        "--codecs", type=Path, help="folder of msh_q….safetensors (default: shipped weights)"
    )
    b.add_argument(
        "--other", type=Path, metavar="FILE",
        help="checkpoint of another codec of CompressAI, for `diffusion --others`",
    )  # fmt: skip
    b.add_argument(
        "--variants", type=int, default=1,
        help="versions of each photograph; the first is unchanged, others are scaled, flipped or "
        "transposed (default: 1)",
    )  # fmt: skip
    b.add_argument("--held-out", action="store_true", help="encode the held-out photographs only")
    b.add_argument("--limit", type=int, help="encode the first N photographs only")
    b.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="device that encodes"
    )


def _train(command: str, args: dict[str, Any]) -> None:
    group = ProcessGroup.join(args.get("device", "auto"))
    try:
        task: Task
        config: RunConfig
        if command == "msh":
            codec_config = with_init_sizes(MshConfig(**args))
            task, config = MshTask(codec_config, group), codec_config
        else:
            decoder_config = resolve(DiffusionConfig(**args))
            task, config = DiffusionTask(decoder_config, group), decoder_config
        Run(task, config, group).train()
    finally:
        group.leave()


def _bank(
    photos: Path,
    out: Path,
    quality: int,
    codecs: Path | None,
    other: Path | None,
    variants: int,
    held_out: bool,
    limit: int | None,
    device: str,
) -> None:
    files = photographs(photos, held_out)[:limit]
    folder = out / f"q{quality}"
    codec: bank.PictureCodec
    if other:
        from models.train.other_codec import OtherCodec

        codec = OtherCodec(other, quality)
        folder /= codec.weights_id
    else:
        codec = Encoder.load(quality, codecs, ProcessGroup.join(device).device)
    bank.build(files, folder, quality, codec, variants)


def _export(file: Path, quality: int | None, sizes: tuple[int, int] | None, steps: int) -> None:
    from models.train import export

    if sizes and not quality:
        raise ValueError("--sizes widens a codec: add its --quality")
    if steps and quality:
        raise ValueError("--steps is for a diffusion decoder, --quality for a codec; give one")
    if quality:
        weights_id = export.codec(file, quality, sizes=sizes)
    else:
        weights_id = export.decoder(file, steps=steps)
    print(weights_id)  # noqa: T201


if __name__ == "__main__":
    main()
