"""Pictures that were drawn, as PNG files: an evaluation that was cut off goes on, or grows.

`FOLDER/q2/kodim01.png/ddim-10.seed0.png`; each file's text says what it was drawn from, and how
long that took. A file of other bytes, weights, settings or code is as good as none.
"""

import ast
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from models import files, image
from models.errors import PictureError
from models.geometry import MAX_PIXELS
from models.image import Pixels

Draw = tuple[str, int]
"""Tier and seed."""

_ORIGIN, _SECONDS = "Afterimage-Origin", "Afterimage-Seconds"
_NAME = re.compile(r"(?P<tier>.+)\.seed(?P<seed>\d+)\.png")


@dataclass(frozen=True, slots=True)
class Decode:
    """A drawn picture, and the seconds from latents to it."""

    pixels: Pixels
    seconds: float


class Kept:
    """The drawn pictures of one evaluation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def draws(self, quality: int, picture: str) -> set[Draw]:
        """What files there are for `picture`, whatever they were drawn from."""
        names = (_NAME.fullmatch(f.name) for f in self._of(quality, picture).glob("*.png"))
        return {(name["tier"], int(name["seed"])) for name in names if name}

    def get(self, quality: int, picture: str, draw: Draw, origin: str) -> Decode | None:
        """What was drawn from `origin`; None where there is none, or it cannot be read."""
        file = self._file(quality, picture, draw)
        try:
            with Image.open(file) as source:
                text = dict(source.info)
            if text.get(_ORIGIN) != origin:
                return None
            return Decode(image.read(file.read_bytes(), MAX_PIXELS), float(text[_SECONDS]))
        except (OSError, KeyError, ValueError, PictureError):
            return None

    def put(self, quality: int, picture: str, draw: Draw, origin: str, decode: Decode) -> None:
        """Keep a picture; a file appears whole or not at all."""
        file = self._file(quality, picture, draw)
        file.parent.mkdir(parents=True, exist_ok=True)
        text = {_ORIGIN: origin, _SECONDS: f"{decode.seconds:.3f}"}
        with files.atomic_write(file) as part:
            part.write_bytes(image.write(decode.pixels, "png", text))

    def _of(self, quality: int, picture: str) -> Path:
        return self.folder / f"q{quality}" / picture

    def _file(self, quality: int, picture: str, draw: Draw) -> Path:
        tier, seed = draw
        return self._of(quality, picture) / f"{tier}.seed{seed}.png"


def code_digest(source: str) -> str:
    """SHA-256 of Python source (hex) that ignores comments, docstrings, imports and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [line for line in body if not _is_idle(line)]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _is_idle(node: ast.AST) -> bool:
    """Whether a statement is an import or a string that stands alone."""
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return text or isinstance(node, ast.Import | ast.ImportFrom)
