"""Parse and serialise bitstreams in two container formats.

CompressAI's image files, as its `examples/codec.py` writes them (big-endian): model id u8,
(metric << 4 | quality - 1) u8, height u32, width u32, bit depth u8, z rows u32, z columns u32,
number of strings u32; then the y string and the z string, each after its length u32. A model
without hyperprior has rows and columns of y there, and only the y string. Older versions gave the
models other ids, and the oldest wrote no bit depth: see `_LAYOUTS`.

`.msh` (little-endian, a header of 36 bytes): magic, version u8, profile u8, quality u8, metric u8,
height u32, width u32, weights id 8 bytes, y string length u32, CRC-32C of y's symbols u32, CRC-32C
of all other bytes of the file u32; then the y string and the z string.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import google_crc32c

from models import text_bodies
from models.codec import architectures
from models.codec.architectures import ARCHITECTURES
from models.errors import (
    ChecksumMismatch,
    LengthMismatch,
    MalformedHeader,
    UnsupportedCodec,
)
from models.geometry import MAX_PIXELS, STRIDE_Y, STRIDE_Z, check_size, padded
from models.pictures import signatures

Format = Literal["msh", "compressai"]
Profile = Literal["float", "exact"]
Metric = Literal["mse", "ms-ssim"]

MAGIC = b"\x8dMSH"
VERSION = 1
PROFILES: tuple[Profile, ...] = ("float", "exact")
METRICS: tuple[Metric, ...] = ("mse", "ms-ssim")

_MSH = struct.Struct("<4sBBBBII8sII")
_CRC = struct.Struct("<I")
_COMPRESSAI = struct.Struct(">BBII")
_DEPTH = struct.Struct(">B")
_BODY = struct.Struct(">III")
_LENGTH = struct.Struct(">I")
OLD_MODELS = (
    "bmshj2018-factorized", "bmshj2018-hyperprior", "mbt2018-mean", "mbt2018",
    "cheng2020-anchor", "cheng2020-attn", "ssf2020",
)  # fmt: skip
_MODELS = (
    "bmshj2018-factorized", "bmshj2018-factorized-relu", "bmshj2018-hyperprior",
    "mbt2018-mean", "mbt2018", "cheng2020-anchor", "cheng2020-attn", "bmshj2018-hyperprior-vbr",
    "mbt2018-mean-vbr", "mbt2018-vbr", "hrtzxf2022-pcc-rec", "sfu2023-pcc-rec-pointnet",
    "sfu2024-pcc-rec-pointnet2-ssg", "ssf2020",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Layout:
    """How some versions of CompressAI write a file: their models by id, and if there is a depth."""

    versions: str
    models: tuple[str, ...]
    has_depth: bool = True


_LAYOUTS: tuple[_Layout, ...] = (
    _Layout("1.2.2 and later", _MODELS),
    _Layout("1.2.0 to 1.2.1", OLD_MODELS),
    _Layout("1.0.3 to 1.1.9", OLD_MODELS, has_depth=False),
)
"""The newest first. In which a model id has another meaning, it is another reading of the file."""
_DEPTH_AT = _COMPRESSAI.size
"""Position of the bit depth. In files without one it holds 0: the first byte of z's rows, u32."""


class Reading(NamedTuple):
    """A model that a file can be of, and the versions of CompressAI in which its id means that."""

    model: str
    versions: str

    def __str__(self) -> str:
        return f"{self.model!r} (CompressAI {self.versions})"


@dataclass(frozen=True, slots=True)
class Bitstream:
    """A parsed file. In CompressAI's format `weights_id` is empty and `symbols_crc` None.

    `others` are further models that the same bytes can be of: see `readings`.
    """

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
    versions: str = _LAYOUTS[0].versions  # versions of CompressAI that write this layout
    model: str = architectures.DEFAULT
    others: tuple[Reading, ...] = field(default=(), compare=False)

    @property
    def layout(self) -> str:
        """The layout of the file, as people call it."""
        if self.format == "msh":
            return f".msh version {VERSION}"
        return f"image file of CompressAI {self.versions}"

    @property
    def readings(self) -> tuple["Bitstream", ...]:
        """This reading and the others; the first is the likeliest."""
        return (self, *(replace(self, model=r.model, versions=r.versions) for r in self.others))


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
    if picture := picture_format(data):
        raise UnsupportedCodec(
            f"this is a {picture} picture, not a bitstream; encode it with "
            "`afterimage encode` or POST /v1/encodes"
        )
    return _parse_compressai(data, _readings(data), max_pixels)


