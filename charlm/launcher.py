"""Where the jobs of `train.py -m` run: each training in a process of its own, as many side by side as devices allow.

A job is what a sweeper wants to know the loss of. Jobs that differ in `sampling.*` alone are one training, which writes
at the settings of each. A training is the command `python train.py OVERRIDES hydra.run.dir=FOLDER`, as one would give
it by hand: whether it begins, goes on or is finished in FOLDER is train.py's to see.

hydra_plugins/charlm_pool.py makes the launcher known to Hydra.
"""

from __future__ import annotations

import logging
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from filelock import FileLock, Timeout
from hydra.core.utils import JobReturn, JobStatus, configure_log, filter_overrides, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

from charlm.commandline import quoted, without_sweep
from charlm.config import TrainConfig, WandbConfig
from charlm.errors import InputError, Interrupted, RunStopped
from charlm.files import LOCK, read_result
from charlm.monitor import Monitor, Row
from charlm.pool import Pool, Task, visible_gpus, wanted_gpus
from charlm.report import ReportWriter
from charlm.sampled import Sampled, drawn_with

log = logging.getLogger(__name__)

INTERRUPTED = "interrupted"
OUTPUT = "output.log"  # what a training printed, in its folder
# Of Hydra's own settings, those that say how to sweep and not how to run a job.
OF_THE_SWEEP = (
    *("hydra.mode=", "hydra.run.", "hydra.sweep.", "hydra.sweeper", "hydra/sweeper", "hydra.launcher"),
    *("hydra/launcher", "hydra.callbacks"),
)
# What a training is named by, or shares with others: not told beside its name.
TOLD_BY_NAME = ("model=", "model.hidden_size=", "model.num_layers=", "model.parameters=", "sampling.")
# The last line of a traceback, which torch begins with the rank where there are several.
EXCEPTION = re.compile(r"^(?:\[rank\d+\]: )?((?:[\w.]+\.)?\w*(?:Error|Exception)(?:: .*)?)$", re.MULTILINE)
REFUSAL = re.compile(r"^\w+\.py: error: (.+)$", re.MULTILINE)


class Job(NamedTuple):
    """What a sweeper asked for: settings as on a command line, all of them as Hydra composed them, and as checked."""

    overrides: list[str]
    composed: DictConfig
    config: TrainConfig
    folder: Path  # of the training that serves it


class Refused(NamedTuple):
    """What a sweeper asked for and cannot work, and why."""

    overrides: list[str]
    composed: DictConfig
    why: str


