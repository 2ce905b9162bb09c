"""Read picture files to pixels, and write pixels to picture files."""

from models.pictures.output_formats import MEDIA_TYPES, SUFFIXES, OutputFormat
from models.pictures.reading import Picture, Pixels, read, read_with_notes
from models.pictures.writing import ENCODERS, write

__all__ = [
    "ENCODERS",
    "MEDIA_TYPES",
    "SUFFIXES",
    "OutputFormat",
    "Picture",
    "Pixels",
    "read",
    "read_with_notes",
    "write",
]
