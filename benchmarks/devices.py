"""What several GPUs bring: `python benchmarks/devices.py`, on a machine with two or more.

    training    characters a second of `python train.py trainer.devices=N`, as metrics.csv has them, with the same batch
                on each GPU; captured, and kernel by kernel under DistributedDataParallel
    sweep       jobs a minute of `python train.py -m` with eight jobs, one GPU each: on one GPU, and on all

Each is the program as a user starts it, in an empty folder. Medians of several runs by turns; ratios are medians of the
turns'.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from measurement import ROOT, Table, by_turns, machine, ratio

CASES = [("lstm", 512, 2, 512), ("lstm", 128, 2, 512), ("lstm", 128, 2, 128), ("gru", 512, 2, 512)]
STEPS = 900
INTERVAL = 100  # steps between two figures; the first is of libraries that load
SIZES = "512,504,496,488,480,472,464,456"  # of the sweep's eight networks


def run(*overrides: str, gpus: int) -> Path:
    """Run train.py on the first GPUs; return the folder in which it did."""
    folder = Path(tempfile.mkdtemp(prefix="devices-"))
    visible = ",".join(str(number) for number in range(gpus))
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *overrides],
        cwd=folder,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": visible},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"train.py {' '.join(overrides)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return folder


def speed(overrides: list[str], gpus: int, captured: bool) -> float:
    """Return millions of characters a second, the median over the intervals of a run."""
    folder = run(
        *overrides,
        f"trainer.devices={gpus}",
        f"trainer.capture={str(captured).lower()}",
        *(f"trainer.max_steps={STEPS}", f"trainer.val_check_interval={STEPS}", f"trainer.log_every_n_steps={INTERVAL}"),
        *("logger=csv", "sampling.every_n_steps=100000", "evaluation.baselines_up_to=0", "hydra.run.dir=run"),
        gpus=gpus,
    )
    with (folder / "run" / "metrics.csv").open(newline="") as file:
        rates = [float(row["characters_per_second"]) for row in csv.DictReader(file) if row["characters_per_second"]]
    return statistics.median(rates[1:]) / 1e6


def jobs_a_minute(gpus: int, steps: int) -> float:
    """Return the rate of a sweep of eight trainings, from the command to its end."""
    begun = time.perf_counter()
    sizes = f"model.hidden_size={SIZES}"
    run("-m", "model=lstm", sizes, "model.num_layers=2", f"trainer.max_steps={steps}", "logger=csv", gpus=gpus)
    return 8 / (time.perf_counter() - begun) * 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2, help="of each training; the sweeps run once")
    parser.add_argument("--sweep-steps", type=int, default=2500, help="optimizer steps of each of the sweep's jobs")
    parser.add_argument("--only", choices=("training", "sweep"))
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first so many")
    given = parser.parse_args()
    gpus = torch.cuda.device_count()
    if gpus < 2:
        sys.exit("this takes two GPUs or more")
    print(f"{gpus} x {machine('lightning')}", flush=True)
    ways = {"1 GPU": (1, True), f"{gpus} GPUs": (gpus, True), f"{gpus} GPUs, eager": (gpus, False)}
    several, eager = list(ways)[1:]
    if given.only != "sweep":
        print(f"window 100, {given.runs} runs of {STEPS} steps; millions of characters a second")
        table = Table("network, batch on each", *ways, f"{several} / 1 GPU", f"{several} / eager")
        for cell, size, layers, batch in CASES[: given.cases]:
            overrides = [f"model={cell}", f"model.hidden_size={size}", f"model.num_layers={layers}"]
            overrides.append(f"data.batch_size={batch}")
            rates = by_turns({name: partial(speed, overrides, *way) for name, way in ways.items()}, given.runs)
            table.row(
                f"{cell.upper()} {size}x{layers}, {batch}",
                *(statistics.median(values) for values in rates.values()),
                f"{ratio(rates, several, '1 GPU'):.2f}",
                f"{ratio(rates, several, eager):.2f}",
            )
    if given.only != "training":
        print(f"\na sweep of 8 jobs, LSTM of 2 layers, {given.sweep_steps} steps of 64 windows; jobs a minute")
        table = Table("1 GPU", several, "ratio")
        one, all_of_them = (jobs_a_minute(number, given.sweep_steps) for number in (1, gpus))
        table.row(one, all_of_them, f"{all_of_them / one:.2f}")


if __name__ == "__main__":
    main()