def picture_format(data: bytes) -> str | None:
    """Return the format of a picture file that may be encoded; None for other files."""
    name = signatures.name_of(data)
    readable = name in signatures.FORMATS or name in signatures.OPTIONAL
    return signatures.usual_name(name) if name and readable else None


def serialize(b: Bitstream) -> bytes:
    """Return the file's bytes; the inverse of `parse`.

    Raises `ValueError` if the format cannot hold the profile or needs a field that is missing.
    """
    if b.format == "compressai":
        return _serialize_compressai(b)
    if b.symbols_crc is None or len(b.weights_id) != 16:
        raise ValueError("an .msh file needs a weights id of 16 hex digits and symbols_crc")
    head = _MSH.pack(
        MAGIC, VERSION, PROFILES.index(b.profile), b.quality, METRICS.index(b.metric),
        b.height, b.width, bytes.fromhex(b.weights_id), len(b.y_string), b.symbols_crc,
    )  # fmt: skip
    payload = b.y_string + b.z_string
    return head + _CRC.pack(google_crc32c.value(head + payload)) + payload


def other_meanings(b: Bitstream) -> str:
    """Return a sentence about the other models that `b` could be of, to end an error's text.

    In CompressAI's format the same model id means different models in different versions. Empty if
    there is no other.
    """
    return _other_meanings([Reading(b.model, b.versions), *b.others])


def _serialize_compressai(b: Bitstream) -> bytes:
    if b.profile != "float":
        raise ValueError(f"CompressAI's format has no profile {b.profile!r}; use 'float'")
    layout = _layout_of(b.versions)
    code = METRICS.index(b.metric) << 4 | b.quality - 1
    parts = [_COMPRESSAI.pack(layout.models.index(b.model), code, b.height, b.width)]
    if layout.has_depth:
        parts.append(_DEPTH.pack(8))
    strings = _strings_of(b.model)
    parts.append(_BODY.pack(*_shape(b.model, b.height, b.width), len(strings)))
    for name in strings:
        string = b.y_string if name == "y" else b.z_string
        parts += [_LENGTH.pack(len(string)), string]
    return b"".join(parts)


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
        raise ChecksumMismatch(
            "the bitstream's CRC-32C does not match: it was cut off, damaged or changed"
        )
    return Bitstream(
        "msh", PROFILES[profile], quality, METRICS[metric], height, width,
        data[start : start + y_length], data[start + y_length :], weights.hex(), symbols_crc,
    )  # fmt: skip


