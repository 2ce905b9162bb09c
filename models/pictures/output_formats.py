"""Formats of the pictures that are written. Importing this module loads no libraries."""

from collections.abc import Mapping
from typing import Literal

OutputFormat = Literal["png", "jpeg", "webp", "avif", "npy"]

MEDIA_TYPES: Mapping[OutputFormat, str] = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "avif": "image/avif",
    "npy": "application/x-npy",
}
SUFFIXES: Mapping[str, OutputFormat] = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
    ".avif": "avif",
    ".npy": "npy",
}
