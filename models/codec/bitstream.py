"""Two container formats, one parsed value.

CompressAI's `codec.py` image files (big-endian): model id u8, (metric << 4 | quality - 1) u8,
height u32, width u32, bit depth u8, z rows u32, z columns u32, string count u32, then length u32
and bytes of the y string and of the z string.

`.msh` (little-endian, 36 bytes over the strings): magic, version u8, profile u8, quality u8, metric
u8, height u32, width u32, weights id 8 bytes, y string length u32, CRC-32C of the symbols of y u32,
CRC-32C of everything else u32, then y string and z string.
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
    """A parsed file. `weights_id` and `symbols_crc` are empty where the format carries none."""

    format: Format
    profile: Profile
    quality: int  # 1 to 8
    metric: Metric
    height: int
    width: int
    y_string: bytes
    z_string: bytes
    weights_id: str = ""  # 16 hex digits
    symbols_crc: int | None = None  # CRC-32C of the symbols of y, int32 little-endian, (M, h, w)


def digest(data: bytes) -> str:
    """SHA-256 of a file's bytes, in hex: its name in every store."""
    return hashlib.sha256(data).hexdigest()


def parse(data: bytes, max_pixels: int = MAX_PIXELS) -> Bitstream:
    """Judge a file by its header, before anything is allocated for its picture.

    Raises `MalformedHeader`, `UnsupportedCodec`, `LengthMismatch`, `ChecksumMismatch` or
    `PictureTooLarge`.
    """
    if not data:
        raise MalformedHeader("the bitstream is empty")
    if data.startswith(MAGIC[: len(data)]):
        return _parse_msh(data, max_pixels)
    return _parse_compressai(data, max_pixels)


def serialize(b: Bitstream) -> bytes:
    """The file of a parsed value; `parse` reverses it. `ValueError` where a field is missing."""
    if b.format == "compressai":
        if b.profile != "float":
            raise ValueError("CompressAI's format knows the float profile only")
        code = METRICS.index(b.metric) << 4 | b.quality - 1
        parts = [_COMPRESSAI.pack(_MBT2018_MEAN, code, b.height, b.width, 8)]
        parts.append(_BODY.pack(*_z_shape(b.height, b.width), 2))
        for string in (b.y_string, b.z_string):
            parts += [_LENGTH.pack(len(string)), string]
        return b"".join(parts)
    if b.symbols_crc is None or len(b.weights_id) != 16:
        raise ValueError("an .msh file needs a weights id and the symbols' checksum")
    head = _MSH.pack(
        MAGIC, VERSION, PROFILES.index(b.profile), b.quality, METRICS.index(b.metric),
        b.height, b.width, bytes.fromhex(b.weights_id), len(b.y_string), b.symbols_crc,
    )  # fmt: skip
    payload = b.y_string + b.z_string
    return head + _CRC.pack(google_crc32c.value(head + payload)) + payload


def _parse_msh(data: bytes, max_pixels: int) -> Bitstream:
    start = _MSH.size + _CRC.size
    if len(data) < start:
        raise MalformedHeader(f"{len(data)} bytes; the header alone is {start}")
    _, version, profile, quality, metric, height, width, weights, y_length, symbols_crc = (
        _MSH.unpack_from(data)
    )
    if version != VERSION:
        raise UnsupportedCodec(f".msh version {version}; version {VERSION} is known")
    if profile >= len(PROFILES) or metric >= len(METRICS) or not 1 <= quality <= 8:
        raise UnsupportedCodec(f"profile {profile}, metric {metric}, quality {quality} of .msh")
    check_size(height, width, max_pixels)
    if y_length > len(data) - start:
        raise LengthMismatch(f"a y string of {y_length} bytes; {len(data) - start} are present")
    (crc,) = _CRC.unpack_from(data, _MSH.size)
    if google_crc32c.value(data[: _MSH.size] + data[start:]) != crc:
        raise ChecksumMismatch("the bitstream's CRC-32C does not hold: its bytes were changed")
    return Bitstream(
        "msh", PROFILES[profile], quality, METRICS[metric], height, width,
        data[start : start + y_length], data[start + y_length :], weights.hex(), symbols_crc,
    )  # fmt: skip


def _parse_compressai(data: bytes, max_pixels: int) -> Bitstream:
    if data[0] != _MBT2018_MEAN:
        if data[0] >= len(_COMPRESSAI_MODELS):
            raise UnsupportedCodec(f"neither .msh nor CompressAI: it begins with {data[:4].hex()}")
        raise UnsupportedCodec(
            f"CompressAI model {_COMPRESSAI_MODELS[data[0]]!r}; only 'mbt2018-mean' is decoded"
        )
    if len(data) < _COMPRESSAI.size + _BODY.size:
        raise MalformedHeader(
            f"{len(data)} bytes; the header alone is {_COMPRESSAI.size + _BODY.size}"
        )
    _, code, height, width, depth = _COMPRESSAI.unpack_from(data)
    metric, quality = code >> 4, (code & 15) + 1
    if metric >= len(METRICS) or quality > 8:
        raise UnsupportedCodec(f"metric {metric}, quality {quality} of mbt2018-mean")
    if depth != 8:
        raise UnsupportedCodec(f"bit depth {depth}; 8 is decoded")
    check_size(height, width, max_pixels)
    rows, columns, count = _BODY.unpack_from(data, _COMPRESSAI.size)
    expected = _z_shape(height, width)
    if (rows, columns) != expected:
        raise LengthMismatch(f"z of {rows}×{columns}; {height}×{width} pixels need {expected}")
    if count != 2:
        raise LengthMismatch(f"{count} strings; mbt2018-mean has 2")
    strings, at = [], _COMPRESSAI.size + _BODY.size
    for name in ("y", "z"):
        if len(data) < at + _LENGTH.size:
            raise LengthMismatch(f"the file ends before the length of its {name} string")
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if length > len(data) - at:
            raise LengthMismatch(f"a {name} string of {length} bytes; {len(data) - at} are present")
        strings.append(data[at : at + length])
        at += length
    if at != len(data):
        raise LengthMismatch(f"{len(data) - at} bytes follow the last string")
    y_string, z_string = strings
    return Bitstream(
        "compressai", "float", quality, METRICS[metric], height, width, y_string, z_string
    )


def _z_shape(height: int, width: int) -> tuple[int, int]:
    rows, columns = padded(height, width)
    return rows // STRIDE_Z, columns // STRIDE_Z
