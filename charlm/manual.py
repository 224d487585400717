"""The training step in one piece, by Lightning's manual optimization: for a CPU, where small networks' steps are short.

Around each part of a step (the loss, the pass back, clipping, the optimizer) Lightning asks every callback and the
module whether they have something to add. Nothing of ours has, and the asking takes as long as a thirtieth of a small
network's step.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.optim import Optimizer

from charlm.datamodule import CharDataModule
from charlm.module import CharLM
from charlm.windows import Batch, Starts


def is_plain(trainer: L.Trainer) -> bool:
    """Return whether a step is one batch on the CPU of one process, which `ManualCharLM` can do."""
    return (
        trainer.strategy.root_device.type == "cpu"
        and type(trainer.strategy) is SingleDeviceStrategy
        and trainer.accumulate_grad_batches == 1
        and type(trainer.precision_plugin) in (Precision, MixedPrecision)
    )


class ManualCharLM(CharLM):
    """A `CharLM` that takes its training steps itself.

    It trains as `CharLM` does, to the last bit, and their checkpoints go on with either. Lightning counts the steps,
    but the hooks in the middle of one (`on_before_backward`, `on_before_optimizer_step` and their like) are not called.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False
        self._clip: tuple[float | None, str] = (None, "norm")  # its bound and how

    def take_over(self, trainer: L.Trainer, data: CharDataModule) -> None:
        """Take from `trainer` the clipping of gradients, and from `data` nothing."""
        algorithm = trainer.gradient_clip_algorithm
        self._clip = trainer.gradient_clip_val or None, str(getattr(algorithm, "value", algorithm) or "norm")
        trainer.gradient_clip_val = None

    def on_train_start(self) -> None:
        super().on_train_start()
        self._scheduler = self.trainer.lr_scheduler_configs[0].scheduler

    def training_step(self, batch: Batch | Starts, batch_idx: int) -> None:
        """Train on a batch."""
        optimizer = cast(LightningOptimizer, self.optimizers())
        optimizer._on_before_step()  # here and below Lightning counts
        self._take_step(batch, batch_idx, optimizer.optimizer)
        optimizer._on_after_step()
        self._scheduler.step()  # type: ignore[call-arg]

    training_step.__signature__ = inspect.signature(training_step)  # type: ignore[attr-defined]  # as in CharLM

    def _take_step(self, batch: Batch | Starts, batch_idx: int, optimizer: Optimizer) -> None:
        assert isinstance(batch, Batch)
        optimizer.zero_grad()
        objective = super().training_step(batch, batch_idx)
        assert objective is not None
        with torch.autocast(self.device.type, enabled=False):  # which is for the pass forward alone
            objective.backward()  # type: ignore[no-untyped-call]
        self.configure_gradient_clipping(optimizer, *self._clip)
        optimizer.step()

    # --- checkpoints: as `CharLM` writes and reads them ---------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Count the steps where Lightning counts those of its own optimization."""
        loop = checkpoint["loops"]["fit_loop"]
        done = dict(loop["epoch_loop.manual_optimization.optim_step_progress"]["total"])
        loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"] = done

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on counting the steps of a run, however they were taken."""
        loop = checkpoint["loops"]["fit_loop"]
        done = dict(loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"])
        loop["epoch_loop.manual_optimization.optim_step_progress"]["total"] = done
