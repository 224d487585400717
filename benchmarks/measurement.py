"""What the benchmarks share: the machine in words, runs by turns, tables that BENCHMARKS.md takes as they are."""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # the benchmarks run where charlm is not installed


def machine(*packages: str) -> str:
    """Return the hardware, and the versions of Python and of packages, in a line."""
    from importlib.metadata import version

    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    where = f"{_processor()}, {cores} cores, torch uses {torch.get_num_threads()}"
    if torch.cuda.is_available():
        where = f"{torch.cuda.get_device_name()}; {where}"
    versions = [f"torch {torch.__version__}", *(f"{name} {version(name)}" for name in packages)]
    return f"{where}; {', '.join(versions)}, Python {platform.python_version()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def on_one_core() -> None:
    """Keep this process, and those that it starts, on one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def seconds(call: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def by_turns(ways: Mapping[str, Callable[[], float]], runs: int) -> dict[str, list[float]]:
    """Measure every way once, and all again, `runs` times: what drifts drifts for all."""
    values: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, measure in ways.items():
            values[name].append(measure())
    return values


def ratio(values: Mapping[str, Sequence[float]], first: str, second: str) -> float:
    """Return the median over the runs of a way's value over another's in the same turn."""
    return statistics.median(a / b for a, b in zip(values[first], values[second], strict=True))


class Table:
    """A table in Markdown, printed as its rows come."""

    def __init__(self, *columns: str) -> None:
        self._widths = [max(len(name), 10) for name in columns]
        self._print(columns)
        print("|" + "|".join("-" * (width + 2) for width in self._widths) + "|", flush=True)

    def row(self, *cells: str | float) -> None:
        """Print a row; numbers with three figures or all before the point, ratios as text."""
        self._print([cell if isinstance(cell, str) else _three_figures(cell) for cell in cells])

    def _print(self, cells: Sequence[str]) -> None:
        padded = (f"{cell:>{width}}" for cell, width in zip(cells, self._widths, strict=True))
        print("| " + " | ".join(padded) + " |", flush=True)


def _three_figures(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")
