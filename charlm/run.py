"""A run's folder: what it was told, how far it is, how it ended.

config.yaml       every setting, resolved            checkpoints/best.ckpt       lowest val/loss
metrics.csv       what was measured, by step         checkpoints/last.ckpt       to resume from
samples.jsonl     text drawn while training          checkpoints/previous.ckpt   to resume from, were last damaged
sampled/          text at other sampling settings    result.json                 status, losses, what made them
text.json         which text it was trained on      .lock                       held by the process that trains here
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import filterfalse
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only

from charlm.commandline import command
from charlm.corpus import Corpus
from charlm.errors import InputError, Interrupted, RunStopped, listed
from charlm.files import LOCK, RESULT, SWEEP_FILE, read_names, read_result, unreadable, write_whole
from charlm.provenance import record_text
from charlm.sampled import Sampled
from charlm.signals import requeue

log = logging.getLogger(__name__)


class Run:
    """The folder of one run, where the same command goes on or finds all done.

    Args:
        folder: where it is or is to be.
        config: every setting as plain values.

    Sampling settings change no weight: a run may go on with others, and a finished one writes with others.

    Raises:
        InputError: the folder holds a run of another configuration, or what does not say of which.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder = folder
        self.config = config
        self.best_checkpoint = folder / "checkpoints" / "best.ckpt"
        self.last_checkpoint = folder / "checkpoints" / "last.ckpt"
        self.previous_checkpoint = folder / "checkpoints" / "previous.ckpt"
        self.metrics = folder / "metrics.csv"
        self.samples = folder / "samples.jsonl"
        self.sampled = Sampled(folder)
        self._begun = time.time()
        self._config_file = folder / "config.yaml"
        self._result_file = folder / RESULT
        self._lock = FileLock(folder / LOCK)
        self._refuse_another()

    @property
    def told(self) -> dict[str, Any]:
        """The settings that the folder's run was told; those of this run where it is not begun."""
        return read_names(self._config_file, yaml.safe_load) if self._config_file.exists() else self.config

    def _refuse_another(self) -> None:
        if (self.folder / SWEEP_FILE).exists():
            raise InputError(f"{self.folder} is a sweep's folder; choose another with hydra.run.dir")
        if self.begun:
            foreign = [] if self.told.keys() >= {"data", "model", "trainer"} else [self._config_file]
        else:
            foreign = sorted(filterfalse(_is_ours, self.folder.iterdir())) if self.folder.is_dir() else []
        if foreign:
            names = listed([path.name for path in foreign], 3)
            raise InputError(f"{self.folder} holds {names} and no run of charlm's; choose another with hydra.run.dir")
        different = _differences(self.told, self.config)
        elsewhere = any(line.startswith(("trainer.devices:", "trainer.num_nodes:")) for line in different)
        # Which is for each device: with another number of them another size may make the same steps.
        free = (*_OF_NO_ACCOUNT, "data.batch_size:") if elsewhere else _OF_NO_ACCOUNT
        differing = sorted(line for line in different if not line.startswith(free))
        if differing:
            raise InputError(
                f"{self.folder} holds a run of another configuration ({'; '.join(differing[:3])}); choose another "
                "folder with hydra.run.dir, or give the same settings to go on with it"
            )

    @property
    def result(self) -> dict[str, Any]:
        """What the run came to, once it has ended."""
        return read_result(self.folder)

    @property
    def begun(self) -> bool:
        """Whether the folder is there and says what the run was told."""
        return self._config_file.exists()

    @property
    def completed(self) -> bool:
        """Whether there is nothing left to do."""
        return self.result.get("status") == "completed"

    def written(self) -> dict[str, int]:
        """Return how many bytes of metrics and samples there are, once they are on the disk."""
        sizes = {}
        for path in (self.metrics, self.samples):
            if path.exists():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                    sizes[path.name] = file.seek(0, os.SEEK_END)
        return sizes

    @property
    def last_step(self) -> int:
        """How many optimizer steps the training took.

        Raises:
            InputError: metrics.csv, which says it, is gone or damaged.
        """
        try:
            return int(self.metrics.read_text(encoding="utf-8").splitlines()[-1].split(",", 1)[0])
        except (OSError, ValueError, IndexError) as error:
            raise unreadable(self.metrics, error) from None

    def begin(self, corpus: Corpus, written: Mapping[str, int]) -> None:
        """Write what the run was told, and keep of its rows those that its checkpoint knows: the others come again.

        Args:
            corpus: what it is trained on.
            written: how many bytes of each file the checkpoint knows, by the file's name; see `written`.

        Raises:
            InputError: the folder cannot be written to.
        """
        if _on_first_rank():
            with _refusing():
                for folder in (self.folder, self.last_checkpoint.parent, self.folder / "sampled"):
                    for path in folder.glob("*.part"):  # of a program that was killed while writing
                        path.unlink()
                self.last_checkpoint.parent.mkdir(exist_ok=True)
                write_whole(self._config_file, yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True))
                record_text(self.folder, corpus)
                for path in (self.metrics, self.samples):
                    if path.name not in written:
                        path.unlink(missing_ok=True)
                    elif path.exists() and path.stat().st_size > written[path.name]:
                        os.truncate(path, written[path.name])

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Have the folder for this process, and write down how the run ended where it did not complete.

        Where another process trains in it, wait for its end.

        Raises:
            InputError: the folder cannot be written to, or holds a run of another configuration by then.
        """
        if _on_first_rank():
            with _refusing():
                self.folder.mkdir(parents=True, exist_ok=True)
                try:
                    self._lock.acquire(blocking=False)
                except Timeout:
                    log.info(f"another process trains in {self.folder}; waiting for its end")
                    self._lock.acquire()
            self._refuse_another()
        try:
            yield
        except Interrupted as interrupted:
            self._end("interrupted", signal=interrupted.signal.name)
            if _on_first_rank():
                log.error(
                    f"interrupted by {interrupted.signal.name}; the same command with hydra.run.dir={self.folder} goes "
                    f"on; {self._kept}"
                )
                if interrupted.signal == signal.SIGUSR1:
                    requeue()
            raise
        except InputError:
            raise
        except RunStopped as error:
            self._end("failed", error=str(error))
            raise RunStopped(f"{error}; {self._kept}") from None
        except Exception as error:
            self._end("failed", error=f"{type(error).__name__}: {error}")
            log.error(f"failed; {self._kept}")
            raise
        finally:
            self._lock.release()

    def complete(self, figures: Mapping[str, Any]) -> None:
        """Write down that the run completed, and what it came to."""
        self._end("completed", **figures)

    @property
    def _kept(self) -> str:
        there = [path for path in (self.last_checkpoint, self.previous_checkpoint) if path.exists()]
        return f"the last good checkpoint is {there[0]}" if there else "it had not come to a checkpoint yet"

    def stopped(self, why: str) -> None:
        """Write down that something from outside ended the run, from a thread beside it."""
        self._end("failed", error=why)

    @rank_zero_only
    def _end(self, status: str, **figures: Any) -> None:
        result = {
            "status": status,
            **figures,
            "seconds": round(time.time() - self._begun, 1),
            "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": command(self.folder),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "lightning": L.__version__},
        }
        finite = {name: None if _is_no_number(value) else value for name, value in result.items()}  # JSON has no NaN
        content = json.dumps(finite, indent=2) + "\n"
        if status == "completed":
            write_whole(self._result_file, content)
        else:
            with suppress(RunStopped):  # what stopped the run, such as a full disk, may keep this from being written
                write_whole(self._result_file, content)


def newest_completed(runs: Path) -> Path | None:
    """Return the folder of the run below `runs` that was the last to complete."""
    completed = []
    for file in runs.rglob(RESULT):
        with suppress(InputError, OSError):
            if read_result(file.parent).get("status") == "completed":
                completed.append((file.stat().st_mtime, file.parent))
    return max(completed)[1] if completed else None


# What a run may go on with otherwise than it began: on what machine, where its curves go, what it samples.
_OF_NO_ACCOUNT = (
    *(f"trainer.{name}:" for name in ("accelerator", "devices", "num_nodes", "strategy", "capture")),
    *("trainer.enable_progress_bar:", "data.cache_dir:", "logger.", "sampling."),
)


def _is_no_number(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _on_first_rank() -> bool:
    return not getattr(rank_zero_only, "rank", 0)


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {error.filename}: {error.strerror}; choose hydra.run.dir") from None
    except RunStopped as error:
        raise InputError(f"{error}; choose another folder with hydra.run.dir") from None


def _is_ours(path: Path) -> bool:
    """Return whether a name may stand in a run's folder before the run has begun."""
    if path.name == RESULT:  # of one that failed before
        return "status" in read_result(path.parent)
    if path.name == "checkpoints":
        return path.is_dir() and all(inside.name.endswith(".part") for inside in path.iterdir())
    names = ("train.log", "output.log", "sampled", "wandb", "wandb_id.txt", "config.yaml.part")
    return path.name in names or path.name.startswith(".")  # the lock, and what systems and Hydra put anywhere


def _differences(earlier: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(earlier, dict) and isinstance(now, dict):
        prefix = f"{name}." if name else ""
        keys = [*earlier, *(key for key in now if key not in earlier)]
        return [line for key in keys for line in _differences(earlier.get(key), now.get(key), f"{prefix}{key}")]
    return [] if earlier == now else [f"{name}: {earlier} there, {now} now"]
