"""How long charlm lets its user wait: `python benchmarks/startup.py`, a CPU, half a minute.

From the command to its answer, or, of a training on the default corpus, to the first step that metrics.csv tells of.
Medians of several runs, each a process of its own, behind one that fills the file cache.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measurement import ROOT, Table, machine, seconds


def answered(*command: str) -> float:
    """Return the seconds that a program takes to answer and end."""
    return seconds(lambda: subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, check=False))


def first_step() -> float:
    """Return the seconds from the command to the first training step; the run ends there."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "run" / "metrics.csv"
        settings = (f"hydra.run.dir={metrics.parent}", "logger=csv", "trainer.log_every_n_steps=1")
        begun = time.perf_counter()
        with subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *settings],
            cwd=folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as program:
            while not (metrics.exists() and metrics.read_text(encoding="utf-8").count("\n") > 1):
                if program.poll() is not None:
                    raise RuntimeError("train.py ended before its first step")
                time.sleep(0.005)
            taken = time.perf_counter() - begun
            program.kill()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    print(machine("lightning", "hydra-core"))
    table = Table("command", "seconds", "slowest")
    for name, wait in {
        "python train.py --help": lambda: answered("train.py", "--help"),
        "python train.py no_such=1": lambda: answered("train.py", "no_such=1"),
        "python sample.py --help": lambda: answered("sample.py", "--help"),
        "python train.py, to the first step": first_step,
    }.items():
        wait()
        taken = [wait() for _ in range(given.runs)]
        table.row(f"`{name}`", statistics.median(taken), max(taken))


if __name__ == "__main__":
    main()
