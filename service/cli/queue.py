"""`afterimage queue`: what waits and runs at a service, and changes to it."""

import argparse
import json
import os
import sys
import time
from typing import Any
from urllib.parse import quote

from models.errors import AfterimageError
from service.cli import options, queue_text
from service.cli.terminal import say

WATCH_S = 2.0
"""Interval of `--watch`."""
CLEAR = "\x1b[H\x1b[2J"

ACTIONS = {
    "cancel": ("ID", "cancel a decode for all its callers", "DELETE", "jobs/{}"),
    "retry": ("ID", "queue a decode again for its caller", "POST", "jobs/{}/retry"),
    "release": ("DIGEST", "accept a quarantined bitstream again", "DELETE", "quarantine/{}"),
    "drain": ("WORKER", "let a worker take no further job", "POST", "workers/{}/drain"),
}
"""Command -> its argument, help, HTTP method and path."""


def add(commands: Any) -> None:
    """Add `queue` to the parser's commands."""
    queue = commands.add_parser("queue", help="show and change the queue of a service")
    _add_url(queue, default=options.URL)
    queue.add_argument("--watch", action="store_true", help=f"show it every {WATCH_S:g} seconds")
    queue.add_argument("--json", action="store_true", help="print the JSON of /v1/queue")
    queue.set_defaults(run=_show)
    actions = queue.add_subparsers(metavar="COMMAND")
    for name, (argument, help, _, _) in ACTIONS.items():
        action = actions.add_parser(name, help=help)
        action.add_argument("subject", metavar=argument)
        _add_url(action, default=argparse.SUPPRESS)
        action.set_defaults(run=_act, action=name)


def _add_url(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument(
        "--url",
        default=default,
        help="the service; its API key, with the scope operate, is in AFTERIMAGE_API_KEY "
        f"(default: {options.URL})",
    )


def _show(args: argparse.Namespace) -> int:
    while True:
        view = _request(args.url, "GET", "")
        lines = [json.dumps(view, ensure_ascii=False)] if args.json else queue_text.lines(view)
        text = "\n".join(lines)
        say(f"{CLEAR}{text}" if args.watch and sys.stdout.isatty() else text)
        if not args.watch:
            return 0
        time.sleep(WATCH_S)


def _act(args: argparse.Namespace) -> int:
    _, _, method, path = ACTIONS[args.action]
    answer = _request(args.url, method, path.format(quote(args.subject, safe="")))
    done = {
        "cancel": "{id} is {status}",
        "retry": "{id} is {status}",
        "release": "{digest} is accepted again",
        "drain": "{name} takes no further job; restart it to let it take jobs again",
    }
    say(done[args.action].format(**answer))
    return 0


def _request(url: str, method: str, path: str) -> dict[str, Any]:
    """The JSON of the response. Raises `AfterimageError`."""
    import anyio
    from httpx import InvalidURL, TransportError

    from service.client import AsyncClient

    async def send() -> dict[str, Any]:
        async with AsyncClient(url, os.environ.get("AFTERIMAGE_API_KEY", "")) as client:
            answer: dict[str, Any] = (await client.send(method, f"/v1/queue/{path}")).json()
            return answer

    try:
        return anyio.run(send)
    except (TransportError, InvalidURL) as e:
        raise AfterimageError(f"{url}: {e}") from e
