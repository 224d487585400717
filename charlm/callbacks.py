"""What happens beside the training: log lines, samples, the last validation."""

from __future__ import annotations

import logging
import math
import time
from contextlib import nullcontext
from typing import Any, NamedTuple

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, TQDMProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only

from charlm.averaging import WeightAverage
from charlm.config import TrainConfig, TrainSamplingConfig
from charlm.console import shown
from charlm.files import append_whole, json_lines
from charlm.finite import FiniteSteps
from charlm.generate import sample_rows
from charlm.metrics import bits
from charlm.module import CharLM, between_steps
from charlm.resume import Checkpoints, ExactResume
from charlm.run import Run
from charlm.signals import Signals
from charlm.text_metrics import TrainingText, measured
from charlm.tracking import WandbTracker

log = logging.getLogger(__name__)


class Callbacks(NamedTuple):
    """A run's callbacks, and those that know the checkpoints and the steps left out."""

    checkpoints: Checkpoints
    finite: FiniteSteps
    all: list[L.Callback]


def build_callbacks(config: TrainConfig, run: Run, signals: Signals, progress_bar: bool) -> Callbacks:
    """Return what shall happen beside the training of a run."""
    checkpoints = Checkpoints(run, signals)
    interval = config.trainer.get("log_every_n_steps") or 50
    training_log, finite = TrainingLog(interval), FiniteSteps(config.on_nonfinite, interval)
    decay = config.weight_average.decay
    average = None if decay is None else WeightAverage(decay)
    callbacks: list[L.Callback] = [
        finite,
        training_log,
        *([average] if average else []),
        FinalValidation(),
        Samples(config.sampling, config.seed, run, average),
        ExactResume(run),
        checkpoints,
    ]
    if config.early_stopping.patience is not None:
        # At each validation, also where one ends an epoch: the checkpoint that is written then knows of it.
        patience = config.early_stopping.patience
        callbacks.append(EarlyStopping("val/loss", patience=patience, check_on_train_epoch_end=False))
    if progress_bar:
        callbacks.append(ProgressBar(training_log))
    return Callbacks(checkpoints, finite, callbacks)


class TrainingLog(L.Callback):
    """Training loss, learning rate and speed, every `trainer.log_every_n_steps` optimizer steps, and a line at each
    validation.

    The losses are read from the device once an interval. The speed is that of training: validation does not count, nor
    does the first step, in which libraries load and graphs are captured.
    """

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self.last: dict[str, float] = {}
        self._step = 0
        self._characters = 0
        self._seconds = 0.0
        self._since = 0.0
        self._rate = 0.0
        self._begun = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        self._begun = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._rate = float(trainer.optimizers[0].param_groups[0]["lr"])  # afterwards it is the next step's

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, CharLM)
        if self._begun:
            self._characters += self._of_a_batch(trainer)
        else:
            self._since = time.perf_counter()
            self._begun = True
        step = trainer.global_step
        if step == self._step or step % self._interval:
            return
        self._step = step
        loss = float(trainer.strategy.reduce(pl_module.take_mean_loss()))  # waits for the device
        now = time.perf_counter()
        seconds = self._seconds + now - self._since
        self.last = {
            "train/loss": loss,
            "train/bpc": bits(loss),
            "learning_rate": self._rate,
            "characters_per_second": self._characters / seconds if self._characters else math.nan,
            "epoch": float(trainer.current_epoch),
        }
        self._characters, self._seconds, self._since = 0, 0.0, now
        pl_module.record(self.last)

    @staticmethod
    def _of_a_batch(trainer: L.Trainer) -> int:
        config = trainer.datamodule.config  # type: ignore[attr-defined]
        return int(config.batch_size * config.window * trainer.world_size)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._begun:  # a run may go on with a validation
            self._seconds += time.perf_counter() - self._since

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = time.perf_counter()
        if not between_steps(trainer):
            return
        val = trainer.callback_metrics
        train = "train {train/loss:.4f}   ".format(**self.last) if self.last else ""
        speed = (
            "   rate {learning_rate:.1e}   {characters_per_second:,.0f} chars/s".format(**self.last)
            if self.last
            else ""
        )
        log.info(
            f"step {trainer.global_step:>6,} of {pl_module.hparams['total_steps']:,}   {train}"
            f"val {val['val/loss']:.4f} nats   {val['val/bpc']:.4f} bpc{speed}"
        )


