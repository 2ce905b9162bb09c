"""The tables that `afterimage queue` prints."""

from collections.abc import Sequence
from typing import Any


def lines(view: dict[str, Any]) -> list[str]:
    """The lines that show a queue, the JSON of `/v1/queue`."""
    waiting = [
        (w["priority"], w["caller"] or "-", w["jobs"], _duration(w["unserved_s"]))
        for w in view["waiting"]
    ]
    running = [
        (r["id"], r["caller"] or "-", r["priority"], r["tier"], r["worker"] or "-",
         f"{r['step']}/{r['total']}", _duration(r["eta_s"]))
        for r in view["running"]
    ]  # fmt: skip
    workers = [
        (w["name"], w["device"] or "-", _rate(w["megapixel_steps_per_s"]), _duration(w["age_s"]),
         "drained" if w["drained"] else "")
        for w in view["workers"]
    ]  # fmt: skip
    quarantined = [(q["digest"], q["until"]) for q in view["quarantined"]]
    tables = (
        (("PRIORITY", "CALLER", "JOBS", "UNSERVED"), waiting),
        (("RUNNING", "CALLER", "PRIORITY", "TIER", "WORKER", "STEP", "ETA"), running),
        (("WORKER", "DEVICE", "MP-STEPS/S", "AGE", ""), workers),
        (("QUARANTINED", "UNTIL"), quarantined),
    )
    text = [f"{view['interactive']} interactive and {view['batch']} batch jobs wait"]
    for heading, rows in tables:
        if rows:
            text += ["", *_table([heading, *rows])]
    return text


def _table(rows: Sequence[Sequence[object]]) -> list[str]:
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in texts
    ]


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _rate(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.1f}"
