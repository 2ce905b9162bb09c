"""`python -m models.train msh | bank | diffusion | follow | export`: see `--help` of each.

Several devices: `torchrun --nproc-per-node N -m models.train …` with the same options.
"""

import argparse
from pathlib import Path
from typing import Any

from models.errors import AfterimageError
from models.train import bank
from models.train.adapt import follow
from models.train.config import RunConfig, add_options
from models.train.decoder_config import DiffusionConfig, resolved
from models.train.diffusion import DiffusionTask
from models.train.distributed import Ranks
from models.train.msh import MshConfig, MshTask, sized
from models.train.photos import photographs
from models.train.run import Run, Task


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
            print(f"{follow(**args):.4f} of the latents' power is left over")  # noqa: T201
        else:
            _train(command, args)
    except (ValueError, OSError, AfterimageError) as e:
        parser.error(str(e))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models.train", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add_options(commands.add_parser("msh", help="train the codec"), MshConfig)
    add_options(commands.add_parser("diffusion", help="train the decoder"), DiffusionConfig)

    b = commands.add_parser("bank", help="encode photographs once, onto the disk")
    b.add_argument("--photos", type=Path, required=True, help="folder of photographs")
    b.add_argument("--out", type=Path, required=True, help="folder of the bank")
    b.add_argument("--quality", type=int, choices=(1, 2, 3), required=True, help="of the codec")
    b.add_argument("--codecs", type=Path, help="folder of msh_q….safetensors, if not the shipped")
    b.add_argument("--variants", type=int, default=1, help="ways to show each photograph")
    b.add_argument("--held-out", action="store_true", help="the held-out photographs only")
    b.add_argument("--limit", type=int, help="only the first so many photographs")
    b.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="to encode on")

    f = commands.add_parser("follow", help="adapt a decoder to a codec that was trained on")
    f.add_argument("decoder", type=Path, help="decoder.safetensors of a run, or the shipped one")
    f.add_argument("--quality", type=int, choices=(1, 2, 3), required=True, help="of the codecs")
    f.add_argument("--before", type=Path, required=True, help="the codec that it knows")
    f.add_argument("--after", type=Path, required=True, help="the same, trained on")
    f.add_argument("--photos", type=Path, required=True, help="folder of photographs")
    f.add_argument("--out", type=Path, required=True, help="file to write")

    e = commands.add_parser("export", help="install weights into models/weights/")
    e.add_argument("file", type=Path, help="decoder.safetensors of a run, or a codec's state dict")
    e.add_argument("--quality", type=int, choices=(1, 2, 3), help="the file is a codec's")
    e.add_argument(
        "--sizes", type=int, nargs=2, metavar=("N", "M"),
        help="widen that codec to so many hidden and latent channels; it computes the same",
    )  # fmt: skip
    return parser


def _train(command: str, args: dict[str, Any]) -> None:
    ranks = Ranks.join(args.get("device", "auto"))
    try:
        task: Task
        config: RunConfig
        if command == "msh":
            codec = sized(MshConfig(**args))
            task, config = MshTask(codec, ranks), codec
        else:
            decoder = resolved(DiffusionConfig(**args))
            task, config = DiffusionTask(decoder, ranks), decoder
        Run(task, config, ranks).go()
    finally:
        ranks.leave()


def _bank(
    photos: Path,
    out: Path,
    quality: int,
    codecs: Path | None,
    variants: int,
    held_out: bool,
    limit: int | None,
    device: str,
) -> None:
    files = photographs(photos, held_out)[:limit]
    bank.build(files, out / f"q{quality}", quality, codecs, variants, Ranks.join(device).device)


def _export(file: Path, quality: int | None, sizes: tuple[int, int] | None) -> None:
    from models.train import export  # needs compressai, which the trainers do not

    if sizes and not quality:
        raise ValueError("--sizes are a codec's; --quality says which")
    own = export.codec(file, quality, sizes=sizes) if quality else export.decoder(file)
    print(own)  # noqa: T201


if __name__ == "__main__":
    main()
