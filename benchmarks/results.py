"""Figures with their targets: how one is judged, printed and written into docs/benchmarks.md."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil
from rich.console import Console
from rich.table import Table

BEGIN: Final = "<!-- figures: written by `python -m benchmarks --write` -->"
END: Final = "<!-- end of figures -->"
FAUST: Final = "no-op Faust agent, async for, uvloop"
BARE: Final = "bare aiokafka consumer"


@dataclass(slots=True)
class Figure:
    """One measured value. ``at_least`` and ``at_most`` are targets; a figure without one is printed only."""

    name: str
    value: float
    unit: str
    at_least: float | None = None
    at_most: float | None = None
    note: str = ""
    is_event_rate: bool = False
    """Whether the baselines of the same run are a fair measure for it: it is in events per second."""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def target(self) -> str:
        """Return the target as text, "" without one."""
        if self.at_least is not None:
            return f"≥ {shown(self.at_least)} {self.unit}"
        return "" if self.at_most is None else f"≤ {shown(self.at_most)} {self.unit}"

    @property
    def verdict(self) -> str:
        """Return "met", "missed", or "" without a target."""
        if self.at_least is None and self.at_most is None:
            return ""
        enough = self.at_least is None or self.value >= self.at_least
        return "met" if enough and (self.at_most is None or self.value <= self.at_most) else "missed"


@dataclass(slots=True)
class Report:
    """All figures of a run, and what they were measured on."""

    figures: list[Figure] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    beside: dict[str, str] = field(default_factory=dict)
    """By benchmark: what the rest of the machine did meanwhile."""
    profiles: dict[str, str] = field(default_factory=dict)
    settings: dict[str, list[str]] = field(default_factory=dict)
    """By setup that is not the defaults: what is different."""

    def baseline(self, name: str) -> float | None:
        """Return a baseline's events per second, None where this run did not measure it."""
        return next((f.value for f in self.figures if f.name == name), None)

    def ratio(self, figure: Figure, baseline: str) -> str:
        """Return figure ÷ baseline as text, "" where the two do not compare."""
        base = self.baseline(baseline)
        return f"{figure.value / base:.3g}" if base and figure.is_event_rate and figure.name != baseline else ""

    def rows(self) -> list[tuple[str, ...]]:
        """Return one line of text for each figure, as in HEADINGS."""
        return [
            (
                f.name,
                f.target,
                f"{shown(f.value)} {f.unit}",
                f.verdict,
                self.ratio(f, FAUST),
                self.ratio(f, BARE),
                f.note,
            )
            for f in self.figures
        ]

    def write_json(self, file: Path) -> None:
        """Write everything, details included."""
        file.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", "utf-8")

    def write_markdown(self, file: Path) -> None:
        """Replace the figures between the two marks in ``file``. Raises ValueError where the marks are not there."""
        text = file.read_text("utf-8")
        before, begin, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise ValueError(f"{file} has no place for the figures: it needs the lines {BEGIN!r} and {END!r}")
        file.write_text(f"{before}{BEGIN}\n\n{self.markdown()}\n{END}{after}", "utf-8")

    def markdown(self) -> str:
        """Return machine, table and neighbours as Markdown."""
        lines = [f"Command: `{self.command}`", "", "| machine | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in self.machine.items()]
        lines += ["", "| " + " | ".join(HEADINGS) + " |", "|---|" + "---:|" * 5 + "---|"]
        lines += ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in self.rows()]
        lines += ["", "What ran beside it:", ""]
        lines += [f"- {name}: {what}" for name, what in self.beside.items()]
        for name, settings in self.settings.items():
            lines += ["", f"Settings of the figures with {name}:", "", "```", *settings, "```"]
        for name, profile in self.profiles.items():
            lines += ["", f"Profile of {name}:", "", "```", profile, "```"]
        return "\n".join(lines) + "\n"


HEADINGS: Final = ("figure", "target", "measured", "", "÷ no-op Faust", "÷ bare consumer", "remarks")


def print_report(report: Report, console: Console) -> None:
    """Print the table of all figures."""
    table = Table(title="Millstream, measured here and now")
    for i, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="right" if 0 < i < 6 else "left", overflow="fold")
    colours = {"met": "green", "missed": "red", "": "default"}
    for row in report.rows():
        cells = list(row)
        cells[3] = f"[{colours[row[3]]}]{row[3]}[/]"
        table.add_row(*cells)
    console.print(table)
    for name, what in report.beside.items():
        console.print(f"beside {name}: {what}")
    for name, settings in report.settings.items():
        console.print(f"settings of the figures with {name}:")
        for line in settings:
            console.print(f"  {line}", markup=False, highlight=False)


def shown(value: float) -> str:
    """Return a value with three significant digits or none after the point."""
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that ``share`` of the values do not exceed; NaN without values."""
    if not values:
        return float("nan")
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def machine() -> dict[str, Any]:
    """Return what this machine is, without its name."""
    model = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        names = [line.partition(":")[2].strip() for line in cpu_info.read_text().splitlines() if "model name" in line]
        model = next((name for name in names if name), model)
    return {
        "processor": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "load average before": f"{os.getloadavg()[0]:.1f}",
    }


class CpuAccount:
    """Tells what share of the machine other programs took since it was made: they make a figure worse."""

    def __init__(self) -> None:
        self._busy, self._all = _machine_seconds()
        self._own = _own_seconds()

    def describe(self) -> str:
        """Return the sentence for the report."""
        busy, every = _machine_seconds()
        total = max(every - self._all, 1e-9)
        own = max(0.0, _own_seconds() - self._own)
        others = max(0.0, busy - self._busy - own)
        return (
            f"other programs took {others / total:.0%} of the processor time, "
            f"broker, worker and load together {own / total:.0%}; load average {os.getloadavg()[0]:.1f}"
        )


def _machine_seconds() -> tuple[float, float]:
    times = psutil.cpu_times()
    every = sum(times)
    return every - times.idle - getattr(times, "iowait", 0.0), every


def _own_seconds() -> float:
    own = os.times()
    seconds = own.user + own.system + own.children_user + own.children_system
    for child in psutil.Process().children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        seconds += times.user + times.system
    return seconds
