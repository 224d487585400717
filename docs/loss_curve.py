"""Draw the loss curves of runs: `python docs/loss_curve.py RUN [RUN ...] docs/loss_curve.png`."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt

CURVES = {"train/loss": "--", "val/loss": "-"}


def read_curve(metrics: Path, column: str) -> tuple[list[int], list[float]]:
    """Return the steps at which `column` was measured, and what it was."""
    with metrics.open(encoding="utf-8", newline="") as file:
        rows = [(int(row["step"]), float(row[column])) for row in csv.DictReader(file) if row.get(column)]
    return [step for step, _ in rows], [loss for _, loss in rows]


def draw(runs: list[Path], picture: Path) -> None:
    """Draw training and validation loss of each of `runs` against steps into the file `picture`."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for number, run in enumerate(runs):
        for column, line in CURVES.items():
            name = column.removesuffix("/loss")
            label = f"{run.name}, {name}" if len(runs) > 1 else name
            axes.plot(*read_curve(run / "metrics.csv", column), line, color=f"C{number}", label=label)
    axes.set(xlabel="optimizer steps", ylabel="loss, nats per character")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    matplotlib.use("Agg")
    *folders, target = map(Path, sys.argv[1:])
    if missing := [str(folder) for folder in folders if not (folder / "metrics.csv").is_file()]:
        sys.exit(f"no metrics.csv of a run in {', '.join(missing)}")
    draw(folders, target)