def _readings(data: bytes) -> list[Reading]:
    """Return the supported models that `data` can be of by its first bytes, the default one first.

    Raises `UnsupportedCodec`, which names the model in each layout, if there is none.
    """
    layouts = _LAYOUTS
    if len(data) > _DEPTH_AT:
        has_depth = data[_DEPTH_AT] != 0
        layouts = tuple(w for w in _LAYOUTS if w.has_depth == has_depth)
    meanings = [Reading(w.models[data[0]], w.versions) for w in layouts if data[0] < len(w.models)]
    if not meanings:
        name = signatures.name_of(data)
        known = f"its format is {signatures.usual_name(name)}" if name else ""
        reason = text_bodies.advice(data) or known or f"it begins with {data[:4].hex()}"
        raise UnsupportedCodec(f"neither an .msh file nor one of CompressAI: {reason}")
    supported = [r for r in meanings if r.model in ARCHITECTURES]
    if not supported:
        models = " or ".join(f"{r.model!r} ({r.versions})" for r in meanings)
        raise UnsupportedCodec(
            f"the file was made with CompressAI's model {models}; "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    # CompressAI's own program uses other weights under some names
    supported += [
        Reading(published, r.versions)
        for r in supported
        if (published := ARCHITECTURES[r.model].published)
    ]
    newest = {r.model: r for r in reversed(supported)}.values()
    return sorted(reversed(newest), key=lambda r: r.model != architectures.DEFAULT)


def _layout_of(versions: str) -> _Layout:
    for layout in _LAYOUTS:
        if layout.versions == versions:
            return layout
    raise ValueError(
        f"unknown versions of CompressAI {versions!r}; "
        f"choose one of {', '.join(w.versions for w in _LAYOUTS)}"
    )


def _other_meanings(readings: Sequence[Reading]) -> str:
    first, *others = readings
    if not others:
        return ""
    return f". The file was read as {first}; it may be of {' or '.join(map(str, others))}"


def _parse_compressai(data: bytes, readings: Sequence[Reading], max_pixels: int) -> Bitstream:
    has_depth = _layout_of(readings[0].versions).has_depth
    body = _COMPRESSAI.size + (_DEPTH.size if has_depth else 0)
    if len(data) < body + _BODY.size:
        raise MalformedHeader(_too_short(data, body + _BODY.size))
    _, code, height, width = _COMPRESSAI.unpack_from(data)
    metric, quality = code >> 4, (code & 15) + 1
    if metric >= len(METRICS) or quality > 8:
        raise UnsupportedCodec(
            f"the CompressAI header has metric {metric}, quality {quality}; "
            "supported are metrics 0 and 1, qualities 1 to 8"
        )
    if has_depth and data[_DEPTH_AT] != 8:
        raise UnsupportedCodec(f"bit depth {data[_DEPTH_AT]} is not supported; only 8 is")
    check_size(height, width, max_pixels)
    wrong = [_contradiction(r.model, quality, height, width, data, body) for r in readings]
    possible = [r for r, why in zip(readings, wrong, strict=True) if not why]
    if not possible:
        raise LengthMismatch(wrong[0] + _other_meanings(readings))
    (model, versions), *others = possible
    y_string, z_string = _strings(data, body + _BODY.size, _strings_of(model))
    return Bitstream(
        "compressai", "float", quality, METRICS[metric], height, width, y_string, z_string,
        versions=versions, model=model, others=tuple(others),
    )  # fmt: skip


def _contradiction(
    model: str, quality: int, height: int, width: int, data: bytes, body: int
) -> str:
    """Tell why a file is not of this model: its quality, shape or number of strings; empty if not.

    `body` is the position of the shape.
    """
    rows, columns, count = _BODY.unpack_from(data, body)
    expected, strings = _shape(model, height, width), _strings_of(model)
    if quality > (most := ARCHITECTURES[model].qualities):
        return f"the header declares quality {quality}; {model} has 1 to {most}"
    if (rows, columns) != expected:
        return (
            f"the header declares {strings[-1]} as {rows}×{columns} (rows × columns); a picture of "
            f"{width}×{height} pixels needs {expected[0]}×{expected[1]}"
        )
    if count != len(strings):
        return f"the header declares {count} strings; {model} has {len(strings)}"
    return ""


def _strings(data: bytes, at: int, names: Sequence[str]) -> tuple[bytes, bytes]:
    """Return the y string and the z string, each after its length, with which the file ends.

    The z string is empty if `names` has none.
    """
    strings = {"z": b""}
    for name in names:
        if len(data) < at + _LENGTH.size:
            raise LengthMismatch(f"truncated: the file ends before the length of its {name} string")
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        if length > len(data) - at:
            raise LengthMismatch(_string_cut(name, length, len(data) - at))
        strings[name] = data[at : at + length]
        at += length
    if at != len(data):
        raise LengthMismatch(f"{len(data) - at} bytes too many after the {names[-1]} string")
    return strings["y"], strings["z"]


def _too_short(data: bytes, header: int) -> str:
    return f"truncated: the file has {len(data)} bytes; the header alone has {header}"


def _string_cut(name: str, length: int, present: int) -> str:
    return (
        f"truncated or damaged: the file declares a {name} string of {length} bytes; "
        f"only {present} are left"
    )


def _strings_of(model: str) -> tuple[str, ...]:
    return ARCHITECTURES[model].strings


def _shape(model: str, height: int, width: int) -> tuple[int, int]:
    """Return rows and columns of the last string's latents."""
    rows, columns = padded(height, width)
    stride = STRIDE_Z if "z" in _strings_of(model) else STRIDE_Y
    return rows // stride, columns // stride
