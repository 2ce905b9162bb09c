"""The `afterimage` command: serve, worker, encode, decode, inspect, keys and weights."""

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

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells report it: 128 + SIGINT."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status.

    The status is 1 after an error, which is printed to stderr as one line. Wrong usage raises
    `SystemExit(2)`.
    """
    args = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.run
    try:
        prepare_process(ServiceSettings())
        return command(args)
    except ValidationError as e:
        faults = "; ".join(f"{_variable(x['loc'])}: {x['msg']}" for x in e.errors())
        return complain(f"invalid settings in the environment: {faults}")
    except SettingsError as e:  # a value that is not valid JSON
        return complain(f"invalid settings in the environment: {e}")
    except (AfterimageError, OSError) as e:
        return complain(str(e))
    except KeyboardInterrupt:
        return INTERRUPTED


def _variable(loc: tuple[int | str, ...]) -> str:
    """The environment variable of a setting, with the index of an invalid list item."""
    name, *index = map(str, loc)
    prefix = ServiceSettings.model_config["env_prefix"]
    variable = name if name.isupper() else f"{prefix}{name}".upper()
    return ".".join((variable, *index))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="afterimage",
        description="Encode and decode pictures with learned codecs, or serve the HTTP API.",
    )
    parser.add_argument("--version", action="version", version=f"afterimage {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in (serve, codec, keys, weights):
        module.add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
