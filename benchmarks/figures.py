"""What a benchmark measures, as values: percentiles, the table that people read, the lines that programs read."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

SIGNIFICANT = 4


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """`baseline` is what it is held against in the same run (None: nothing comparable), `ratio` value ÷ baseline."""

    name: str
    value: float
    unit: str
    baseline: float | None
    ratio: float | None
    n: int
    meaning: str

    def row(self) -> tuple[str, ...]:
        baseline = "" if self.baseline is None else f"{self.baseline:g}"
        ratio = "" if self.ratio is None else f"{self.ratio:g}"
        return (self.name, f"{self.value:g}", self.unit, baseline, ratio, str(self.n), self.meaning)


def figure(name: str, value: float, unit: str, *, n: int, meaning: str, baseline: float | None = None) -> Figure:
    return Figure(
        name=name,
        value=_rounded(value),
        unit=unit,
        baseline=None if baseline is None else _rounded(baseline),
        ratio=_rounded(value / baseline) if baseline else None,
        n=n,
        meaning=meaning,
    )


def percentile(samples: Sequence[float], percent: float) -> float:
    """Nearest rank: with 30 samples the 99th is the worst one."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def table(figures: Sequence[Figure]) -> str:
    rows = [("FIGURE", "VALUE", "UNIT", "BASELINE", "RATIO", "N", "WHAT"), *(figure.row() for figure in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def json_line(figure: Figure) -> str:
    known = msgspec.to_builtins(figure)
    del known["meaning"]
    return msgspec.json.encode(known).decode()


def _rounded(value: float) -> float:
    return float(f"{value:.{SIGNIFICANT}g}")
