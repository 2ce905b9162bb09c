"""List, install and remove weights: the shipped ones, and those in the user's weights folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from models import checkpoint, files, folders
from models.checkpoint import Entry
from models.codec.architectures import DEFAULT
from models.codec.bitstream import Metric
from models.errors import WrongWeights

if TYPE_CHECKING:  # torch takes seconds to load, and weights are listed without it
    from torch import Tensor

MANIFEST = "manifest.toml"


@dataclass(frozen=True, slots=True)
class Installed:
    """An entry of a manifest, and the manifest's folder."""

    entry: Entry
    folder: Path


def imported(folder: Path | None) -> list[Installed]:
    """List the weights in the user's folder, latest import first; empty without a folder.

    Raises `WeightsError` if the manifest cannot be read, `UntrustedFolder` if another user could
    change the weights.
    """
    if folder is None or not (folder / MANIFEST).exists():
        return []
    folders.check(folder, recursive=False)
    return [Installed(e, folder) for e in reversed(checkpoint.manifest(folder))]


def shipped() -> list[Installed]:
    """List the shipped weights, in `models/weights/`."""
    return [Installed(e, checkpoint.WEIGHTS) for e in checkpoint.manifest()]


def model_of(entry: Entry) -> str:
    """Return the architecture of an entry; empty for a diffusion decoder."""
    return (entry.model or DEFAULT) if entry.kind == "codec" else ""


def find(
    rows: Sequence[Installed],
    quality: int,
    metric: Metric,
    weights_id: str = "",
    model: str = DEFAULT,
) -> Installed | None:
    """Return the first codec in `rows` of this model, quality, metric and, if given, weights id."""
    for row in rows:
        e = row.entry
        if (e.kind, model_of(e), e.quality, e.metric) == ("codec", model, quality, metric):
            if weights_id in {"", e.weights_id}:
                return row
    return None


def wrong_weights(
    quality: int, metric: Metric, weights_id: str = "", models: Sequence[str] = (DEFAULT,)
) -> WrongWeights:
    """Return the error to raise if `find` finds no codec of any of the `models`."""
    if weights_id:
        return WrongWeights(
            f"the bitstream was encoded with weights {weights_id}, which are not installed for "
            f"quality {quality}, metric {metric}; import them with `afterimage weights import`"
        )
    of = "" if tuple(models) == (DEFAULT,) else f"of {' or '.join(models)} "
    return WrongWeights(
        f"no weights {of}for quality {quality}, metric {metric} are installed; "
        "import some with `afterimage weights import`"
    )


def install(
    tensors: "dict[str, Tensor]",
    name: str,
    folder: Path,
    row: Mapping[str, str | int],
    metadata: dict[str, str] | None = None,
    replaces: Sequence[str] = ("kind", "quality", "metric", "steps"),
) -> Entry:
    """Write `name`.safetensors and append it to the folder's manifest, each atomically.

    `row` holds `kind` and further fields of the `Entry`. `replaces` names fields: older entries
    that agree with the new one in all of them are removed from the manifest. Raises
    `UntrustedFolder`.
    """
    from safetensors.torch import save

    data = save(tensors, metadata)
    fields: dict[str, str | int] = {
        "name": name,
        "file": f"{name}.safetensors",
        "sha256": sha256(data).hexdigest(),
        "weights_id": checkpoint.weights_id(tensors),
    }
    entry = Entry(**(fields | dict(row)))  # type: ignore[arg-type]
    folders.private(folder, 0o755)
    with files.locked(folder):
        with files.atomic_write(folder / entry.file) as part:
            part.write_bytes(data)
        others = [e for e in _entries(folder) if not _same(e, entry, replaces)]
        _write(folder, [*others, entry])
    return entry


def remove(row: Installed) -> None:
    """Remove an entry from its manifest, and delete its file."""
    with files.locked(row.folder):
        _write(row.folder, [e for e in _entries(row.folder) if e != row.entry])
        (row.folder / row.entry.file).unlink(missing_ok=True)


def _entries(folder: Path) -> list[Entry]:
    return checkpoint.manifest(folder) if (folder / MANIFEST).exists() else []


def _same(a: Entry, b: Entry, names: Sequence[str]) -> bool:
    return all(getattr(a, name) == getattr(b, name) for name in names)


def _write(folder: Path, entries: Sequence[Entry]) -> None:
    rows = ({k: v for k, v in asdict(e).items() if v} for e in entries)
    texts = ("\n".join(f"{k} = {_toml(v)}" for k, v in row.items()) for row in rows)
    blocks = [f"[[weights]]\n{text}\n" for text in texts] or ["weights = []\n"]
    with files.atomic_write(folder / MANIFEST) as part:
        part.write_text("\n".join(blocks), "utf-8")


def _toml(value: str | int) -> str:
    if isinstance(value, int):
        return str(value)
    # a JSON string is a valid TOML string if all its characters are printable
    return json.dumps("".join(c if c.isprintable() else "?" for c in value), ensure_ascii=False)