class Training:
    """One training and the jobs that it serves.

    Args:
        folder: its run's.
        config: of the first of its jobs, whose command it is.
    """

    def __init__(self, folder: Path, config: TrainConfig) -> None:
        self.folder = folder
        self.config = config
        self.jobs: list[Job] = []
        self.task: Task | None = None  # where there is something left to do
        self.cause: str | None = None  # why it failed
        steps = config.trainer.get("max_steps")
        known = steps if isinstance(steps, int) and steps > 0 else None
        self.row = Row(folder.name, folder / "metrics.csv", known)
        self._log_begins = 0  # where its output begins in the log, behind that of earlier tries

    @property
    def result(self) -> dict[str, Any]:
        """What the run came to, once it has ended. Where that is damaged, the training itself will say so."""
        try:
            return read_result(self.folder)
        except InputError:
            return {}

    @property
    def completed(self) -> bool:
        """Whether it is trained."""
        return self.result.get("status") == "completed"

    @property
    def done(self) -> bool:
        """Whether it is trained, and has written at the settings of every job."""
        return self.completed and not self.to_write()

    def to_write(self) -> list[dict[str, Any]]:
        """Return the sampling settings that it has not written at, but for those that it is told itself.

        Raises:
            InputError: the folder of a finished training no longer says them.
        """
        sampled = Sampled(self.folder)
        own = sampled.own() if self.completed else drawn_with(asdict(self.config.sampling))
        asked = {str(drawn_with(given)): given for given in (asdict(job.config.sampling) for job in self.jobs)}
        return [given for key, given in asked.items() if key != str(own) and not sampled.holds(given)]

    def schedule(self, command: Sequence[str], gpus: int) -> Task:
        """Return its task, for a machine with so many GPUs."""
        Sampled(self.folder).ask(self.to_write())
        devices = self.config.trainer.get("devices", 1)
        self.task = Task(
            command,
            self.folder / OUTPUT,
            gpus=wanted_gpus(self.config.trainer, gpus),
            ranks=devices if isinstance(devices, int) and devices > 0 else 1,
            ready=self._is_free,
        )
        self._log_begins = self.task.log.stat().st_size if self.task.log.exists() else 0
        return self.task

    def _is_free(self) -> bool:
        """Whether no other process trains in the folder."""
        if not (self.folder / LOCK).exists():
            return True
        lock = FileLock(self.folder / LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            return False
        lock.release()
        return True

    def judge(self, time_limit: float | None) -> None:
        """Bring its row up to date, and find out whether it failed."""
        task, row = self.task, self.row
        if task is None:
            row.state = "done"
            return
        if task.began is None or row.state in ("done", "interrupted", "failed"):
            return
        row.seconds = (task.ended or time.monotonic()) - task.began
        row.state = "running" if task.ended is None else "done" if self.done else "failed"
        if row.state == "failed":
            self.cause = self._why_it_failed(task, time_limit)
            if self.cause == INTERRUPTED:
                row.state = INTERRUPTED
            else:
                row.note = self.cause

    def _why_it_failed(self, task: Task, time_limit: float | None) -> str:
        code = task.exit_code or 0
        with task.log.open("rb") as file:
            file.seek(self._log_begins)
            printed = file.read().decode("utf-8", "replace")
        # In this order, for where a rank dies of an exception, the others say only that it did.
        said = EXCEPTION.findall(printed) or REFUSAL.findall(printed)
        if task.timed_out:
            cause = f"over its time limit of {time_limit:g} minutes"
        elif code in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            cause = INTERRUPTED
        elif said:
            cause = said[-1]
        elif code < 0:
            cause = f"killed by {signal.Signals(-code).name}"
        else:
            cause = f"ended with exit code {code} and is not complete"
        return " ".join(cause.split())[:200]


def differing(trainings: Iterable[Training]) -> list[str]:
    """Return of each training the settings that not all have, but for those that its name tells."""
    told = [
        [each for each in training.jobs[0].overrides if not each.startswith(TOLD_BY_NAME)] for training in trainings
    ]
    common = set.intersection(*map(set, told))
    return [" ".join(override for override in overrides if override not in common) for overrides in told]


class PoolLauncher(Launcher):
    """A Hydra launcher: a pool of processes.

    Args:
        jobs: trainings side by side; None is one for each GPU, or one where there is none.
        time_limit: minutes that one may take; None: any.
    """

    # For whoever asks at the end of a sweep.
    failures: ClassVar[list[str]] = []  # of all batches
    latest: ClassVar[tuple[Path, TrainConfig] | None] = None  # the sweep's folder and a training's settings

    def __init__(self, jobs: int | None, time_limit: float | None) -> None:
        self._jobs = jobs
        self._time_limit = time_limit
        self._trainings: dict[Path, Training] = {}  # of all batches
        self._texts: dict[str, dict[str, Any]] = {}  # what identifies each, by the settings that name it
        self._monitor = Monitor(self._rows)
        self._config: DictConfig
        self._context: HydraContext

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives; the trainings are commands, so that the function is not needed.

        Raises:
            InputError: a setting of the launcher's is out of its bounds.
        """
        if self._jobs is not None and not (isinstance(self._jobs, int) and self._jobs >= 1):
            raise InputError(f"hydra.launcher.jobs={self._jobs} must be a number of 1 or more, or null")
        if self._time_limit is not None and not (isinstance(self._time_limit, int | float) and self._time_limit > 0):
            raise InputError(f"hydra.launcher.time_limit={self._time_limit} must be a number of minutes, or null")
        self._context = hydra_context
        self._config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run a batch of jobs to its end.

        Returns:
            Of each job its training's lowest validation loss, or why it failed.

        Raises:
            InputError: a job of a plain grid cannot work, or no job can, or a file of a finished training is damaged.
            Interrupted: by a signal.
        """
        setup_globals()
        configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)
        asked = [self._compose(list(overrides), initial_job_idx + i) for i, overrides in enumerate(job_overrides)]
        jobs = [job for job in asked if isinstance(job, Job)]
        refusals = Counter(job.why for job in asked if isinstance(job, Refused))
        grid = self._config.hydra.sweeper.get("max_batch_size", 1) is None  # a plain one, all in one batch
        if refusals and (grid or not (jobs or self._trainings)):
            why, count = refusals.most_common(1)[0]
            raise InputError(why if count == len(asked) else f"{why} (in {count} of {len(asked)} jobs; none has begun)")
        batch = self._trainings_of(jobs)
        self._refuse_other_texts(batch.values())
        self._trainings |= batch
        ran = self._run(list(batch.values()), len(jobs))
        if ran and grid:
            self.sum_up()
        return self._returns(asked, batch)

    @staticmethod
    def sum_up() -> None:
        """Draw the sweep's report, and record it where its runs are tracked, once nothing is left to run."""
        if PoolLauncher.latest is None:
            return
        folder, config = PoolLauncher.latest
        PoolLauncher.latest = None
        ReportWriter(folder).finish(pictures=True)
        if not isinstance(config.logger, WandbConfig):
            return
        from charlm.tracking import record_sweep  # here, since it brings torch

        try:
            record_sweep(folder, config)
        except Exception as error:  # it must not cost the sweep
            log.warning(f"the sweep as a whole is not recorded: {type(error).__name__}: {error}")

    def _compose(self, overrides: list[str], number: int) -> Job | Refused:
        composed = self._context.config_loader.load_sweep_config(self._config, overrides)
        with open_dict(composed):
            composed.hydra.job.id = str(number)
            composed.hydra.job.num = number
        try:
            config = TrainConfig.of(composed)
            folder = Path(composed.hydra.sweep.dir) / str(composed.hydra.sweep.subdir)
            return Job(overrides, composed, config, folder)
        except InputError as error:
            return Refused(overrides, composed, str(error))

    @staticmethod
    def _trainings_of(jobs: Sequence[Job]) -> dict[Path, Training]:
        batch: dict[Path, Training] = {}
        for job in jobs:
            training = batch.setdefault(job.folder, Training(job.folder, job.config))
            if training.config.run_name != job.config.run_name:
                raise InputError(f"hydra.sweep.subdir gives two trainings the folder {job.folder}; leave it as it is")
            training.jobs.append(job)
        return batch

    def _refuse_other_texts(self, batch: Iterable[Training]) -> None:
        """Refuse to take the result of a finished training for one on the text as it is now, where that is another.

        One that is not finished looks for itself.

        Raises:
            InputError: it is.
        """
        from charlm.provenance import confirm_text, find_text  # here, since a sweep begins without

        for training in batch:
            if training.completed:
                named = str(training.config.data)
                if named not in self._texts:
                    corpus = find_text(training.config.data)
                    self._texts[named] = corpus.identity if corpus else {}
                if self._texts[named]:
                    confirm_text(training.folder, self._texts[named])

    def _command(self, training: Training) -> list[str]:
        hydra = self._config.hydra
        named = any(argument.startswith(("--config-name", "-cn")) for argument in sys.argv)
        flags = [f"--config-name={hydra.job.config_name}"] if named else []
        flags += [f"--config-dir={s.path}" for s in hydra.runtime.config_sources if s.provider == "command-line"]
        kept = [override for override in hydra.overrides.hydra if not override.lstrip("+~").startswith(OF_THE_SWEEP)]
        task = without_sweep(filter_overrides(training.jobs[0].overrides))
        return [sys.executable, sys.argv[0], *flags, *kept, *task, f"hydra.run.dir={quoted(str(training.folder))}"]

    def _run(self, batch: Sequence[Training], jobs: int) -> bool:
        """Run what is not done; return whether that was anything."""
        to_do = [training for training in batch if not training.done]
        gpus = visible_gpus() if any(wanted_gpus(training.config.trainer, 1) != 0 for training in to_do) else []
        pool = Pool(self._jobs, gpus, self._time_limit and self._time_limit * 60)
        tasks = [training.schedule(self._command(training), len(gpus)) for training in to_do]
        side_by_side = f", {min(pool.jobs, len(tasks))} side by side" if len(tasks) > 1 else ""
        finished = f", {len(batch) - len(tasks)} done before" if len(tasks) < len(batch) else ""
        log.info(
            f"{jobs} job{'s' * (jobs > 1)}: {len(batch)} training{'s' * (len(batch) > 1)}{finished}{side_by_side}; "
            f"in {self._config.hydra.sweep.dir}"
        )
        for training, settings in zip(self._trainings.values(), differing(self._trainings.values()), strict=True):
            training.row.settings = settings
        folder = Path(self._config.hydra.sweep.dir)
        report = ReportWriter(folder)

        def watch() -> None:
            self._monitor.update()
            report.update(sum(task.ended is not None for task in tasks))

        try:
            with self._monitor.shown():
                pool.run(tasks, watch)
        except Interrupted:
            done = sum(training.row.state == "done" for training in batch)
            log.error(f"interrupted with {done} of {len(batch)} trainings done; the same command goes on")
            raise
        finally:
            if tasks:
                report.finish(pictures=False)
        if tasks:
            PoolLauncher.latest = (folder, batch[0].config)
        return bool(tasks)

    def _rows(self) -> list[Row]:
        for training in self._trainings.values():
            training.judge(self._time_limit)
        return [training.row for training in self._trainings.values()]

    def _returns(self, asked: Sequence[Job | Refused], batch: dict[Path, Training]) -> list[JobReturn]:
        refusals = Counter(job.why for job in asked if isinstance(job, Refused))
        failures = [f"{why} ({count} job{'s' * (count > 1)})" for why, count in refusals.items()]
        failures += [f"{each.folder.name}: {each.cause}" for each in batch.values() if each.cause is not None]
        self.failures.extend(failures)
        error = RunStopped(
            f"{len(failures)} of {len(batch) + len(refusals)} trainings failed: {'; '.join(failures)}. What each "
            f"printed is in its {OUTPUT} in {self._config.hydra.sweep.dir}; the same command tries again"
        )
        return [self._return(job, batch, error) for job in asked]

    @staticmethod
    def _return(job: Job | Refused, batch: dict[Path, Training], error: RunStopped) -> JobReturn:
        training = batch[job.folder] if isinstance(job, Job) else None
        failed = training is None or training.cause is not None
        returned = FailedJob() if failed else JobReturn()
        returned.overrides = job.overrides
        returned.hydra_cfg = job.composed
        returned.cfg = job.composed.copy()
        with open_dict(returned.cfg):
            returned.cfg.pop("hydra")
        returned.status = JobStatus.FAILED if failed else JobStatus.COMPLETED
        returned.return_value = error
        if training is not None and not failed:
            returned.working_dir = str(training.folder)
            returned.return_value = float(training.result["val/loss"])
        return returned


class FailedJob(JobReturn):
    """Raises its error when a sweeper asks for its value, which says by itself what failed."""

    @property
    def return_value(self) -> Any:
        raise self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value
