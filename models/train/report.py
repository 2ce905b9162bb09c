"""Output of a run: `log.jsonl`, TensorBoard scalars and a progress bar."""

import json
import sys
import time
from pathlib import Path
from typing import Any

try:
    from tqdm import tqdm
except ImportError:  # tqdm is optional
    tqdm = None  # type: ignore[assignment,misc]

_LINE_EVERY_S = 30.0
"""Seconds between two lines of progress if `tqdm` is not installed."""


class Report:
    """Writes log and curves into `folder` if `enabled`, which is so on the first rank only."""

    def __init__(self, folder: Path, enabled: bool = True) -> None:
        self.folder, self.enabled = folder, enabled
        self._bar: Any = None
        self._lines = ProgressLines() if tqdm is None else None
        self._tensorboard: Any = None
        if enabled:
            folder.mkdir(parents=True, exist_ok=True)
            self._tensorboard = _tensorboard_writer(folder)
            if self._tensorboard is None:
                self.row(note="no TensorBoard scalars: the package tensorboard is not installed")

    def row(self, **values: Any) -> None:
        """Append a row to `log.jsonl`."""
        if self.enabled:
            with (self.folder / "log.jsonl").open("a") as f:
                f.write(json.dumps(values) + "\n")

    def scalars(self, prefix: str, values: dict[str, float], step: int) -> None:
        """Add one point to each TensorBoard curve `prefix/name`."""
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(f"{prefix}/{name}", value, step)
            self._tensorboard.flush()

    def progress(
        self, stage: str, done: float, total: float, unit: str, metrics: dict[str, float]
    ) -> None:
        """Show that `done` of `total` seconds or steps of a stage are complete."""
        if not self.enabled:
            return
        if self._lines is not None:
            self._lines.show(stage, done, total, unit, metrics)
            return
        if self._bar is None:
            self._bar = tqdm(
                total=round(total), initial=round(done), desc=f"stage {stage}", unit=unit
            )
        self._bar.n = min(round(done), round(total))
        self._bar.set_postfix(metrics, refresh=False)
        self._bar.update(0)

    def end_stage(self) -> None:
        """Close the progress bar; the next call of `progress` opens a new one."""
        if self._lines is not None:
            self._lines = ProgressLines()
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        self.end_stage()
        if self._tensorboard is not None:
            self._tensorboard.close()


class ProgressLines:
    """Progress as plain lines on stderr, for installations without `tqdm`."""

    def __init__(self) -> None:
        self._last = -_LINE_EVERY_S

    def show(
        self, stage: str, done: float, total: float, unit: str, metrics: dict[str, float]
    ) -> None:
        """Write a line unless the last one is less than `_LINE_EVERY_S` seconds old."""
        if time.monotonic() - self._last >= _LINE_EVERY_S:
            self._last = time.monotonic()
            values = " ".join(f"{k} {v}" for k, v in metrics.items())
            sys.stderr.write(f"stage {stage}: {done:.0f} of {total:.0f} {unit} {values}\n")
            sys.stderr.flush()


def _tensorboard_writer(folder: Path) -> Any:
    """Return a `SummaryWriter`, or None if tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder / "tensorboard")