class ProgressBar(TQDMProgressBar):
    """A bar with the last training loss that was read.

    Not through `self.log(prog_bar=True)`: Lightning would then fetch the value from the device again after every step,
    and the device would run dry between any two.
    """

    def __init__(self, training_log: TrainingLog) -> None:
        super().__init__(refresh_rate=10)
        self._training_log = training_log

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        last = self._training_log.last
        shown = {name: last[f"train/{name}"] for name in ("loss", "bpc") if last}
        return {**super().get_metrics(trainer, pl_module), **shown}


class FinalValidation(L.Callback):
    """Ends a run with a validation, also where its budget is no multiple of the steps or epochs between them.

    What is reported of a run, and kept as its best, must know its last steps.
    """

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last_step = 0 < trainer.max_steps <= trainer.global_step
        last_epoch = trainer.max_epochs is not None and 0 < trainer.max_epochs <= trainer.current_epoch + 1
        if last_step or (last_epoch and trainer.is_last_batch):
            trainer.should_stop = True  # Lightning validates before it stops, ...
            trainer.fit_loop.min_epochs = None  # ... but not before it has done what was asked for at least
            trainer.fit_loop.epoch_loop.min_steps = None
        if trainer.should_stop:
            trainer.check_val_every_n_epoch = None  # in whichever epoch that is


class Samples(L.Callback):
    """Text from the network every `every_n_steps` optimizer steps, greedy and at each temperature.

    And once more at the end, when the test has loaded the best checkpoint; these are measured as well.
    Each sample goes to the console, to samples.jsonl and to every tracker that takes tables.
    """

    def __init__(self, config: TrainSamplingConfig, seed: int, run: Run, average: WeightAverage | None = None) -> None:
        self._config = config
        self._seed = seed
        self._run = run
        self._average = average
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step or step % self._config.every_n_steps or trainer.should_stop:
            return
        self._step = step
        with self._average.in_place(pl_module) if self._average else nullcontext():
            self._write(trainer, pl_module, f"step {step:,}")

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write_last(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:  # instead of a test, where there is no test split
            self._write_last(trainer, pl_module)

    @rank_zero_only
    def _write(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        source: str,
        training_text: TrainingText | None = None,
    ) -> None:
        assert isinstance(pl_module, CharLM)
        network, vocabulary = pl_module.network, pl_module.vocabulary
        config, step = self._config, trainer.global_step
        temperatures = [0.0, *(t for t in config.temperatures if t != 0)]
        rows = sample_rows(network, vocabulary, config, temperatures, self._seed, step)
        if training_text:
            rows = measured(rows, network, vocabulary, training_text)
        append_whole(self._run.samples, json_lines(rows))
        self._show(trainer, rows, source)

    @rank_zero_only
    def _write_last(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write with the best checkpoint, and what was asked for at other settings too."""
        assert isinstance(pl_module, CharLM)
        training_text = TrainingText(trainer.datamodule.corpus)  # type: ignore[attr-defined]
        self._write(trainer, pl_module, "the best checkpoint", training_text)
        network, step = pl_module.network, trainer.global_step
        for rows in self._run.sampled.write(network, pl_module.vocabulary, self._seed, step, training_text):
            self._show(trainer, rows, "the best checkpoint")

    @staticmethod
    def _show(trainer: L.Trainer, rows: list[dict[str, Any]], source: str) -> None:
        log.info(shown(rows, source))
        for logger in trainer.loggers:
            if isinstance(logger, WandbTracker):
                logger.log_samples(rows)
