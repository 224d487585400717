"""Exact resume: what a checkpoint holds so that a run goes on as if it had never stopped, when one is written, and
which one to go on from.

    last.ckpt        behind the last validation, or where a signal came: behind a step, or in a validation
    previous.ckpt    the one before; used where the last is damaged
    best.ckpt        the one of the lowest val/loss: the same file as the last was then
"""

from __future__ import annotations

import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from charlm.checkpoint import read_checkpoint
from charlm.datamodule import CharDataModule
from charlm.errors import InputError, Interrupted, RunStopped
from charlm.files import flush_folder
from charlm.finite import has_scaler
from charlm.module import CharLM, between_steps
from charlm.network import State
from charlm.provenance import confirm_text
from charlm.run import Run
from charlm.signals import Signals

log = logging.getLogger(__name__)

# What a checkpoint holds besides weights and their sizes, if a run can go on from it.
_OF_A_RUN = {"loops", "optimizer_states", "lr_schedulers", "ranks", "windows_a_step", "written", "best"}


def find_resumable(
    run: Run, model: CharLM, data: CharDataModule, world_size: int
) -> tuple[Path | None, dict[str, Any]]:
    """Return the newest checkpoint that a run can go on from and what it holds; None and {} where there is none yet.

    Raises:
        InputError: there are some, but of another text or batch size, or none that can be used.
    """
    there = [path for path in (run.last_checkpoint, run.previous_checkpoint) if path.exists()]
    if there:
        confirm_text(run.folder, data.corpus.identity)
    refused = []
    for path in there:
        try:
            content = read_checkpoint(path)
            _check_origin(path, content, model)
        except InputError as error:
            refused.append(str(error))
            continue
        ranks = len(content["ranks"])  # another number of them deals out a step's windows anew
        batch_size = content["windows_a_step"] // ranks
        if ranks == world_size and batch_size != data.config.batch_size:
            raise InputError(
                f"{run.folder} was begun with data.batch_size={batch_size} on as many devices; give the same to go on "
                "with it"
            )
        for reason in refused:
            log.warning(f"{reason}; going on from {path.name}, the one before")
        return path, content
    if refused:
        raise InputError(f"{run.folder} cannot be resumed: {'; '.join(refused)}; to train anew, choose another folder")
    return None, {}


def _check_origin(path: Path, content: dict[str, Any], model: CharLM) -> None:
    lacking = _OF_A_RUN - content.keys()
    if lacking:
        raise InputError(f"{path} holds weights, but not the state of a run ({', '.join(sorted(lacking))})")
    for key in ("symbols", "model", "optimizer", "regularization"):
        if content["hyper_parameters"].get(key) != model.hparams[key]:
            raise InputError(f"{path} is of another run: its {key} differs")


