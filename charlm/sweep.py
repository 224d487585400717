"""A sweep's folder: which one a command goes on in, and that no two sweeps work in the same.

    sweep.json    the settings and the values that each takes        one folder for each training, named by what it is
    .lock         held while the sweep goes on

A command goes on where it was begun. So does one whose grid is wider or narrower than that of a sweep with the same
settings otherwise: what is finished there is not run again. Any other command has a new folder.
"""

from __future__ import annotations

import atexit
import json
import os
import secrets
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from charlm.commandline import quoted, refuse
from charlm.config import TrainConfig
from charlm.errors import InputError, RunStopped
from charlm.files import LOCK, SWEEP_FILE, write_whole
from charlm.launcher import PoolLauncher
from charlm.report import ReportWriter
from charlm.results import read_results

# Settings that make no other training.
OF_NO_ACCOUNT = ("sampling.", "logger", "data.cache_dir")
STUDY = "study.db"
REPORT_LOCK = ".report.lock"  # held by the process that writes the report, where jobs of a cluster do
POOL = "hydra_plugins.charlm_pool.PoolLauncher"
CHOSEN = "auto"  # the last part of hydra.sweep.dir that leaves the folder's name to charlm
BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"

_held: list[FileLock] = []  # by this process, to its end


@dataclass(frozen=True)
class Grid:
    """What a sweep was told.

    Args:
        settings: each setting with the values that it takes, as the command line spells them.
        sweeper: what else decides the jobs: nothing for a plain grid, its own settings for an adaptive sweeper.
    """

    settings: dict[str, list[str]]
    sweeper: dict[str, Any]

    @classmethod
    def of(cls, hydra: DictConfig) -> Grid:
        """Read the grid of a multirun from its hydra node."""
        sweeper: Any = OmegaConf.to_container(hydra.sweeper, resolve=False)
        params = sweeper.pop("params", None) or {}
        for name in ("n_trials", "study_name", "storage", "max_failure_rate"):  # more trials are the same sweep, wider
            sweeper.pop(name, None)
        plain = sweeper["_target_"] == BASIC_SWEEPER
        parser = OverridesParser.create()
        settings = {}
        for override in parser.parse_overrides([*(f"{k}={v}" for k, v in params.items()), *hydra.overrides.task]):
            name = override.get_key_element()
            if name.lstrip("+") == "sweep":
                continue  # it stands for its params
            if plain and override.is_discrete_sweep() and "glob(" not in override.get_value_string():
                settings[name] = list(override.sweep_string_iterator())
            elif override.is_sweep_override():
                settings[name] = [override.get_value_string()]
            else:
                settings[name] = [override.get_value_element_as_str()]
        return cls(settings, {} if plain else sweeper)

    def within(self, other: Grid) -> bool:
        """Whether each training of this grid is one of the other's."""
        mine, others = (
            {name: set(values) for name, values in grid.settings.items() if not name.startswith(OF_NO_ACCOUNT)}
            for grid in (self, other)
        )
        return (
            not (self.sweeper or other.sweeper)
            and mine.keys() == others.keys()
            and all(values <= others[name] for name, values in mine.items())
        )

    def widened(self, other: Grid) -> Grid:
        """Return the grid with the values of both."""
        settings = {name: list(values) for name, values in self.settings.items()}
        for name, values in other.settings.items():
            settings[name] = list(dict.fromkeys([*settings.get(name, []), *values]))
        return Grid(settings, self.sweeper)

    def differences(self, other: Grid) -> list[str]:
        """Return in which settings, other than those that one of the two varies, this grid is not the other."""
        names = [*self.settings, *(name for name in other.settings if name not in self.settings)]
        lines = []
        for name in names:
            here, there = (grid.settings.get(name, ["not given"]) for grid in (self, other))
            varied = name in self.settings and name in other.settings and len(here) + len(there) > 2
            if here != there and not varied and not name.startswith(OF_NO_ACCOUNT):
                lines.append(f"{name}: {','.join(there)} there, {','.join(here)} now")
        return lines + (["the sweeper's settings"] if self.sweeper != other.sweeper else [])


