"""Processes side by side, each on devices of its own: started in order as devices come free, ended together.

Every task leads a process group, so that a signal reaches all of its ranks, and what is left of the group when its
leader has ended is ended too. A task also ends where the pool's own process is killed: the kernel then closes the pipe
that the task reads (`follow_pool`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from charlm.errors import Interrupted

POLL = 0.05  # seconds
GRACE = 30.0  # seconds that a task may take to end once it is asked to, before it is killed
LEFTOVER_GRACE = 2.0  # seconds for what is left of a group whose leader has ended
PIPE = "CHARLM_POOL_PIPE"  # the variable that names the pipe to a task

# What a launcher of ranks (Lightning's, torchrun, SLURM) leaves in the environment. A task is no rank of the pool's.
RANK_VARIABLES = (
    *("LOCAL_RANK", "RANK", "NODE_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED"),
    *("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"),
)
RANK_PREFIXES = ("TORCHELASTIC_", "OMPI_COMM_WORLD_", "PMI_")


@dataclass
class Task:
    """One command.

    Args:
        command: program and arguments.
        log: the file that its output is added to.
        gpus: how many it wants; None leaves its GPUs to itself.
        ranks: how many processes it starts, for its share of the processor's cores.
        ready: whether it may start; asked again until it may.
    """

    command: Sequence[str]
    log: Path
    gpus: int | None = 0
    ranks: int = 1
    ready: Callable[[], bool] = lambda: True
    began: float | None = field(default=None, init=False)  # time.monotonic()
    ended: float | None = field(default=None, init=False)
    exit_code: int | None = field(default=None, init=False)  # negative: the signal that ended it
    timed_out: bool = field(default=False, init=False)


@dataclass
class _Process:
    task: Task
    process: subprocess.Popen[bytes]
    gpus: list[str]
    kill_at: float | None = None


class Pool:
    """Runs tasks, so many at a time.

    Args:
        jobs: tasks at a time; None is one for each GPU, or one where there is none.
        gpus: as CUDA_VISIBLE_DEVICES names them. More jobs than GPUs share them evenly.
        time_limit: seconds that a task may take; None: any.
    """

    def __init__(self, jobs: int | None, gpus: Sequence[str], time_limit: float | None = None) -> None:
        self.jobs = jobs or max(1, len(gpus))
        self._gpus = list(gpus)
        self._on_a_gpu = -(-self.jobs // max(1, len(gpus)))
        self._load = dict.fromkeys(gpus, 0)
        self._time_limit = time_limit
        self._waiting: list[Task] = []
        self._running: list[_Process] = []
        self._signal: int | None = None

    def run(self, tasks: Sequence[Task], watch: Callable[[], None] = lambda: None) -> None:
        """Run all tasks to their end, in order where nothing holds one up.

        Args:
            tasks: they are told when they began and how they ended.
            watch: called some 20 times a second meanwhile.

        Raises:
            Interrupted: by SIGINT, SIGTERM or SIGHUP, which the tasks got too. A second signal kills them.
        """
        self._waiting = list(tasks)
        side_by_side = min(self.jobs, len(tasks))
        with _pipe() as (read_end, _), self._signals_passed_on():
            try:
                while self._running or (self._waiting and self._signal is None):
                    self._start_those_ready(side_by_side, read_end)
                    self._end_those_over()
                    watch()
                    time.sleep(POLL)
            finally:
                for running in self._running:
                    _send(running, signal.SIGKILL)
        watch()
        if self._signal is not None:
            raise Interrupted(self._signal)

    def _start_those_ready(self, side_by_side: int, read_end: int) -> None:
        for task in list(self._waiting):
            if len(self._running) >= self.jobs or self._signal is not None:
                return
            gpus = self._free_gpus(task)
            if gpus is None or not task.ready():
                continue
            self._waiting.remove(task)
            task.log.parent.mkdir(parents=True, exist_ok=True)
            with task.log.open("ab") as output:
                process = subprocess.Popen(
                    task.command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=self._environment(task, gpus, side_by_side, read_end),
                    pass_fds=(read_end,),
                    start_new_session=True,
                )
            task.began = time.monotonic()
            for gpu in gpus:
                self._load[gpu] += 1
            self._running.append(_Process(task, process, gpus))
            if self._signal is not None:  # it came meanwhile
                _send(self._running[-1], self._signal)

    def _free_gpus(self, task: Task) -> list[str] | None:
        """Return the GPUs with the fewest tasks, as many as the task wants or as there are; None if they are taken."""
        if not task.gpus:
            return []
        least = sorted(self._gpus, key=self._load.__getitem__)[: task.gpus]
        return least if all(self._load[gpu] < self._on_a_gpu for gpu in least) else None

    def _environment(self, task: Task, gpus: Sequence[str], side_by_side: int, read_end: int) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if not _of_a_rank(name)}
        environment[PIPE] = str(read_end)
        if gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        processes = side_by_side * task.ranks
        if processes > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // processes)))
        return environment

    def _end_those_over(self) -> None:
        now = time.monotonic()
        for running in list(self._running):
            task, process = running.task, running.process
            over = process.poll() is not None
            if over and task.exit_code is None:
                task.exit_code = process.returncode
                running.kill_at = now + LEFTOVER_GRACE
            elif not over and running.kill_at is None and self._late(task, now):
                task.timed_out = True
                _send(running, signal.SIGTERM)
                running.kill_at = now + GRACE
            if running.kill_at is not None and now > running.kill_at:
                _send(running, signal.SIGKILL)
            if over and (not _send(running, 0) or (running.kill_at is not None and now > running.kill_at)):
                task.ended = now
                for gpu in running.gpus:
                    self._load[gpu] -= 1
                self._running.remove(running)

    def _late(self, task: Task, now: float) -> bool:
        return self._time_limit is not None and task.began is not None and now - task.began > self._time_limit

    @contextmanager
    def _signals_passed_on(self) -> Iterator[None]:
        def pass_on(signum: int, frame: FrameType | None) -> None:
            for running in self._running:
                _send(running, signum if self._signal is None else signal.SIGKILL)
            self._signal = signum

        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {signum: signal.signal(signum, pass_on) for signum in signals}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)


def follow_pool() -> None:
    """End this process with the pool that started it, if one did, should the pool be killed."""
    read_end = os.environ.pop(PIPE, None)  # not for the ranks that this process starts; they are of its group
    if read_end is not None:
        threading.Thread(target=_end_when_closed, args=(int(read_end),), name="follow-pool", daemon=True).start()


def _end_when_closed(read_end: int) -> None:
    os.read(read_end, 1)  # nothing is ever written; it returns when the other end is closed
    os.killpg(0, signal.SIGTERM)
    time.sleep(GRACE)
    os.killpg(0, signal.SIGKILL)


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given == "":
        return []
    import torch  # here, since it takes a second

    count = torch.cuda.device_count()
    return given.split(",")[:count] if given else [str(number) for number in range(count)]


def wanted_gpus(trainer: Mapping[str, object], there: int) -> int | None:
    """Return how many GPUs a Trainer of these arguments takes, None where it names them itself.

    "auto" is one in a pool, which has other jobs for the others.
    """
    devices = trainer.get("devices", "auto")
    if there == 0 or trainer.get("accelerator", "auto") not in ("auto", "gpu", "cuda"):
        return 0
    if devices == "auto":
        return 1
    if devices in (-1, "-1"):
        return there
    return int(devices) if isinstance(devices, int) or (isinstance(devices, str) and devices.isdigit()) else None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


def _send(running: _Process, signum: int) -> bool:
    """Signal a task's group (0 only asks); return whether any of it is left."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(running.process.pid, signum)
        return True
    return False


def _of_a_rank(name: str) -> bool:
    return name in RANK_VARIABLES or name.startswith(RANK_PREFIXES)
