"""A run's folder: what it was told, how far it is, how it ended.

config.yaml       every setting, resolved            checkpoints/best.ckpt   lowest val/loss
metrics.csv       what was measured, by step         checkpoints/last.ckpt   to resume from
samples.jsonl     text drawn while training          result.json             status, losses, what made them
sampled/          text at other sampling settings    .lock                   held by the process that trains here
"""

from __future__ import annotations

import json
import logging
import platform
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
import yaml
from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

from charlm.errors import InputError
from charlm.files import LOCK, write_whole
from charlm.sampled import Sampled

log = logging.getLogger(__name__)


class Run:
    """The folder of one run, where the same command goes on or finds all done.

    Args:
        folder: where it is or is to be.
        config: every setting as plain values.

    Sampling settings change no weight: a run may go on with others, and a finished one writes with others.

    Raises:
        InputError: the folder holds a run of another configuration.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder = folder
        self.config = config
        self.checkpoints = folder / "checkpoints"
        self.metrics = folder / "metrics.csv"
        self.samples = folder / "samples.jsonl"
        self.sampled = Sampled(folder)
        self._begun = time.time()
        self._config_file = folder / "config.yaml"
        self._result_file = folder / "result.json"
        self._lock = FileLock(folder / LOCK)
        self._refuse_another()

    @property
    def told(self) -> dict[str, Any]:
        """The settings that the folder's run was told; those of this run where it is not begun."""
        if not self._config_file.exists():
            return self.config
        told: dict[str, Any] = yaml.safe_load(self._config_file.read_text(encoding="utf-8"))
        return told

    def _refuse_another(self) -> None:
        differing = sorted(_differences(_of_training(self.told), _of_training(self.config)))
        if differing:
            raise InputError(
                f"{self.folder} holds a run of another configuration ({'; '.join(differing[:3])}); choose another "
                "folder with hydra.run.dir, or give the same settings to go on with it"
            )

    @property
    def result(self) -> dict[str, Any]:
        """What the run came to, once it has ended."""
        if not self._result_file.exists():
            return {}
        result: dict[str, Any] = json.loads(self._result_file.read_text(encoding="utf-8"))
        return result

    @property
    def last_checkpoint(self) -> Path | None:
        """Where to resume from."""
        path = self.checkpoints / "last.ckpt"
        return path if path.exists() else None

    @property
    def completed(self) -> bool:
        """Whether there is nothing left to do."""
        return self.result.get("status") == "completed"

    def keep_rows_to(self, step: int) -> None:
        """Drop the metrics and samples behind `step`: a run that resumes there writes them again."""
        if self.metrics.exists():
            header, *rows = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            write_whole(self.metrics, "".join([header, *(row for row in rows if int(row.split(",", 1)[0]) <= step)]))
        if self.samples.exists():
            rows = self.samples.read_text(encoding="utf-8").splitlines(keepends=True)
            write_whole(self.samples, "".join(row for row in rows if json.loads(row)["step"] <= step))

    @property
    def last_step(self) -> int:
        """How many optimizer steps the training took."""
        return int(self.metrics.read_text(encoding="utf-8").splitlines()[-1].split(",", 1)[0])

    @rank_zero_only
    def begin(self) -> None:
        """Make the folder and write what the run was told. Where another process trains in it, wait for its end.

        Raises:
            InputError: the folder holds a run of another configuration by then.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            log.info(f"another process trains in {self.folder}; waiting for its end")
            self._lock.acquire()
            self._refuse_another()
        text = yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True)
        write_whole(self._config_file, text)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Write down how the run ended where it did not complete, and end with a signal's usual exit code."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit) as error:
            self._end("interrupted")
            log.error(f"interrupted; the same command with hydra.run.dir={self.folder} goes on; {self._kept}")
            code = 143 if isinstance(error, SIGTERMException) else 130  # 128 + the signal's number
            raise SystemExit(code) from None
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
        path = self.last_checkpoint
        return f"the last good checkpoint is {path}" if path else "it had not come to a checkpoint yet"

    @rank_zero_only
    def _end(self, status: str, **figures: Any) -> None:
        result = {
            "status": status,
            **figures,
            "seconds": round(time.time() - self._begun, 1),
            "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "lightning": L.__version__},
        }
        write_whole(self._result_file, json.dumps(result, indent=2) + "\n")


def newest_completed(runs: Path) -> Path | None:
    """Return the folder of the run below `runs` that was the last to complete."""
    completed = []
    for file in runs.rglob("result.json"):
        try:
            result = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(result, dict) and result.get("status") == "completed":
            completed.append((file.stat().st_mtime, file.parent))
    return max(completed)[1] if completed else None


def _of_training(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != "sampling"}


def _differences(earlier: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(earlier, dict) and isinstance(now, dict):
        prefix = f"{name}." if name else ""
        keys = [*earlier, *(key for key in now if key not in earlier)]
        return [line for key in keys for line in _differences(earlier.get(key), now.get(key), f"{prefix}{key}")]
    return [] if earlier == now else [f"{name}: {earlier} there, {now} now"]
