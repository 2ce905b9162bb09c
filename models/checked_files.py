"""Cached files that begin with a digest of their content, so that damaged ones are not used.

The digest does not protect from other users, who could write it too; `models.folders` does.
"""

import hashlib
import logging
from pathlib import Path

from models.files import atomic_write

log = logging.getLogger(__name__)

DIGEST_BYTES = 32


def write(file: Path, content: bytes) -> None:
    """Write `content` and its digest atomically. Raises `OSError`."""
    with atomic_write(file, 0o600) as part:
        part.write_bytes(hashlib.sha256(content).digest() + content)


def read(file: Path) -> bytes | None:
    """Return the content; None if the file is missing, or damaged, which is logged."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    content = data[DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != data[:DIGEST_BYTES]:
        log.warning("%s is damaged: its digest is wrong; it is made again", file)
        return None
    return content
