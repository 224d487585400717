"""What a sweep costs beside its trainings: `python benchmarks/sweep.py`, two CPU cores to itself, about four minutes.

pool        36 processes that sleep for a second, in a pool of 2: how much of the time both are busy
places      36 trainings of about a second by `train.py -m`, in a pool of 2: what becomes of the places' time, from the
first process's start to the last one's end. Imports: from a process's start to the beginning of its training; own: the
seconds that result.json counts; the rest is the launcher's, with the processes' own ends. What keeps both busy outside
of imports is own / (all - imports)
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
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from charlm.pool import Pool, Task

# Has a training write down when its process started and when it came to its end.
HOOK = """
import atexit, sys, time
begun = time.time()
for argument in sys.orig_argv:
    if argument.startswith("hydra.run.dir="):
        file = argument.partition("=")[2].strip('"') + ".place"
        atexit.register(lambda: open(file, "w").write(f"{begun} {time.time()}"))
"""
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


class Places(NamedTuple):
    """What becomes of the time of a sweep's places, in seconds of all of them together."""

    all: float
    taken: float  # by a process
    imports: float
    own: float

    @classmethod
    def of(cls, trainings: int, jobs: int) -> Places:
        """Have `train.py -m` run trainings that differ in their seed, so many side by side."""
        with tempfile.TemporaryDirectory() as folder:
            (hook := Path(folder) / "hook").mkdir()
            (hook / "sitecustomize.py").write_text(HOOK)
            seeds = ",".join(map(str, range(trainings)))
            sweep = Path(folder) / "sweep"
            seconds(sweep, "-m", f"seed={seeds}", f"hydra.launcher.jobs={jobs}", f"hydra.sweep.dir={sweep}", hook=hook)
            begun, ended, imports, own = [], [], 0.0, 0.0
            for result in sweep.glob("*/result.json"):
                begin, end = map(float, result.parent.with_name(result.parent.name + ".place").read_text().split())
                took = json.loads(result.read_text())["seconds"]
                begun.append(begin)
                ended.append(end)
                own += took
                imports += result.stat().st_mtime - took - begin
            assert len(begun) == trainings
            return cls(jobs * (max(ended) - min(begun)), sum(ended) - sum(begun), imports, own)


def seconds(folder: Path, *arguments: str, hook: Path | None = None) -> tuple[float, float]:
    """Return how long `train.py` took, and how much of it its trainings count as their own."""
    environment = {**os.environ, **({"PYTHONPATH": str(hook)} if hook else {})}
    begun = time.perf_counter()
    command = [sys.executable, str(TRAIN), *arguments, *SHORT]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    wall = time.perf_counter() - begun
    return wall, sum(json.loads(file.read_text())["seconds"] for file in folder.rglob("result.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainings", type=int, default=6)
    parser.add_argument("--tasks", type=int, default=36, help="of the pool and of the places")
    given = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(
        f"pool: {given.tasks} processes of one second, 2 side by side: both busy {pool(given.tasks, 2):.1%} of the time"
    )
    places = Places.of(given.tasks, 2)
    rest = places.all - places.imports - places.own
    imports, own, others = (seconds / given.tasks for seconds in (places.imports, places.own, rest))
    busy = places.own / (places.all - places.imports)
    print(
        f"places: {given.tasks} trainings, 2 side by side: {imports:.2f} s of imports, {own:.2f} s of its own and "
        f"{others:.2f} s of the rest each; both busy outside of imports {busy:.1%} of the time, and with them "
        f"{places.taken / places.all:.1%}"
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
