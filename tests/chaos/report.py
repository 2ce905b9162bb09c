"""What a run under faults reports."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class Report:
    """Lines of the report, and the expectations that failed."""

    lines: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def tell(self, text: str, holds: bool = True) -> None:
        print(("" if holds else "WRONG: ") + text, flush=True)  # noqa: T201
        self.lines.append(f"- {text}" + ("" if holds else " **does not hold**"))
        if not holds:
            self.wrong.append(text)
