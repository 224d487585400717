"""What a sweep costs beside its trainings: `python benchmarks/sweep.py`, two CPU cores to itself, about two minutes.

pool        36 processes that sleep for a second, in a pool of 2: how much of the time both are busy
launcher    small trainings by `train.py -m`, one after another and two side by side: what each costs beyond what its
own result.json counts, which leaves out imports; and what `train.py` alone costs so, in the same run
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from charlm.pool import Pool, Task

TRAIN = Path(__file__).parent.parent / "train.py"
SHORT = [
    *("experiment=debug", "trainer.max_steps=4", "trainer.val_check_interval=4", "trainer.limit_val_batches=2"),
    *("trainer.limit_test_batches=2", "sampling.temperature=1.0"),
]


def pool(tasks: int, jobs: int) -> float:
    """Return which share of the time the places of a pool are taken."""
    with tempfile.TemporaryDirectory() as folder:
        sleepers = [Task(["sleep", "1"], Path(folder) / "log") for _ in range(tasks)]
        begun = time.perf_counter()
        Pool(jobs, []).run(sleepers)
        return tasks / (jobs * (time.perf_counter() - begun))


def seconds(folder: Path, *arguments: str) -> tuple[float, float]:
    """Return how long `train.py` took, and how much of it its trainings count as their own."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, str(TRAIN), *arguments, *SHORT], check=True, stdout=subprocess.DEVNULL)
    wall = time.perf_counter() - begun
    return wall, sum(json.loads(file.read_text())["seconds"] for file in folder.rglob("result.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainings", type=int, default=6)
    parser.add_argument("--tasks", type=int, default=36, help="processes that sleep")
    given = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(
        f"pool: {given.tasks} processes of one second, 2 side by side: both busy {pool(given.tasks, 2):.1%} of the time"
    )
    sizes = ",".join(str(8 + i) for i in range(given.trainings))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        wall, own = seconds(folder / "one", "model.hidden_size=8", f"hydra.run.dir={folder / 'one'}")
        print(f"train.py alone: {wall:.2f} s, of which {own:.2f} s its own and {wall - own:.2f} s imports")
        for jobs in (1, 2):
            sweep = folder / str(jobs)
            arguments = ("-m", f"model.hidden_size={sizes}", f"hydra.launcher.jobs={jobs}", f"hydra.sweep.dir={sweep}")
            wall, own = seconds(sweep, *arguments)
            others = (jobs * wall - own) / given.trainings
            print(
                f"sweep of {given.trainings}, {jobs} side by side: {wall:.2f} s, {wall / given.trainings:.2f} s each; "
                f"{others:.2f} s of a place each are not its own"
            )


if __name__ == "__main__":
    main()
