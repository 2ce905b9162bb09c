"""Cache of drawn pictures on disk, so that an evaluation can be interrupted, resumed and extended.

The files are PNGs, for example `FOLDER/q2/kodim01.png/ddim-10.seed0.png`. Text chunks hold the
origin, which names all that a picture depends on (bitstream, weights, settings and code), and the
seconds that drawing took. A file with another origin than the expected one is drawn again.
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

DecodeKey = tuple[str, int]
"""Tier and seed."""

_ORIGIN, _SECONDS = "Afterimage-Origin", "Afterimage-Seconds"
_NAME = re.compile(r"(?P<tier>.+)\.seed(?P<seed>\d+)\.png")


@dataclass(frozen=True, slots=True)
class CachedDecode:
    """A drawn picture, and the seconds from latents to picture."""

    pixels: Pixels
    seconds: float


class DecodeCache:
    """The drawn pictures of one evaluation, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def keys(self, quality: int, picture: str) -> set[DecodeKey]:
        """Tiers and seeds with a file for `picture`, whatever its origin."""
        names = (_NAME.fullmatch(f.name) for f in self._folder(quality, picture).glob("*.png"))
        return {(name["tier"], int(name["seed"])) for name in names if name}

    def get(self, quality: int, picture: str, key: DecodeKey, origin: str) -> CachedDecode | None:
        """The cached picture; None if it is missing, unreadable or of another origin."""
        file = self._file(quality, picture, key)
        try:
            with Image.open(file) as source:
                text = dict(source.info)
            if text.get(_ORIGIN) != origin:
                return None
            return CachedDecode(image.read(file.read_bytes(), MAX_PIXELS), float(text[_SECONDS]))
        except (OSError, KeyError, ValueError, PictureError):
            return None

    def put(
        self, quality: int, picture: str, key: DecodeKey, origin: str, decode: CachedDecode
    ) -> None:
        """Store a picture in an atomic write."""
        file = self._file(quality, picture, key)
        file.parent.mkdir(parents=True, exist_ok=True)
        text = {_ORIGIN: origin, _SECONDS: f"{decode.seconds:.3f}"}
        with files.atomic_write(file) as part:
            part.write_bytes(image.write(decode.pixels, "png", text))

    def _folder(self, quality: int, picture: str) -> Path:
        return self.folder / f"q{quality}" / picture

    def _file(self, quality: int, picture: str, key: DecodeKey) -> Path:
        tier, seed = key
        return self._folder(quality, picture) / f"{tier}.seed{seed}.png"


def code_digest(source: str) -> str:
    """SHA-256 (hex) of Python source, ignoring comments, docstrings, imports and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [line for line in body if not _is_ignored(line)]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _is_ignored(node: ast.AST) -> bool:
    """True for imports and for statements that are only a constant, such as docstrings."""
    constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return constant or isinstance(node, ast.Import | ast.ImportFrom)