class SweepFolder(Callback):
    """Hydra's callback that gives a multirun its folder, before its sweeper and its launcher are made."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Set `hydra.sweep.dir`, for every job as well; end the program where it may not be used."""
        given = Path(config.hydra.sweep.dir)
        try:
            folder = take_folder(given, Grid.of(config.hydra))
        except InputError as error:
            refuse(error)  # Hydra would make a warning of an exception
        # The launcher tells the finished trainings again in their order; a study that knew them would count them twice.
        study = folder / STUDY
        if OmegaConf.select(config, "hydra.sweeper.storage") == f"sqlite:///{given / STUDY}":
            study.unlink(missing_ok=True)
        if folder != given:
            with read_write(config), open_dict(config):
                config.hydra.sweep.dir = str(folder)
                config.hydra.overrides.hydra.append(f"hydra.sweep.dir={quoted(str(folder))}")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Write the report anew behind a job of a cluster's launcher, in the job's process: it may outlive the sweep's.

        The pool, whose trainings are single runs, writes its own.
        """
        folder = Path(config.hydra.sweep.dir)
        if config.hydra.mode == RunMode.MULTIRUN and read_results(folder):
            with FileLock(folder / REPORT_LOCK):
                ReportWriter(folder).finish(pictures=False)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Sum the sweep up, and end the program with an error where a sweeper went on without jobs that failed."""
        if config.hydra.launcher._target_ != POOL:
            with suppress(InputError):  # a setting that only jobs have
                PoolLauncher.latest = (Path(config.hydra.sweep.dir), TrainConfig.of(config))
        PoolLauncher.sum_up()
        if PoolLauncher.failures:
            refuse(RunStopped(f"{len(PoolLauncher.failures)} trainings failed: {'; '.join(PoolLauncher.failures)}"))


def take_folder(given: Path, grid: Grid) -> Path:
    """Return the folder that a sweep shall go on in, held until this process ends.

    Args:
        given: the folder itself, or FOLDER/auto for one in FOLDER that the grid decides.
        grid: the sweep's.

    Raises:
        InputError: another process sweeps in it, or it holds something else.
    """
    if given.name != CHOSEN:
        if (given / "config.yaml").exists():
            raise InputError(f"{given} is a single run's folder; choose another with hydra.sweep.dir")
        earlier = _grid_of(given)
        differing = grid.differences(earlier) if earlier else []
        if differing:
            raise InputError(
                f"{given} holds a sweep of another configuration ({'; '.join(differing[:3])}); choose another folder "
                "with hydra.sweep.dir, or give the same settings to go on with it"
            )
        return _taken(given, grid.widened(earlier) if earlier else grid)
    known = [(folder, earlier) for folder in _newest_first(given.parent) if (earlier := _grid_of(folder))]
    for folder, earlier in known:
        if grid == earlier:
            return _taken(folder, earlier)
    for folder, earlier in known:
        if grid.within(earlier) or earlier.within(grid):
            with suppress(InputError):  # one that goes on is left alone
                return _taken(folder, earlier.widened(grid))
    name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_sweep_{secrets.token_hex(2)}"
    return _taken(given.parent / name, grid)


def _taken(folder: Path, grid: Grid) -> Path:
    """Hold the folder, and write down what it is for."""
    new = not folder.exists()
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(
            f"another process sweeps in {folder} just now; wait for its end, or choose another folder with "
            "hydra.sweep.dir"
        ) from None
    except OSError as error:
        raise InputError(f"cannot write {error.filename}: {error.strerror}; choose hydra.sweep.dir") from None
    _held.append(lock)
    record = {"command": [Path(sys.argv[0]).name, *sys.argv[1:]], **asdict(grid)}
    write_whole(folder / SWEEP_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    if new:
        atexit.register(_discard_if_unused, folder, os.getpid())
    return folder


def _discard_if_unused(folder: Path, process: int) -> None:
    ours = {LOCK, SWEEP_FILE, "multirun.yaml"}  # the last is Hydra's
    if os.getpid() == process and {path.name for path in folder.iterdir()} <= ours:
        for name in ours:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()
        with suppress(OSError):  # raised where it holds something
            folder.parent.rmdir()


def _newest_first(root: Path) -> Sequence[Path]:
    return [file.parent for file in sorted(root.glob(f"*/{SWEEP_FILE}"), key=_age)]


def _age(file: Path) -> float:
    return -file.stat().st_mtime


def _grid_of(folder: Path) -> Grid | None:
    try:
        record = json.loads((folder / SWEEP_FILE).read_text(encoding="utf-8"))
        return Grid(record["settings"], record["sweeper"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
