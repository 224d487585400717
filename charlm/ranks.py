"""The processes of a run on several devices watch one another: where one dies the others do not wait for it for ever.

A rank is a process with one device. Rank 0 starts the others of its host, unless torchrun or SLURM started them all.
"""

from __future__ import annotations

import atexit
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from charlm.errors import RunStopped, first_line

log = logging.getLogger(__name__)

POLL = 0.5  # seconds between two looks
GRACE = 5.0  # seconds in which a process may end by itself


class WatchedRanks(_SubprocessScriptLauncher):
    """Lightning's launcher of the other ranks, with a watch of our own.

    Lightning's would kill rank 0 together with the others, within 5 seconds of any end that is not a success: without a
    word, and without leave to save.
    """

    def launch(self, function: Callable[..., Any], *args: Any, trainer: L.Trainer | None = None, **kwargs: Any) -> Any:
        """Start the other ranks, where no one else did, and call `function`."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def dead(self, patience: float = 0.0) -> str | None:
        """Return which rank has died and how, waiting so many seconds for one to do so."""
        until = time.monotonic() + patience
        while True:
            for rank, process in enumerate(self.procs, start=1):
                if code := process.poll():
                    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                    return f"rank {rank} {how}"
            if time.monotonic() >= until:
                return None
            time.sleep(POLL / 5)


@contextmanager
def watched(trainer: L.Trainer, on_death: Callable[[str], None]) -> Iterator[None]:
    """Around the training of a run: where a rank dies, end this one too, and say so.

    Args:
        trainer: whose ranks.
        on_death: told what happened, where this process cannot end by itself, since it waits for the dead one.

    Raises:
        RunStopped: another rank died, and this one noticed.
    """
    if trainer.world_size == 1:
        yield
        return
    launcher = WatchedRanks(trainer.strategy.cluster_environment, trainer.num_devices, trainer.num_nodes)  # type: ignore[attr-defined]
    if isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
        trainer.strategy._launcher = launcher
    over = threading.Event()
    threading.Thread(target=_watch, args=(launcher, over, on_death), daemon=True).start()
    try:
        yield
    except Exception as error:
        connection = "gloo" in str(error) or "NCCL" in str(error) or isinstance(error, torch.distributed.DistError)
        dead = launcher.dead(GRACE if connection else 0.0)
        if dead or connection:
            if trainer.strategy.root_device.type == "cuda":
                atexit.register(_leave)
            raise RunStopped(dead or f"lost the connection to another rank: {first_line(error)}") from None
        raise
    finally:
        over.set()
        _end(launcher.procs)


def _watch(launcher: WatchedRanks, over: threading.Event, on_death: Callable[[str], None]) -> None:
    parent = os.getppid()
    while not over.wait(POLL):
        dead = "the process that started this rank is gone" if os.getppid() != parent else launcher.dead()
        if dead and not over.wait(GRACE if launcher.procs else 0.0):
            on_death(dead)
            print(f"{os.path.basename(sys.argv[0])}: error: {dead}", file=sys.stderr, flush=True)
            _end(launcher.procs, patience=0.0)
            os._exit(1)


def _leave() -> None:
    """End this process as it is: NCCL, taken down in good order, would wait for the rank that died."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _end(processes: list[subprocess.Popen[bytes]], patience: float = GRACE) -> None:
    until = time.monotonic() + patience
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
