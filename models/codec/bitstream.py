"""Parse and serialise bitstreams in two container formats.

CompressAI's image files, as its `examples/codec.py` writes them (big-endian): model id u8,
(metric << 4 | quality - 1) u8, height u32, width u32, bit depth u8, z rows u32, z columns u32,
number of strings u32; then the y string and the z string, each after its length u32.

`.msh` (little-endian, a header of 36 bytes): magic, version u8, profile u8, quality u8, metric u8,
height u32, width u32, weights id 8 bytes, y string length u32, CRC-32C of y's symbols u32, CRC-32C
of all other bytes of the file u32; then the y string and the z string.
"""

import hashlib
import struct
from dataclasses import dataclass
from typing import Literal

import google_crc32c

from models.errors import (
    ChecksumMismatch,
    LengthMismatch,
    MalformedHeader,
    UnsupportedCodec,
)
from models.geometry import MAX_PIXELS, STRIDE_Z, check_size, padded

Format = Literal["msh", "compressai"]
Profile = Literal["float", "exact"]
Metric = Literal["mse", "ms-ssim"]

MAGIC = b"\x8dMSH"
VERSION = 1
PROFILES: tuple[Profile, ...] = ("float", "exact")
METRICS: tuple[Metric, ...] = ("mse", "ms-ssim")

_MSH = struct.Struct("<4sBBBBII8sII")
_CRC = struct.Struct("<I")
_COMPRESSAI = struct.Struct(">BBIIB")
_BODY = struct.Struct(">III")
_LENGTH = struct.Struct(">I")
_COMPRESSAI_MODELS = (
    "bmshj2018-factorized", "bmshj2018-factorized-relu", "bmshj2018-hyperprior", "mbt2018-mean",
    "mbt2018", "cheng2020-anchor", "cheng2020-attn", "bmshj2018-hyperprior-vbr",
    "mbt2018-mean-vbr", "mbt2018-vbr", "hrtzxf2022-pcc-rec", "sfu2023-pcc-rec-pointnet",
    "sfu2024-pcc-rec-pointnet2-ssg", "ssf2020",
)  # fmt: skip
_MBT2018_MEAN = _COMPRESSAI_MODELS.index("mbt2018-mean")


@dataclass(frozen=True, slots=True)
class Bitstream:
    """A parsed file. In CompressAI's format `weights_id` is empty and `symbols_crc` None."""

    format: Format
    profile: Profile
    quality: int  # 1 to 8
    metric: Metric
    height: int
    width: int
    y_string: bytes
    z_string: bytes
    weights_id: str = ""  # 16 hex digits
    symbols_crc: int | None = None  # CRC-32C of y's symbols (M, h, w) as little-endian int32


def digest(data: bytes) -> str:
    """Return the SHA-256 of a file's bytes in hex, which is its key in all stores."""
    return hashlib.sha256(data).hexdigest()


def parse(data: bytes, max_pixels: int = MAX_PIXELS) -> Bitstream:
    """Parse a file in either format, without decoding the picture or allocating memory for it.

    Raises `MalformedHeader`, `UnsupportedCodec`, `LengthMismatch`, `ChecksumMismatch`, or
    `PictureTooLarge` for more than `max_pixels`.
    """
    if not data:
        raise MalformedHeader("the bitstream is empty")
    if data.startswith(MAGIC[: len(data)]):
        return _parse_msh(data, max_pixels)
    return _parse_compressai(data, max_pixels)


def serialize(b: Bitstream) -> bytes:
    """Return the file's bytes; the inverse of `parse`.

    Raises `ValueError` if the format cannot hold the profile or needs a field that is missing.
    """
    if b.format == "compressai":
        if b.profile != "float":
            raise ValueError(f"CompressAI's format has no profile {b.profile!r}; use 'float'")
        code = METRICS.index(b.metric) << 4 | b.quality - 1
        parts = [_COMPRESSAI.pack(_MBT2018_MEAN, code, b.height, b.width, 8)]
        parts.append(_BODY.pack(*_z_shape(b.height, b.width), 2))
        for string in (b.y_string, b.z_string):
            parts += [_LENGTH.pack(len(string)), string]
        return b"".join(parts)
    if b.symbols_crc is None or len(b.weights_id) != 16:
        raise ValueError("an .msh file needs a weights id of 16 hex digits and symbols_crc")
    head = _MSH.pack(
        MAGIC, VERSION, PROFILES.index(b.profile), b.quality, METRICS.index(b.metric),
        b.height, b.width, bytes.fromhex(b.weights_id), len(b.y_string), b.symbols_crc,
    )  # fmt: skip
    payload = b.y_string + b.z_string
    return head + _CRC.pack(google_crc32c.value(head + payload)) + payload


