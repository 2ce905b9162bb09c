"""The parser of the `afterimage` command: descriptions and examples of all commands."""

import argparse
from collections.abc import Mapping
from typing import Any

TEXTS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "afterimage": (
        "Encode and decode pictures with learned codecs, or serve the HTTP API.",
        (
            "afterimage encode photo.jpg -o photo.msh",
            "afterimage decode photo.msh -o photo.png --tier perceptual",
            "afterimage serve",
        ),
    ),
    "afterimage serve": (
        "Run the HTTP API and its workers, with a private Redis unless one is named.",
        (
            "afterimage serve",
            "afterimage serve --host 0.0.0.0 --port 8080 --workers 2",
            "afterimage serve --redis-url redis://queue --cache-redis-url redis://cache",
        ),
    ),
    "afterimage worker": (
        "Run one worker for the services that use the same Redis.",
        ("afterimage worker --redis-url redis://queue --cache-redis-url redis://cache",),
    ),
    "afterimage encode": (
        "Encode pictures (PNG, JPEG, WebP, AVIF, TIFF, GIF, BMP or PNM) as bitstreams.",
        (
            "afterimage encode photo.jpg -o photo.msh",
            "afterimage encode *.png -o coded/ --quality 3",
            "convert photo.heic png:- | afterimage encode - -o photo.msh",
            "afterimage encode photos/ -o coded/ --url http://127.0.0.1:8000 --skip-existing",
        ),
    ),
    "afterimage decode": (
        "Decode bitstreams to pictures; an output's suffix chooses PNG, JPEG, WebP, AVIF or NPY.",
        (
            "afterimage decode photo.msh -o photo.png",
            "afterimage decode coded/*.msh -o pictures/ --tier perceptual --seed 1",
            "afterimage decode photo.msh -o photo.webp --tier ddim-10 --steps 20 --realism 0.5",
            "afterimage decode photo.msh -o - --url http://127.0.0.1:8000 | display -",
            "afterimage decode coded/ -o pictures/ --url http://127.0.0.1:8000 --skip-existing",
            "afterimage decode --source store:in/a.msh --target store:out/a.webp --tier perceptual",
        ),
    ),
    "afterimage inspect": (
        "Print a line of JSON for each bitstream: its file, and its header or what is wrong.",
        ("afterimage inspect coded/*.msh", "afterimage inspect - < photo.msh"),
    ),
    "afterimage batch": (
        "Decode many bitstreams at a service, from object stores to object stores.",
        ("afterimage batch submit store:in/a/ store:out/b/ --format webp --watch",),
    ),
    "afterimage batch submit": (
        "Submit a batch: all objects below a prefix, or the items of a file of JSON lines.",
        (
            "afterimage batch submit store:in/a/ store:out/b/ --format webp --watch",
            "afterimage batch submit --items items.jsonl --tier ddim-10 --on-existing replace",
            "afterimage batch submit --items - < items.jsonl",
        ),
    ),
    "afterimage batch list": (
        "List batches, newest first: with API keys, those of the key.",
        ("afterimage batch list", "afterimage batch list --limit 100"),
    ),
    "afterimage batch status": (
        "Show the state of a batch; with --failed, a line of JSON for each failed item.",
        (
            "afterimage batch status 7c1d0a6e2f9b4c5d8e3f1a2b3c4d5e6f --watch",
            "afterimage batch status 7c1d0a6e2f9b4c5d8e3f1a2b3c4d5e6f --failed",
        ),
    ),
    "afterimage batch cancel": (
        "Cancel the items of a batch that have not begun.",
        ("afterimage batch cancel 7c1d0a6e2f9b4c5d8e3f1a2b3c4d5e6f",),
    ),
    "afterimage batch retry": (
        "Take the failed items of a batch again.",
        ("afterimage batch retry 7c1d0a6e2f9b4c5d8e3f1a2b3c4d5e6f --watch",),
    ),
    "afterimage queue": (
        "Show what waits and runs at a service, its workers, and quarantined bitstreams.",
        ("afterimage queue --watch", "afterimage queue --url https://pictures.example"),
    ),
    "afterimage queue cancel": (
        "Cancel a decode for all its callers. A running one stops at its next step.",
        ("afterimage queue cancel 3f2b8c5d9e0a4b6c8d1e2f3a4b5c6d7e",),
    ),
    "afterimage queue retry": (
        "Queue a decode again that failed, was canceled, or whose picture has expired.",
        ("afterimage queue retry 3f2b8c5d9e0a4b6c8d1e2f3a4b5c6d7e",),
    ),
    "afterimage queue release": (
        "Accept a quarantined bitstream again, on which workers crashed.",
        (f"afterimage queue release {'e3b0c442' * 8}",),
    ),
    "afterimage queue drain": (
        "Let a worker finish its job and take no other until it is restarted.",
        ("afterimage queue drain gpu-1-42",),
    ),
    "afterimage keys": (
        "Create API keys.",
        ("afterimage keys new gallery --file keys.toml",),
    ),
    "afterimage keys new": (
        "Create an API key. It is printed once, and only its SHA-256 is stored.",
        (
            "afterimage keys new gallery --file keys.toml",
            "afterimage keys new press --scopes decode,encode --requests-per-minute 60",
            "afterimage keys new library --priority batch --weight 2",
        ),
    ),
    "afterimage weights": (
        "Import, export, list and remove codec weights.",
        ("afterimage weights list",),
    ),
    "afterimage weights import": (
        "Install a checkpoint of one of CompressAI's image codecs. Restart services to use it.",
        (
            "afterimage weights import zoo --quality 4",
            "afterimage weights import my.pth --quality 2 --metric ms-ssim",
        ),
    ),
    "afterimage weights export": (
        "Write a state dict that CompressAI can load.",
        ("afterimage weights export --quality 2 -o quality2.safetensors",),
    ),
    "afterimage weights list": (
        "List the installed weights. The first row of each quality and metric is in use.",
        ("afterimage weights list",),
    ),
    "afterimage weights remove": (
        "Remove imported weights. Bitstreams encoded with them can no longer be decoded.",
        ("afterimage weights remove 0123456789abcdef",),
    ),
}
"""Command -> what it does, and examples; its `--help` shows both."""


class Parser(argparse.ArgumentParser):
    """A parser with the texts of its command. Parsers of sub-commands are of this class too."""

    def __init__(self, prog: str, **options: Any) -> None:
        description, examples = TEXTS[prog]
        super().__init__(
            prog=prog,
            description=description,
            epilog="\n".join(("examples:", *(f"  {example}" for example in examples))),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )
