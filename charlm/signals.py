"""Signals: the first one ends a run at a place that it can go on from exactly, the second one at once."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from types import FrameType
from typing import Any

import torch
import torch.distributed

from charlm.errors import Interrupted

log = logging.getLogger(__name__)


def requeue() -> None:
    """Ask SLURM to queue this job again, which starts the same command anew."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
        log.info(f"SLURM will start job {job} again")
    except (OSError, subprocess.CalledProcessError) as error:
        log.error(f"SLURM does not start job {job} again: {getattr(error, 'stderr', '') or error}")


class Signals:
    """Notes SIGTERM, SIGINT, and under SLURM SIGUSR1, which asks for the job to be queued again.

    While `deferred` is set, a signal waits for whoever asks for it, at the end of a step or of a batch of a validation;
    else it raises at once.
    Around a run, as in `with Signals() as signals:`.
    """

    def __init__(self) -> None:
        self.deferred = False
        self._received = 0
        self._before: dict[int, Any] = {}
        self._group: Any = None  # of all ranks, to agree over
        self._answer: tuple[Any, torch.Tensor] | None = None
        self._numbers = [signal.SIGTERM, signal.SIGINT]
        if "SLURM_JOB_ID" in os.environ:
            self._numbers.append(signal.SIGUSR1)

    def __enter__(self) -> Signals:
        self._before = {number: signal.getsignal(number) for number in self._numbers}
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def listen(self) -> None:
        """Have signals come here; again where a library has put itself in between."""
        if threading.current_thread() is threading.main_thread():
            for number in self._numbers:
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received:
            os._exit(128 + number)
        self._received = number
        if not self.deferred:
            raise Interrupted(number)
        log.info(f"{signal.Signals(number).name}: saving after this step or batch; a second signal ends at once")

    def agreed(self, world_size: int, now: bool = False) -> int:
        """Return the number of a signal that any rank has received, the same on every rank; 0 for none.

        Every rank must ask as often as the others. The answer is that of the question before, which has crossed the
        network while the step was computed, so that asking each step costs next to nothing; `now` waits for this one's.
        """
        if world_size == 1:
            return self._received
        if self._group is None:  # on the CPU, since NCCL would wait for the device
            self._group = torch.distributed.new_group(backend="gloo")
        answer = self._wait()
        mine = torch.tensor(max(self._received, answer))
        work = torch.distributed.all_reduce(mine, torch.distributed.ReduceOp.MAX, self._group, async_op=True)
        self._answer = work, mine
        return self._wait() if now else answer

    def _wait(self) -> int:
        if self._answer is None:
            return 0
        work, answer = self._answer
        self._answer = None
        work.wait()
        return int(answer)
