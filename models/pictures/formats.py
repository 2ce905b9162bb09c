"""Decides which picture files are read, and opens them."""

import importlib.util
import io
from typing import Any

from PIL import Image, ImageFile, UnidentifiedImageError

from models import text_bodies
from models.errors import PictureError, UnsupportedPicture
from models.pictures.signatures import FORMATS, OPTIONAL, name_of, usual_name


def readable() -> list[str]:
    """Return the usual names of the formats that this installation reads."""
    installed = [name for name, (module, _) in OPTIONAL.items() if importlib.util.find_spec(module)]
    return [usual_name(name) for name in (*FORMATS, *installed)]


def check(data: bytes) -> str:
    """Return the format of a file that may be read. Raises `UnsupportedPicture` for others."""
    name = name_of(data)
    if name in FORMATS:
        return name
    use = f"use {', '.join(readable())}"
    if name is None:
        use = text_bodies.advice(data) or use
        raise UnsupportedPicture(f"the file is not a picture in a known format; {use}")
    if name in OPTIONAL and importlib.util.find_spec(OPTIONAL[name][0]):
        return name
    if name in OPTIONAL:
        use = f"install afterimage[{OPTIONAL[name][1]}] on the server, or {use}"
    raise UnsupportedPicture(f"the file's format is {usual_name(name)}, which is not read; {use}")


def open_file(data: bytes, format: str) -> ImageFile.ImageFile:
    """Open a file of one of `FORMATS` without decoding its pixels.

    Raises `UnsupportedPicture` for a variant that Pillow does not read, `PictureError` for a
    broken file, each with Pillow's reason.
    """
    try:
        return Image.open(io.BytesIO(data), formats=[format])
    except Image.DecompressionBombError:
        raise
    except UnidentifiedImageError:
        reason = _hidden_reason(data, format)
    except Exception as e:  # readers raise many kinds of errors
        reason = str(e)
    name = usual_name(format)
    if format == "WEBP" and int.from_bytes(data[4:8], "little") + 8 > len(data):
        reason = "it is truncated"
    if any(words in reason.lower() for words in _VARIANT):
        raise UnsupportedPicture(
            f"the {name} file is of a kind that is not read: {reason}; convert it to PNG"
        )
    raise PictureError(f"the {name} file is damaged and cannot be read: {reason}")


def _hidden_reason(data: bytes, format: str) -> str:
    """The reason why Pillow's reader of a format refuses a file, which `Image.open` hides."""
    opener: Any = Image.OPEN[format][0]
    try:
        opener(io.BytesIO(data), "")
    except Exception as e:
        return str(e) or type(e).__name__
    return "its header cannot be read"


_VARIANT = ("unsupported", "unknown pixel mode", "cannot handle", "not implemented", "unrecognized")
"""Parts of Pillow's errors about valid files of a variant that it does not read."""
