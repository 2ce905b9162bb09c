"""`afterimage serve | worker | encode | decode | inspect | keys | weights`."""

import argparse
import sys
from collections.abc import Callable, Sequence

from pydantic import ValidationError
from pydantic_settings import SettingsError

from models.errors import AfterimageError
from service import __version__
from service.cli import codec, keys, serve, weights
from service.cli.terminal import complain
from service.settings import ServiceSettings
from worker.settings import prepare_process


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0, or 1 after an error that was told on stderr (2 for wrong usage)."""
    args = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.run
    try:
        prepare_process(ServiceSettings())
        return command(args)
    except ValidationError as e:
        wrong = "; ".join(f"{'.'.join(map(str, x['loc']))}: {x['msg']}" for x in e.errors())
        return complain(f"wrong settings in the environment: {wrong}")
    except SettingsError as e:  # what should be JSON and is not
        return complain(f"wrong settings in the environment: {e}")
    except (AfterimageError, OSError) as e:
        return complain(str(e))
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="afterimage", description="Learned-codec decoding.")
    parser.add_argument("--version", action="version", version=f"afterimage {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve.add(commands)
    codec.add(commands)
    keys.add(commands.add_parser("keys", help="API keys: make one"))
    weights.add(commands.add_parser("weights", help="codec weights: import, export, list, remove"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