class ExactResume(Callback):
    """Keeps what Lightning does not: every rank's random state, carried hidden state and losses not logged yet, whether
    the run was to stop, and how long its files were.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._ranks: list[dict[str, Any]] = []

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, CharLM)
        mine: dict[str, Any] = {
            "random": torch.get_rng_state(),
            "carried": _moved(pl_module.carried, "cpu"),
            "counted": pl_module.counted(),
        }
        if pl_module.device.type == "cuda":
            mine["random_cuda"] = torch.cuda.get_rng_state(pl_module.device)
            drawn = pl_module.network.regularizer.cudnn_dropout.state
            mine |= {} if drawn is None else {"random_cudnn": drawn.cpu()}
        if trainer.fit_loop._should_accumulate():
            mine["gradients"] = [None if p.grad is None else p.grad.cpu() for p in pl_module.parameters()]
        ranks: list[Any] = [mine]
        if trainer.world_size > 1:
            ranks = [None] * trainer.world_size
            torch.distributed.all_gather_object(ranks, mine)
        checkpoint["ranks"] = ranks
        # Of the steps that were asked for Lightning sees itself that they are done.
        checkpoint["stopping"] = trainer.should_stop and not 0 < trainer.max_steps <= trainer.global_step
        checkpoint["written"] = self._run.written()
        checkpoint["windows_a_step"] = _windows_a_step(trainer)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            path = Path(str(trainer.ckpt_path))
            folder = self._run.begun, path.name, path.stat().st_size if path.exists() else 0
            text = trainer.datamodule.corpus.identity  # type: ignore[attr-defined]
            ranks: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(ranks, (folder, text))
            for rank, (folder, text) in enumerate(ranks):
                if folder != ranks[0][0]:
                    raise RunStopped(
                        f"rank {rank} does not see {self._run.folder} as rank 0 does; it must be on a file system that "
                        "all hosts share"
                    )
                if text != ranks[0][1]:
                    raise RunStopped(f"rank {rank} does not read the text that rank 0 does; give all hosts the same")

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._ranks = checkpoint["ranks"]
            if len(self._ranks) != trainer.world_size:
                self._ranks = _for_other_ranks(checkpoint, trainer)
            trainer.should_stop = checkpoint["stopping"]  # then only the test is left to do

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, CharLM)
        mine = self._ranks[trainer.global_rank] if self._ranks else {}
        if "random_cudnn" in mine:
            pl_module.network.regularizer.begin(pl_module.network.rnn, mine["random_cudnn"])
        if "random" in mine:
            torch.set_rng_state(mine["random"])
        else:  # a fresh run, or one that goes on with another number of devices: each rank draws its own dropout
            torch.manual_seed(torch.initial_seed() + trainer.global_rank + trainer.global_step)
        if not mine:
            return
        if "random_cuda" in mine and pl_module.device.type == "cuda":
            torch.cuda.set_rng_state(mine["random_cuda"], pl_module.device)
        pl_module.carried = _moved(mine["carried"], pl_module.device)
        pl_module.count_on(**mine["counted"])
        for parameter, gradient in zip(pl_module.parameters(), mine.get("gradients", ()), strict=False):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)


class Checkpoints(Checkpoint):
    """Writes last.ckpt behind each validation, and where a signal came; keeps the one before, and the best.

    A signal ends a validation at once. What is saved then is the state that the validation began with, and the run goes
    on with that validation.

    best.ckpt is a second name of last.ckpt's file, given once that is written: whatever the moment in which a run is
    killed, one of the two says all.
    """

    def __init__(self, run: Run, signals: Signals) -> None:
        self._run = run
        self._signals = signals
        self.best_loss = math.inf
        self._best_step: int | None = None
        self._saved_step: int | None = None
        self._validating = False
        self._interrupted: _InterruptedValidation | None = None

    @property
    def best_path(self) -> Path:
        """Where the best checkpoint is.

        Raises:
            RunStopped: there is none.
        """
        if self._best_step is None:
            raise RunStopped(
                "no validation came to a loss that is a number, so that there is no best checkpoint; lower "
                "optimizer.learning_rate, or compute in 32 bits with trainer.precision=32-true"
            )
        return self._run.best_checkpoint

    # --- when -------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._signals.listen()  # Lightning has put a handler of its own in the way
        # Which has the ranks wait for one another in each step, to agree as `Signals` does without waiting.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        self._signals.deferred = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        number = self._signals.agreed(trainer.world_size)
        fetcher = trainer.fit_loop._data_fetcher
        assert fetcher is not None
        if number and not trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher):  # else as the validation starts
            self._save(trainer)
            raise Interrupted(number)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._signals.listen()
        if between_steps(trainer):
            if self._interrupted:
                self._interrupted.is_begun_again()
            self._validating, self._interrupted = True, None
            self._stop_validating(trainer, now=True)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if between_steps(trainer):
            self._stop_validating(trainer)

    def _stop_validating(self, trainer: L.Trainer, now: bool = False) -> None:
        if number := self._signals.agreed(trainer.world_size, now):
            self._save(trainer)
            raise Interrupted(number)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not between_steps(trainer):
            return
        self._validating = False
        loss = float(trainer.callback_metrics["val/loss"])
        if loss < self.best_loss:
            self.best_loss, self._best_step = loss, trainer.global_step
        self._save(trainer)
        if number := self._signals.agreed(trainer.world_size, now=True):
            raise Interrupted(number)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._saved_step != trainer.global_step:  # where nothing was validated
            self._save(trainer)
        self._signals.deferred = False
        if number := self._signals.agreed(trainer.world_size, now=True):
            raise Interrupted(number)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._signals.deferred = False

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._signals.listen()

    # --- how --------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["best"] = {"loss": self.best_loss, "step": self._best_step}
        checkpoint["validating"] = self._validating
        for name, value in checkpoint["state_dict"].items():
            if not bool(torch.isfinite(value).all()):
                raise RunStopped(f"{name} is no longer finite at step {trainer.global_step:,}, so it is not kept")

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._saved_step = checkpoint["global_step"]
        self.best_loss, self._best_step = checkpoint["best"]["loss"], checkpoint["best"]["step"]
        if trainer.is_global_zero and self._best_step is not None:
            if self._best_step == self._saved_step:
                keep_as_best(self._run, Path(str(trainer.ckpt_path)))
            else:
                self._trust_best()
        if checkpoint.get("validating"):
            self._interrupted = _InterruptedValidation(trainer)

    def _trust_best(self) -> None:
        """Believe best.ckpt, which may be of a later validation than the checkpoint that the run goes on from."""
        try:
            best = read_checkpoint(self._run.best_checkpoint)["best"]
            self.best_loss, self._best_step = best["loss"], best["step"]
        except (InputError, KeyError) as error:
            log.warning(f"{error}; the best from here on counts")
            self.best_loss, self._best_step = math.inf, None

    def _save(self, trainer: L.Trainer) -> None:
        last, previous = self._run.last_checkpoint, self._run.previous_checkpoint
        fresh = last.with_name("next.ckpt")
        trainer.save_checkpoint(fresh)
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            if last.exists():
                os.replace(last, previous)
            os.replace(fresh, last)
            flush_folder(last.parent)
            if self._best_step == trainer.global_step:
                keep_as_best(self._run, last)
        trainer.strategy.barrier()


class _InterruptedValidation:
    """Has Lightning begin with the validation in which a run was interrupted.

    By itself it would leave that out and take the next step; and behind the last step it would not begin at all.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        self._trainer, self._loop = trainer, trainer.fit_loop.epoch_loop
        self._stopping, self._max_steps = trainer.should_stop, self._loop.max_steps
        trainer.should_stop, self._loop.max_steps = False, -1
        self._loop.advance = self._take_no_step  # type: ignore[method-assign]
        self._loop._should_check_val_fx = lambda data_fetcher: True  # type: ignore[method-assign]

    def _take_no_step(self, data_fetcher: Any) -> None:
        self._loop.val_loop.restarting = False  # from its first batch on

    def is_begun_again(self) -> None:
        """Let Lightning go on as ever."""
        del self._loop.advance, self._loop._should_check_val_fx
        self._trainer.should_stop, self._loop.max_steps = self._stopping, self._max_steps


