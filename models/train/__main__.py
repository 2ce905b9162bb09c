"""`python -m models.train bank | diffusion | export`: see `--help` of each."""

import argparse
from pathlib import Path

from models.train import bank, export
from models.train.diffusion import TrainConfig, Trainer


def _plan(text: str) -> tuple[tuple[str, float], ...]:
    stages = []
    for part in text.split(","):
        phase, _, minutes = part.partition(":")
        if phase not in {"phase1", "phase2"}:
            raise argparse.ArgumentTypeError(f"{part!r}: phase1:MINUTES or phase2:MINUTES")
        stages.append((phase, float(minutes)))
    return tuple(stages)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m models.train", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    b = commands.add_parser("bank", help="encode photographs once")
    b.add_argument("--photos", type=Path, required=True)
    b.add_argument("--out", type=Path, required=True)
    b.add_argument("--quality", type=int, choices=(1, 2, 3), required=True)
    b.add_argument("--held-out", action="store_true", help="the held-out photographs only")
    b.add_argument("--limit", type=int, help="only the first so many photographs")

    d = commands.add_parser("diffusion", help="train the diffusion decoder")
    d.add_argument("--bank", required=True, help="folder with q1, q2, q3 of training photographs")
    d.add_argument("--held-out", required=True, help="the same of held-out photographs")
    d.add_argument("--out", required=True, help="checkpoints; the same command resumes from them")
    d.add_argument("--plan", type=_plan, default=_plan("phase1:60,phase2:45"))
    d.add_argument("--init", default=argparse.SUPPRESS, help="decoder weights to start from")
    d.add_argument("--lpips", default=argparse.SUPPRESS, help="LPIPS-Alex weights, for phase 2")
    d.add_argument("--batch", type=int, default=argparse.SUPPRESS)
    d.add_argument("--crop", type=int, default=argparse.SUPPRESS)
    d.add_argument("--lr", type=float, default=argparse.SUPPRESS)
    d.add_argument("--lr-phase2", type=float, default=argparse.SUPPRESS)
    d.add_argument("--seed", type=int, default=argparse.SUPPRESS)
    d.add_argument("--compile", action="store_true")

    e = commands.add_parser("export", help="install weights into models/weights/")
    e.add_argument("file", type=Path, help="decoder.safetensors of a run, or a codec's state dict")
    e.add_argument("--quality", type=int, choices=(1, 2, 3), help="the file is a codec's")
    args = vars(parser.parse_args())

    command = args.pop("command")
    if command == "bank":
        files = bank.photographs(args["photos"], args["held_out"])[: args["limit"]]
        bank.build(files, args["out"] / f"q{args['quality']}", args["quality"])
    elif command == "export":
        file, quality = args["file"], args["quality"]
        print(export.codec(file, quality) if quality else export.decoder(file))  # noqa: T201
    else:
        Trainer(TrainConfig(**args)).run()


if __name__ == "__main__":
    main()
