"""Small files that take a very long time, or much memory, to read or to decode."""

import io
import struct

import google_crc32c
import numpy as np
import torch
from PIL import Image

from models import geometry
from models.codec import rans
from models.codec.bitstream import Bitstream
from models.codec.codec import Codec


def comments(megabytes: float = 4) -> bytes:
    """A plain PPM whose pixels stand behind comment lines: many seconds a megabyte."""
    return b"P3 1 1 255\n" + b"#\n" * int(megabytes * 2**19) + b"1 2 3\n"


def exif_segments(count: int = 160_000) -> bytes:
    """A JPEG of 4 MB with many Exif segments, each of which is joined to all former ones."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "JPEG")
    segment = b"Exif\0\0" + bytes(15)
    marker = b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment
    return out.getvalue()[:2] + marker * count + out.getvalue()[2:]


FILES = {
    "comment lines": comments,
    "Exif segments": exif_segments,
}


def large_bitstream(used: Codec, height: int = 4000, width: int = 5000) -> Bitstream:
    """A small bitstream of a large grey picture, which takes as long to decode as any other."""
    coder = used.latent_coder
    rows, columns = (side // geometry.STRIDE_Z for side in geometry.padded(height, width))
    z_symbols = np.zeros((coder.net.N, rows, columns), np.int32)
    with torch.inference_mode():
        indexes, _ = coder._prior(z_symbols, "exact")
    channels = np.arange(coder.net.N, dtype=np.int32)[:, None, None]
    z_string = rans.encode(z_symbols, np.broadcast_to(channels, z_symbols.shape), coder.z_tables)
    symbols = np.zeros_like(indexes)
    y_string = rans.encode(symbols, indexes, coder.y_tables)
    crc = int(google_crc32c.value(symbols.tobytes()))
    return Bitstream(
        "msh", "exact", used.quality, used.metric, height, width, y_string, z_string,
        used.weights_id, crc,
    )  # fmt: skip


def large_avif(width: int = 5000, height: int = 4000) -> bytes:
    """An AVIF file of less than a kilobyte that holds a large grey picture."""
    out = io.BytesIO()
    Image.new("RGB", (width, height), (128, 128, 128)).save(out, "AVIF", speed=10)
    return out.getvalue()