def _for_other_ranks(checkpoint: dict[str, Any], trainer: L.Trainer) -> list[dict[str, Any]]:
    """Deal out to this run's ranks what was kept of others', and move its place in the text to fit its steps.

    What each rank gets is not what it would have had: the run goes on, but not as if it had never stopped.
    """
    there, here = checkpoint["windows_a_step"], _windows_a_step(trainer)
    ranks, size = checkpoint["ranks"], trainer.world_size
    log.warning(
        f"begun on {len(ranks)} devices with {there} windows a step, resumes on {size} with {here}"
        + ("" if there == here else f"; data.batch_size={there // size} keeps the steps as they were")
    )
    loop = checkpoint["loops"]["fit_loop"]
    for state in loop["state_dict"].get("combined_loader", ()):
        state["position"] = state["position"] * there // here
        batches = loop["epoch_loop.batch_progress"]["current"]
        ready = batches["ready"]
        for name in batches:  # Lightning's own count of the batches of this epoch
            batches[name] += state["position"] - ready
    loss_sum = sum(rank["counted"]["loss_sum"] for rank in ranks) / len(ranks)
    counted = [{**ranks[0]["counted"], "loss_sum": loss_sum}] * size
    if has_scaler(trainer):  # each rank has counted other steps
        withheld = sum(rank["counted"]["withheld"] for rank in ranks)
        counted = [{**each, "withheld": 0.0 if rank else withheld} for rank, each in enumerate(counted)]
    carried = [rank["carried"] for rank in ranks]
    whole = _interleaved(carried) if there == here and all(state is not None for state in carried) else None
    return [{"carried": _every(whole, rank, size), "counted": counted[rank]} for rank in range(size)]


def _windows_a_step(trainer: L.Trainer) -> int:
    return int(trainer.datamodule.config.batch_size * trainer.world_size)  # type: ignore[attr-defined]


def _interleaved(states: list[Any]) -> State:
    """Return the state of all lanes (L, B * ranks, H), of which rank r of n has every n-th from r on."""
    if isinstance(states[0], tuple):
        return _interleaved([state[0] for state in states]), _interleaved([state[1] for state in states])  # type: ignore[return-value]
    return torch.stack(states, dim=2).flatten(1, 2)


def _every(state: State | None, first: int, step: int) -> State | None:
    """Return the lanes of one rank, (L, B, H)."""
    if isinstance(state, Tensor) or state is None:
        return None if state is None else state[:, first::step].contiguous()
    return state[0][:, first::step].contiguous(), state[1][:, first::step].contiguous()


def keep_as_best(run: Run, checkpoint: Path) -> None:
    """Give the file of `checkpoint` the name of best.ckpt too."""
    if run.best_checkpoint.exists() and os.path.samefile(run.best_checkpoint, checkpoint):
        return
    beside = run.best_checkpoint.with_name("best.ckpt.part")
    beside.unlink(missing_ok=True)
    try:
        os.link(checkpoint, beside)
    except OSError:  # a file system where a file has one name
        shutil.copyfile(checkpoint, beside)
    os.replace(beside, run.best_checkpoint)
    flush_folder(beside.parent)


def _moved(state: State | None, device: torch.device | str) -> State | None:
    if isinstance(state, Tensor) or state is None:
        return None if state is None else state.to(device)
    return state[0].to(device), state[1].to(device)
