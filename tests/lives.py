"""Runs in processes of their own, to be killed and started again: each starts in a moment, since it is forked from a
process that has imported everything and done nothing.
"""

from __future__ import annotations

import csv
import importlib
import json
import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import tqdm

ROOT = Path(__file__).parent.parent

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["lives", "train", "lightning", "charlm.callbacks", "charlm.capture", "charlm.trainer"])

Sabotage = Callable[[Path], None]


def begin(
    folder: Path,
    overrides: Sequence[str],
    sabotage: Sabotage | None = None,
    environment: dict[str, str] | None = None,
) -> BaseProcess:
    """Start a training with these overrides in `folder`, `sabotage` first. What it prints goes to FOLDER.log."""
    process = _context.Process(target=_live, args=(folder, list(overrides), sabotage, environment or {}))
    process.start()
    return process


def begin_ranks(folder: Path, overrides: Sequence[str], sabotage: Sabotage | None = None) -> list[BaseProcess]:
    """Start a training on two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
    two = [*overrides, "trainer.devices=2"]
    return [begin(folder, two, sabotage, {**shared, "LOCAL_RANK": str(rank)}) for rank in range(2)]


def live(folder: Path, overrides: Sequence[str], sabotage: Sabotage | None = None, **environment: str) -> int:
    """Do so and wait for its end; return the exit code, that of a signal below 0."""
    process = begin(folder, overrides, sabotage, environment)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _live(folder: Path, overrides: list[str], sabotage: Sabotage | None, environment: dict[str, str]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.update({"OMP_NUM_THREADS": "1", **environment})
    torch.set_num_threads(1)
    with folder.with_suffix(".log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    os.chdir(folder.parent)
    tqdm.tqdm.set_lock(threading.RLock())  # one for several processes would outlive a killed one
    if sabotage:
        sabotage(folder)

    from hydra import compose, initialize_config_dir

    from charlm.commandline import refuse
    from charlm.config import TrainConfig, register
    from charlm.errors import InputError, RunStopped
    from train import train

    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = TrainConfig.of(compose("train", overrides=overrides))
    try:
        train(config, folder)
    except (InputError, RunStopped) as error:
        refuse(error)


# --- sabotage -----------------------------------------------------------------------------------------------------


class KillAtFileEvent:
    """Dies of SIGKILL just before the n-th time that a file of the run is opened, renamed, linked, cut or deleted."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, folder: Path) -> None:
        events = 0

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal events
            if event in ("open", "os.rename", "os.link", "os.truncate", "os.remove", "os.mkdir"):
                if str(folder) not in str(arguments[0]):
                    return
                events += 1
                if events == self.number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)


class KillWhileWriting:
    """Dies of SIGKILL in the middle of writing the n-th checkpoint: half of it is on the disk."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, folder: Path) -> None:
        import charlm.checkpoint

        whole, written = charlm.checkpoint.write_whole, 0

        def write(path: Path, content: Any) -> None:
            nonlocal written
            written += 1
            if written == self.number:
                path.with_name(path.name + ".part").write_bytes(content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            whole(path, content)

        charlm.checkpoint.write_whole = write


class SignalAt:
    """Sends itself a signal as the n-th call of a function begins, such as "module.CharLM.test_step"."""

    def __init__(self, where: str, call: int = 1, number: int = signal.SIGTERM, times: int = 1, rank: int = 0) -> None:
        self.where, self.call, self.number, self.times, self.rank = where, call, number, times, rank

    def __call__(self, folder: Path) -> None:
        if int(os.environ.get("LOCAL_RANK", self.rank)) != self.rank:
            return
        module, *path, name = self.where.split(".")
        owner = importlib.import_module(f"charlm.{module}")
        for part in path:
            owner = getattr(owner, part)
        function, calls = getattr(owner, name), 0

        def send_and_call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.call:
                for _ in range(self.times):
                    os.kill(os.getpid(), self.number)
            return function(*args, **kwargs)

        setattr(owner, name, send_and_call)


class Both:
    """Two sabotages in one run."""

    def __init__(self, first: Sabotage, second: Sabotage) -> None:
        self.first, self.second = first, second

    def __call__(self, folder: Path) -> None:
        self.first(folder)
        self.second(folder)


class Poison:
    """Makes the loss of the n-th step, and of each such step again, not a number."""

    def __init__(self, *calls: int) -> None:
        self.calls = calls

    def __call__(self, folder: Path) -> None:
        import charlm.module

        score, calls = charlm.module.CharLM._score, 0

        def poisoned(model: Any, batch: Any, state: Any) -> Any:
            nonlocal calls
            nats, state = score(model, batch, state)
            calls += model.training
            return nats * float("nan") if model.training and calls in self.calls else nats, state

        charlm.module.CharLM._score = poisoned  # type: ignore[method-assign]


class OutOfMemory:
    """Has a batch, the n-th of training or validation, find too little memory, as torch says it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self, folder: Path) -> None:
        import charlm.module

        score, calls = charlm.module.CharLM._score, 0

        def score_or_fail(model: Any, batch: Any, state: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == self.number:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has ...")
            return score(model, batch, state)

        charlm.module.CharLM._score = score_or_fail  # type: ignore[method-assign]


def kill_after(processes: Sequence[BaseProcess], seconds: float) -> bool:
    """Send SIGKILL in so many seconds; return whether it came before the end."""
    processes[0].join(seconds)
    for process in processes:
        process.kill()
        process.join()
    return any(process.exitcode == -signal.SIGKILL for process in processes)


# --- what two runs must share -------------------------------------------------------------------------------------


def outcome(folder: Path) -> dict[str, Any]:
    """Return all of a run that must not depend on how often it was killed: weights, rows but their speed, samples,
    figures, and every other number of its last checkpoint.
    """
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["characters_per_second"]
    figures = json.loads((folder / "result.json").read_text())
    for name in ("seconds", "ended", "command", "versions"):
        del figures[name]
    checkpoints = {name: torch.load(folder / "checkpoints" / f"{name}.ckpt") for name in ("last", "best")}
    kept = {
        name: {
            key: checkpoint[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "best", "global_step")
        }
        | {"ranks": checkpoint["ranks"]}
        for name, checkpoint in checkpoints.items()
    }
    return {"rows": rows, "samples": (folder / "samples.jsonl").read_text(), "figures": figures, "kept": kept}


def same(first: Any, second: Any) -> bool:
    """Return whether two values are equal, tensors bit by bit."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)
