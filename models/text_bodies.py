"""Recognises text that clients send instead of a binary file."""

import re

_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{16,}={0,2}")


def advice(data: bytes) -> str | None:
    """Return, for text sent instead of a file, what it is and what to send; None for other data."""
    start = data[:256].lstrip(b"\xef\xbb\xbf \t\r\n")
    if start[:5].lower() == b"data:":
        return "it is a data URL; send the decoded bytes of the file"
    if start[:2] == b"--" and b"content-disposition:" in data[:1024].lower():
        return "it is a form; send the Content-Type of the form, or the bytes of the file alone"
    if start[:1] in {b"{", b"["}:
        return "it is JSON; send the bytes of the file as the body, or in a form"
    if _BASE64.fullmatch(start.replace(b"\r\n", b"").replace(b"\n", b"")):
        return "it is base64 text; send the decoded bytes of the file"
    return None