def _parse_msh(data: bytes, max_pixels: int) -> Bitstream:
    start = _MSH.size + _CRC.size
    if len(data) < start:
        raise MalformedHeader(_too_short(data, start))
    _, version, profile, quality, metric, height, width, weights, y_length, symbols_crc = (
        _MSH.unpack_from(data)
    )
    if version != VERSION:
        raise UnsupportedCodec(f".msh version {version} is not supported; only {VERSION} is")
    if profile >= len(PROFILES) or metric >= len(METRICS) or not 1 <= quality <= 8:
        raise UnsupportedCodec(
            f"the .msh header has profile {profile}, metric {metric}, quality {quality}; "
            "supported are profiles 0 and 1, metrics 0 and 1, qualities 1 to 8"
        )
    check_size(height, width, max_pixels)
    if y_length > len(data) - start:
        raise LengthMismatch(_string_cut("y", y_length, len(data) - start))
    (crc,) = _CRC.unpack_from(data, _MSH.size)
    if google_crc32c.value(data[: _MSH.size] + data[start:]) != crc:
        raise ChecksumMismatch("the bitstream's CRC-32C does not match: it was damaged or changed")
    return Bitstream(
        "msh", PROFILES[profile], quality, METRICS[metric], height, width,
        data[start : start + y_length], data[start + y_length :], weights.hex(), symbols_crc,
    )  # fmt: skip


def _parse_compressai(data: bytes, max_pixels: int) -> Bitstream:
    if data[0] != _MBT2018_MEAN:
        raise UnsupportedCodec(_other_model(data))
    if len(data) < _COMPRESSAI.size + _BODY.size:
        raise MalformedHeader(_too_short(data, _COMPRESSAI.size + _BODY.size))
    _, code, height, width, depth = _COMPRESSAI.unpack_from(data)
    metric, quality = code >> 4, (code & 15) + 1
    if metric >= len(METRICS) or quality > 8:
        raise UnsupportedCodec(
            f"the CompressAI header has metric {metric}, quality {quality}; "
            "supported are metrics 0 and 1, qualities 1 to 8"
        )
    if depth != 8:
        raise UnsupportedCodec(f"bit depth {depth} is not supported; only 8 is")
    check_size(height, width, max_pixels)
    rows, columns, count = _BODY.unpack_from(data, _COMPRESSAI.size)
    expected = _z_shape(height, width)
    if (rows, columns) != expected:
        raise LengthMismatch(
            f"the header declares z as {rows}×{columns} (rows × columns); a picture of "
            f"{width}×{height} pixels needs {expected[0]}×{expected[1]}"
        )
    if count != 2:
        raise LengthMismatch(f"the header declares {count} strings; mbt2018-mean has 2")
    strings, at = [], _COMPRESSAI.size + _BODY.size
    for name in ("y", "z"):
        if len(data) < at + _LENGTH.size:
            raise LengthMismatch(f"the file ends before the length of its {name} string")
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if length > len(data) - at:
            raise LengthMismatch(_string_cut(name, length, len(data) - at))
        strings.append(data[at : at + length])
        at += length
    if at != len(data):
        raise LengthMismatch(f"the file has {len(data) - at} bytes too many after the z string")
    y_string, z_string = strings
    return Bitstream(
        "compressai", "float", quality, METRICS[metric], height, width, y_string, z_string
    )


def _too_short(data: bytes, header: int) -> str:
    return f"the file has {len(data)} bytes, fewer than its header of {header}: it is cut off"


def _string_cut(name: str, length: int, present: int) -> str:
    return (
        f"the file declares a {name} string of {length} bytes, but only {present} bytes follow. "
        "The file is cut off or damaged"
    )


def _other_model(data: bytes) -> str:
    """The error text for a file that begins with neither format's magic or model id."""
    if data[0] >= len(_COMPRESSAI_MODELS):
        return f"not an .msh file or an image file of CompressAI: it begins with {data[:4].hex()}"
    text = (
        f"the file was made with CompressAI's model {_COMPRESSAI_MODELS[data[0]]!r}. "
        "Only 'mbt2018-mean' is supported"
    )
    if data[0] == _MBT2018_MEAN - 1:
        text += ". CompressAI before 1.2.2 wrote this id for 'mbt2018-mean'; encode it again"
    return text


def _z_shape(height: int, width: int) -> tuple[int, int]:
    rows, columns = padded(height, width)
    return rows // STRIDE_Z, columns // STRIDE_Z
