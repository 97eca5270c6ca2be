"""A row of the result: what was measured, for whom, against which target. Printing and nothing else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

BASELINES = ("mitmdump", "mitmdump -q", "streams", "direct")
"""The columns that are not ours, in the order of the table."""

OURS = ("auto", "host")
"""Ours: inside the strongest rung that `auto` found, and `--network-mode host` with the proxy on 127.0.0.1."""


@dataclass(frozen=True, slots=True)
class Target:
    """A bound from the issue: `value <= bound` or `value >= bound`; `value` is the row's `judged`."""

    text: str
    bound: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        """Whether the measured value keeps the bound."""
        return value >= self.bound if self.at_least else value <= self.bound


@dataclass(frozen=True, slots=True)
class Row:
    """One line. `values` maps a contender to its median in `unit`; `judged` is what the target is held against."""

    metric: str
    unit: str
    values: dict[str, float]
    judged: float | None = None
    target: Target | None = None
    note: str = ""
    failure: str = ""
    """What could not be measured, and why."""
    spread: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Per contender the lowest and the highest sample, for the JSON."""

    @property
    def met(self) -> bool | None:
        """True or False against the target; None where there is none or nothing was measured."""
        if self.target is None or self.judged is None:
            return None
        return self.target.met(self.judged)

    def as_json(self) -> dict[str, object]:
        """Plain JSON types."""
        return {
            "metric": self.metric,
            "unit": self.unit,
            "values": self.values,
            "spread": {name: list(bounds) for name, bounds in self.spread.items()},
            "judged": self.judged,
            "target": self.target.text if self.target else None,
            "met": self.met,
            "note": self.note,
            "failure": self.failure,
        }


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def _verdict(row: Row) -> str:
    if row.target is None:
        return ""
    if row.judged is None:
        return "not measured"
    return "met" if row.met else "MISSED"


def table(rows: Iterable[Row]) -> str:
    """All rows as one aligned text table; the column `judged` is the ratio or the value the target speaks of."""
    columns = (*OURS, *BASELINES)
    lines: list[tuple[str, ...]] = [("metric", "unit", *columns, "judged", "target", "", "note")]
    for row in rows:
        cells = (_number(row.values.get(name)) for name in columns)
        judged = _number(row.judged) if row.target else ""
        target = row.target.text if row.target else ""
        lines.append((row.metric, row.unit, *cells, judged, target, _verdict(row), row.note or row.failure[:60]))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    numeric = range(2, 3 + len(columns))
    return "\n".join(
        "  ".join(
            f"{cell:>{width}}" if column in numeric else f"{cell:<{width}}"
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
