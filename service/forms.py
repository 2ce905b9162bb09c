"""Multipart forms as clients write them: finds the files in a form."""

from collections.abc import AsyncGenerator

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, Headers
from starlette.formparsers import MultiPartException, MultiPartParser

from models.errors import MalformedHeader
from service.negotiate import MAX_ITEMS, MAX_LENGTH

_FILE_TYPES = (b"image/", b"application/octet-stream")
"""Beginnings of the media types of parts that are files even if they have no file name."""


async def parse(content_type: str, data: bytes) -> FormData:
    """Parse a multipart form. Raises `MalformedHeader`."""

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        boundary = _boundary(content_type)
        body = _from_first_boundary(boundary, data)
        return await _Parser(_header(boundary), stream()).parse()
    except (MultiPartException, KeyError, UnicodeError) as e:
        raise MalformedHeader("the multipart form cannot be parsed") from e


class _Parser(MultiPartParser):
    """Starlette's parser, which also takes parts without a `filename` for files.

    Old versions of urllib3 send names that are not ASCII as `filename*` only.
    """

    def on_headers_finished(self) -> None:
        """Give a file that has no name one: Starlette recognises files by it."""
        part = self._current_part
        _, options = parse_options_header(part.content_disposition)
        if b"filename" not in options and _is_file(part.item_headers):
            part.content_disposition = (part.content_disposition or b"") + b'; filename="unnamed"'
        super().on_headers_finished()


def _is_file(headers: list[tuple[bytes, bytes]]) -> bool:
    """True if the headers of a part have `filename*` or the media type of a file."""
    fields = {name: value.strip().lower() for name, value in headers}
    if b"filename*=" in fields.get(b"content-disposition", b"").replace(b" ", b""):
        return True
    return fields.get(b"content-type", b"").startswith(_FILE_TYPES)


def _boundary(content_type: str) -> str:
    """The boundary that the header names. Raises `MalformedHeader`."""
    if len(content_type) > MAX_LENGTH or content_type.count(";") > MAX_ITEMS:
        limits = f"at most {MAX_LENGTH} characters and {MAX_ITEMS} parameters are read"
        raise MalformedHeader(f"Content-Type has {len(content_type)} characters; {limits}")
    _, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"").decode("latin-1")
    if not boundary:
        advice = "do not set Content-Type yourself, so that the HTTP library writes it"
        raise MalformedHeader(f"Content-Type {content_type[:64]!r} names no boundary; {advice}")
    return boundary


def _header(boundary: str) -> Headers:
    """The header that the parser reads: the boundary, without other parameters.

    RFC 7578 defines no charset for forms: it would only concern names of fields, and decoding some
    charsets, such as punycode, takes quadratic time.
    """
    quoted = boundary.replace("\\", "\\\\").replace('"', '\\"')
    return Headers({"Content-Type": f'multipart/form-data; boundary="{quoted}"'})


def _from_first_boundary(boundary: str, data: bytes) -> bytes:
    """The form without its preamble, which readers ignore (RFC 2046, 5.1.1).

    Raises `MalformedHeader` if the form does not contain the boundary, or is cut off.
    """
    delimiter = b"--" + boundary.encode("latin-1")
    start = 0 if data.startswith(delimiter) else data.find(b"\r\n" + delimiter) + 2
    shown = delimiter.decode("latin-1")
    if start == 1:
        message = "is not in the body, though Content-Type names it; send the form's own boundary"
        raise MalformedHeader(f"the boundary {shown!r} {message}")
    if data.find(delimiter + b"--", start) < 0:
        message = f"its last boundary, {shown + '--'!r}, is missing; send it again"
        raise MalformedHeader(f"the multipart form is truncated: {message}")
    return data[start:]
