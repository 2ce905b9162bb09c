"""What a run tells: `log.jsonl`, TensorBoard scalars, a progress bar."""

import json
import sys
import time
from pathlib import Path
from typing import Any

try:
    from tqdm import tqdm
except ImportError:  # a machine with torch alone
    tqdm = None  # type: ignore[assignment,misc]

_EVERY_S = 30.0
"""Between two plain lines of progress, where `tqdm` is not installed."""


class Report:
    """Writes into `folder`; one that is not `enabled` (another rank's) stays silent."""

    def __init__(self, folder: Path, enabled: bool = True) -> None:
        self.folder, self.enabled = folder, enabled
        self._bar: Any = None
        self._line = Line() if tqdm is None else None
        self._board: Any = None
        if enabled:
            folder.mkdir(parents=True, exist_ok=True)
            self._board = _tensorboard(folder)
            if self._board is None:
                self.row(note="no TensorBoard scalars: the package tensorboard is not installed")

    def row(self, **values: Any) -> None:
        """One line of `log.jsonl`."""
        if self.enabled:
            with (self.folder / "log.jsonl").open("a") as f:
                f.write(json.dumps(values) + "\n")

    def scalars(self, stage: str, values: dict[str, float], step: int) -> None:
        """One point of each curve `stage/name`."""
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{stage}/{name}", value, step)
            self._board.flush()

    def progress(self, stage: str, spent: float, budget: float, figures: dict[str, float]) -> None:
        """Show where the stage is, in seconds."""
        if not self.enabled:
            return
        if self._line is not None:
            self._line.show(stage, spent, budget, figures)
            return
        if self._bar is None:
            self._bar = tqdm(
                total=round(budget), initial=round(spent), desc=f"stage {stage}", unit="s"
            )
        self._bar.n = min(round(spent), round(budget))
        self._bar.set_postfix(figures, refresh=False)
        self._bar.update(0)

    def end_stage(self) -> None:
        """The next progress is another stage's."""
        if self._line is not None:
            self._line = Line()
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        self.end_stage()
        if self._board is not None:
            self._board.close()


class Line:
    """Progress without `tqdm`: a line now and then."""

    def __init__(self) -> None:
        self._shown = -_EVERY_S

    def show(self, stage: str, spent: float, budget: float, figures: dict[str, float]) -> None:
        if time.monotonic() - self._shown >= _EVERY_S:
            self._shown = time.monotonic()
            told = " ".join(f"{k} {v}" for k, v in figures.items())
            sys.stderr.write(f"stage {stage}: {spent:.0f} of {budget:.0f} s {told}\n")
            sys.stderr.flush()


def _tensorboard(folder: Path) -> Any:
    """A writer, or None where the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder / "tensorboard")
