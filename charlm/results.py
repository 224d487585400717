"""What the runs below a folder came to, read from their files: without torch, and while they are being written."""

from __future__ import annotations

import csv
import json
import math
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from charlm.errors import InputError
from charlm.files import LOCK, read_result
from charlm.metrics import bits

# Settings that are told by other columns, or say nothing of the training.
_TOLD_APART = ("model.cell", "model.num_layers", "model.hidden_size", "sampling.", "logger.", "data.cache_dir")

_SAFE_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where there is one: ten times as fast


@dataclass(frozen=True)
class Result:
    """A run's folder as it stands: any file may be missing, or end in half a line."""

    folder: Path
    name: str  # the folder's path below the sweep's
    config: dict[str, Any]  # every setting, by its whole name

    @classmethod
    def of(cls, folder: Path, below: Path) -> Result | None:
        """Read a run's configuration; None where there is no run that has begun."""
        try:
            config = yaml.load((folder / "config.yaml").read_text(encoding="utf-8"), _SAFE_LOADER)
        except (OSError, ValueError, yaml.YAMLError):
            return None
        if not isinstance(config, dict) or not isinstance(config.get("model"), dict) or "cell" not in config["model"]:
            return None
        name = folder.relative_to(below).as_posix() if folder != below else folder.name
        return cls(folder, name, dict(_flat(config)))

    @cached_property
    def end(self) -> dict[str, Any]:
        """What result.json says, if the run has ended once; of one that is damaged, that it is."""
        try:
            return read_result(self.folder)
        except InputError as error:
            return {"status": "failed", "error": str(error)}

    @cached_property
    def status(self) -> str:
        """Return completed, failed, interrupted or running."""
        if self.end.get("status") == "completed":
            return "completed"
        if _held(self.folder / LOCK):
            return "running"
        return str(self.end.get("status", "interrupted"))  # killed, where it could write nothing

    @property
    def cause(self) -> str:
        """Why it failed, in a line."""
        return " ".join(str(self.end.get("error", "")).split()) if self.status == "failed" else ""

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        """The rows of metrics.csv, each with what was measured then."""
        try:
            with (self.folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        except (OSError, ValueError, csv.Error):
            return []
        return [{name: number for name, text in row.items() if (number := _number(text)) is not None} for row in rows]

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """What the best checkpoint wrote, at the run's own sampling settings and at others; of a run that has not come
        so far, what it wrote last. By temperature.
        """
        own = _json_lines(self.folder / "samples.jsonl")
        last = [row for row in own if row["step"] == own[-1]["step"]]
        best = [row for row in own if "entropy" in row]
        others = [row for file in sorted(self.folder.glob("sampled/*.jsonl")) for row in _json_lines(file)]
        return sorted([*(best or last), *others], key=lambda row: (row["temperature"], row["prompt"]))

    @property
    def cell(self) -> str:
        return str(self.config.get("model.cell"))

    @property
    def num_layers(self) -> int:
        return int(self.config.get("model.num_layers", 1))

    @property
    def hidden_size(self) -> int | None:
        """Of the configuration, or where that gives a number of parameters instead, what it came to."""
        return self.config.get("model.hidden_size") or self.end.get("hidden_size")

    @property
    def size(self) -> str:
        """Hidden units and layers, as in 256x2."""
        return f"{self.hidden_size or '?'}x{self.num_layers}"

    def figure(self, name: str) -> float | None:
        """Return a figure of result.json, or where the run has not ended, the best that it has come to."""
        value = self.end.get(name)
        if value is None and name == "val/loss":
            value = min((row[name] for row in self.metrics if name in row), default=None)
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

    @property
    def val_bpc(self) -> float | None:
        """The lowest validation loss, in bits per character."""
        loss = self.figure("val/loss")
        return None if loss is None else bits(loss)

    @property
    def test_bpc(self) -> float | None:
        """The test loss of the best checkpoint, in bits per character."""
        return self.figure("test/bpc")

    @property
    def command(self) -> str:
        """How it was started, as a shell takes it."""
        return shlex.join(["python", *map(str, self.end["command"])]) if "command" in self.end else ""


def read_results(folder: Path) -> list[Result]:
    """Return the runs below a folder, those of one cell and size together, smaller ones first."""
    found = (Result.of(file.parent, folder) for file in folder.rglob("config.yaml") if "wandb" not in file.parts)
    return sorted(
        (result for result in found if result),
        key=lambda run: (run.cell, run.num_layers, run.hidden_size or 0, run.name),
    )


def varied(results: Sequence[Result]) -> list[str]:
    """Return the settings that are not the same in all runs, beyond cell and size."""
    names = dict.fromkeys(name for result in results for name in result.config if not name.startswith(_TOLD_APART))
    missing = object()
    return [name for name in names if any(r.config.get(name, missing) != results[0].config.get(name) for r in results)]


COLUMNS: dict[str, Callable[[Result], Any]] = {
    "run": lambda run: run.name,
    "status": lambda run: run.status,
    "cell": lambda run: run.cell,
    "num_layers": lambda run: run.num_layers,
    "hidden_size": lambda run: run.hidden_size,
    "parameters": lambda run: run.end.get("parameters"),
    "val_bpc": lambda run: run.val_bpc,
    "test_bpc": lambda run: run.test_bpc,
    "test_bpc_standard_error": lambda run: run.figure("test/bpc_standard_error"),
    "test_bpb": lambda run: run.figure("test/bpb"),
    "steps": lambda run: int(run.metrics[-1]["step"]) if run.metrics and "step" in run.metrics[-1] else None,
    "seconds": lambda run: run.figure("seconds"),
}


def table(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return a row for each run: what it is, what it came to, the settings in which it differs, why it failed, how it
    was started.
    """
    settings = varied(results)
    return [
        {name: figure(run) for name, figure in COLUMNS.items()}
        | {name: run.config.get(name) for name in settings}
        | {"cause": run.cause, "command": run.command}
        for run in results
    ]


def _flat(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _held(lock: Path) -> bool:
    """Whether a process holds a lock; asking takes it for a moment."""
    if not lock.exists():
        return False
    try:
        with FileLock(lock, blocking=False):
            return False
    except Timeout:
        return True
    except OSError:  # not ours to lock
        return False


def _number(text: object) -> float | None:
    try:
        number = float(str(text))
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _json_lines(file: Path) -> list[dict[str, Any]]:
    """Return the samples in a file, but for lines that are not whole yet."""
    rows = []
    try:
        # Not splitlines(), which also splits at characters that a text may hold.
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return []
    for line in lines:
        try:
            row = json.loads(line)
            rows.append({**row, "temperature": float(row["temperature"]), "text": str(row["text"])})
        except (ValueError, KeyError, TypeError):
            continue
    return [row for row in rows if {"step", "prompt"} <= row.keys()]
