"""What the trainings of a sweep are doing, while they do it: a table on a terminal, else lines; and the report."""

from __future__ import annotations

import csv
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

log = logging.getLogger(__name__)

REDRAW = 0.5  # seconds
STYLES = {"waiting": "dim", "running": "cyan", "done": "green", "interrupted": "yellow", "failed": "bold red"}


@dataclass
class Row:
    """One training, as it is now.

    Args:
        name: of its run.
        metrics: its run's metrics.csv.
        steps: how many optimizer steps it shall take, where that is known.
        state: waiting, running, done, interrupted or failed.
        settings: those in which it differs from others, but for its network's, which its name has.
        note: why it failed.
        seconds: how long it has taken.
    """

    name: str
    metrics: Path
    steps: int | None = None
    settings: str = ""
    state: str = "waiting"
    note: str = ""
    seconds: float | None = None
    _read: int = field(default=0, init=False)  # bytes of metrics.csv
    _header: list[str] = field(default_factory=list, init=False)
    _last: dict[str, str] = field(default_factory=dict, init=False)

    def progress(self) -> dict[str, str]:
        """Return the newest value of each column of metrics.csv; empty where nothing is measured yet."""
        with suppress(OSError):
            if self.metrics.stat().st_size < self._read:  # a run that goes on drops what it will write again
                self._read, self._header, self._last = 0, [], {}
            with self.metrics.open("rb") as file:
                file.seek(self._read)
                whole_lines = file.read().rpartition(b"\n")[0]
            self._read += len(whole_lines) + 1 if whole_lines else 0
            for values in csv.reader(whole_lines.decode().splitlines()):
                if self._header:
                    self._last |= {name: value for name, value in zip(self._header, values, strict=False) if value}
                else:
                    self._header = values
        return self._last


class Monitor:
    """Shows the rows that `rows` gives, as they are each time that it is asked."""

    def __init__(self, rows: Callable[[], Sequence[Row]]) -> None:
        self._rows = rows
        self._drawn = 0.0
        self._states: dict[str, str] = {}
        self._draw: Callable[[], None] = self._say_what_changed

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show them until the end of the context."""
        from rich.console import Console

        console = Console()
        if not console.is_terminal:
            try:
                yield
            finally:
                self._draw()
            return
        from rich.live import Live

        with Live(self._table(), console=console, auto_refresh=False) as live:
            self._draw = lambda: live.update(self._table(console.height - 4), refresh=True)
            try:
                yield
            finally:
                self._draw = lambda: live.update(self._table(), refresh=True)
                self._draw()

    def update(self) -> None:
        """Show them as they are now; called as often as one likes."""
        now = time.monotonic()
        if now - self._drawn >= REDRAW:
            self._drawn = now
            self._draw()

    def _say_what_changed(self) -> None:
        for row in self._rows():
            if row.state != self._states.get(row.name, "waiting"):
                self._states[row.name] = row.state
                took = f" after {row.seconds:,.0f} s" if row.seconds is not None and row.state != "running" else ""
                loss = row.progress().get("val/loss") if row.state == "done" else None
                said = f", val {float(loss):.4f}" if loss else f", {row.note}" if row.note else ""
                settings = f" ({row.settings})" if row.settings else ""
                log.info(f"{row.name}{settings}: {row.state}{took}{said}")

    def _table(self, height: int | None = None) -> Table:
        """Return the rows as a table, those of less interest left out where they do not fit."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        rows = list(self._rows())
        counts = {state: sum(row.state == state for row in rows) for state in STYLES}
        kept = rows
        if height is not None and len(rows) > height:
            order = ("running", "failed", "interrupted", "waiting", "done")
            kept = sorted(rows, key=lambda row: order.index(row.state))[: max(1, height)]
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.title = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        for heading, justify in (
            ("run", "left"),
            ("", "left"),
            ("step", "right"),
            ("train", "right"),
            ("val", "right"),
        ):
            table.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        table.add_column("s", justify="right", no_wrap=True)
        table.add_column("")  # the only one that may be narrowed
        for row in kept:
            last = row.progress() if row.state != "waiting" else {}
            losses = [f"{float(last[name]):.4f}" if name in last else "" for name in ("train/loss", "val/loss")]
            step = f"{int(last['step']):,}" + (f" of {row.steps:,}" if row.steps else "") if "step" in last else ""
            seconds = f"{row.seconds:,.0f}" if row.seconds is not None else ""
            state = Text(row.state, STYLES[row.state])
            note = Text(row.note or row.settings, no_wrap=True, overflow="ellipsis")
            table.add_row(Text(row.name), state, step, *losses, seconds, note)
        if len(kept) < len(rows):
            table.caption = f"and {len(rows) - len(kept)} more"
        return table
