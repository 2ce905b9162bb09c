"""`afterimage serve | worker | encode | decode | inspect | keys | weights`."""

import argparse
import contextlib
import gc
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, get_args

from pydantic import ValidationError
from pydantic_settings import SettingsError

from models.bitstream import METRICS
from models.errors import AfterimageError
from models.files import whole
from models.tiers import TIERS, Sampler, check_realism, check_seed, find, vary
from service import __version__, keys, weights
from service.processes import COURIER, WORKER, running
from service.settings import ServiceSettings
from worker.settings import prepare_process, without_collections

if TYPE_CHECKING:  # it brings Pillow
    from models.image import OutputFormat

STALLED_S = 10
"""How long requests may take to finish when the service stops."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0, or 1 after an error that was told on stderr (2 for wrong usage)."""
    args = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.run
    try:
        prepare_process(ServiceSettings())
        return command(args)
    except ValidationError as e:
        wrong = "; ".join(f"{'.'.join(map(str, x['loc']))}: {x['msg']}" for x in e.errors())
        return _complain(f"wrong settings in the environment: {wrong}")
    except SettingsError as e:  # what should be JSON and is not
        return _complain(f"wrong settings in the environment: {e}")
    except (AfterimageError, OSError) as e:
        return _complain(str(e))
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="afterimage", description="Learned-codec decoding.")
    parser.add_argument("--version", action="version", version=f"afterimage {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run the HTTP API with its workers")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)
    serve.add_argument("--workers", type=int, default=1, help="worker processes (default 1)")
    _stores(serve, "else a private server")
    serve.set_defaults(run=_serve)

    worker = commands.add_parser("worker", help="run one worker over an existing Redis")
    _stores(worker, "which must be set")
    worker.set_defaults(run=_worker)

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

    keys.add(commands.add_parser("keys", help="API keys: make one"))
    weights.add(commands.add_parser("weights", help="codec weights: import, export, list, remove"))
    return parser


def _stores(command: argparse.ArgumentParser, otherwise: str) -> None:
    command.add_argument("--redis-url", help=f"the queue; default REDIS_URL, {otherwise}")
    command.add_argument(
        "--cache-redis-url", help="the pictures; default CACHE_REDIS_URL, else with the queue"
    )


def _set_stores(args: argparse.Namespace) -> None:
    for name, url in (("REDIS_URL", args.redis_url), ("CACHE_REDIS_URL", args.cache_redis_url)):
        if url:
            os.environ[name] = url


def _files(command: argparse.ArgumentParser) -> None:
    command.add_argument("inputs", type=Path, nargs="+", metavar="IN")
    command.add_argument(
        "-o", "--output", required=True, help="a file; or a folder, which ends with / or is one"
    )


def _serve(args: argparse.Namespace) -> int:
    if args.workers < 0:
        return _complain("--workers must be 0 or more")
    _set_stores(args)
    settings = ServiceSettings()

    from worker import embed, logs, store, tracing
    from worker.webhooks import WebhookSettings

    if settings.redis_url:
        connected = store.connect(settings)  # what is wrong with it is told at once
        with contextlib.suppress(store.RedisError):  # that it is away is not
            connected.check()
        connected.close()
    loading = contextlib.ExitStack()
    loading.enter_context(without_collections())

    import uvicorn

    from service.app import create_app  # before the workers start, who would be in its way

    logs.setup("INFO")
    tracing.setup("afterimage-api")
    signal.signal(signal.SIGTERM, _exit)  # so that everything started here is stopped

    class Server(uvicorn.Server):
        async def startup(self, sockets=None):  # type: ignore[no-untyped-def]
            await super().startup(sockets)
            loading.close()
            if not self.should_exit:
                _say(f"Afterimage is ready at http://{args.host}:{args.port}  (Ctrl-C stops it)")

        async def shutdown(self, sockets=None):  # type: ignore[no-untyped-def]
            app.state.own.closing.set()
            await super().shutdown(sockets)

    with contextlib.ExitStack() as stack:
        if not settings.redis_url:
            _say("no REDIS_URL: starting a private Redis")
            queue, cache = stack.enter_context(embed.servers(settings.cache_dir))
            os.environ["REDIS_URL"] = queue
            os.environ.setdefault("CACHE_REDIS_URL", cache)
        courier = [COURIER] if WebhookSettings().secrets else []
        stack.enter_context(running([WORKER] * args.workers + courier, settings.grace_s))
        _say("loading models")
        os.environ.setdefault("AFTERIMAGE_METRICS_HOST", args.host)
        app = create_app(ServiceSettings())
        config = uvicorn.Config(
            app,
            args.host,
            args.port,
            log_config=None,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=STALLED_S,
        )
        server = Server(config)
        with contextlib.suppress(KeyboardInterrupt):
            server.run()
    gc.freeze()  # as in the worker
    return 0 if server.started else 1


def _worker(args: argparse.Namespace) -> int:
    _set_stores(args)
    os.execv(WORKER[0], WORKER)


def _encode(args: argparse.Namespace) -> int:
    with without_collections():
        import torch

        from models import bitstream, catalogue, codec, image, zoo

    settings = ServiceSettings()
    suffix = ".msh" if args.format == "msh" else ".bin"
    targets = _targets(args.inputs, args.output, suffix)
    rows = [*catalogue.imported(settings.weights_dir), *catalogue.shipped()]
    found = catalogue.find(rows, args.quality, args.metric)
    if found is None:
        raise catalogue.wrong_weights(args.quality, args.metric)
    used = zoo.opened(found)
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

    with without_collections():
        from torch import Tensor
        from tqdm import tqdm

        from models import bitstream, codec, image, library

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
    from models import bitstream, catalogue
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
            _complain(f"{source}: {e}")
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
            _complain(f"{source}: {e}")
    return 1 if failures else 0


def _write(target: Path, data: bytes) -> None:
    """All of it or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole(target) as part:
        part.write_bytes(data)


def _picture_format(target: Path) -> "OutputFormat":
    from models.image import SUFFIXES

    try:
        return SUFFIXES[target.suffix.lower()]
    except KeyError:
        raise AfterimageError(f"{target}: write {', '.join(SUFFIXES)}") from None


def _exit(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


def _complain(text: str) -> int:
    print(f"afterimage: {text}", file=sys.stderr)  # noqa: T201
    return 1


if __name__ == "__main__":
    sys.exit(main())
