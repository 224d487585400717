"""A moving average of the weights, which is what is validated, kept and tested.

Training itself goes on with the weights that it has (Polyak and Juditsky, "Acceleration of stochastic approximation by
averaging", 1992; torch.optim.swa_utils does the sum). Lightning's own callback asks the device after every step whether
it is the first, so that a captured step would wait; this one lets it run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from charlm.module import between_steps

Weights = dict[str, Tensor]


class WeightAverage(L.Callback):
    """Averages the weights exponentially, and puts the average into their place to validate and to save.

    A checkpoint's `state_dict` is the average; what training goes on from lies beside, as `training_weights`.

    Args:
        decay: what the average keeps of itself at each optimizer step. The first steps, which are far from what comes,
            keep less: (1 + n) / (10 + n) at step n, where that is smaller.
    """

    def __init__(self, decay: float) -> None:
        self._decay = decay
        self._average: Weights = {}
        self._training: Weights = {}  # the weights of training, while a validation has the average in their place
        self._step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._average = _moved(self._average, pl_module.device) or _copy(pl_module)
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step:  # gradients are still being gathered
            return
        self._step = step
        update = get_ema_multi_avg_fn(min(self._decay, (1 + step) / (10 + step)))  # type: ignore[no-untyped-call]
        update(list(self._average.values()), [weight.detach() for weight in pl_module.parameters()], step)

    @contextmanager
    def in_place(self, pl_module: L.LightningModule) -> Iterator[None]:
        """Have the module's weights be the average for a while."""
        with _in_place(self._average, pl_module):
            yield

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if between_steps(trainer):
            self._training = _copy(pl_module)
            _write(pl_module, self._average)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if between_steps(trainer):
            _write(pl_module, self._training)
            self._training = {}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            with _in_place(self._training or _copy(pl_module), pl_module):
                checkpoint["training_weights"] = {name: value.clone() for name, value in pl_module.state_dict().items()}
            with self.in_place(pl_module):
                checkpoint["state_dict"] = {name: value.clone() for name, value in pl_module.state_dict().items()}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._average = _copy(pl_module)
            pl_module.load_state_dict(checkpoint["training_weights"])


@contextmanager
def _in_place(weights: Weights, pl_module: L.LightningModule) -> Iterator[None]:
    there = _copy(pl_module)
    _write(pl_module, weights)
    try:
        yield
    finally:
        _write(pl_module, there)


def _copy(pl_module: L.LightningModule) -> Weights:
    return {name: weight.detach().clone() for name, weight in pl_module.named_parameters()}


def _moved(weights: Weights, device: torch.device) -> Weights:
    return {name: weight.to(device) for name, weight in weights.items()}


def _write(pl_module: L.LightningModule, weights: Weights) -> None:
    """Set the weights where they lie: a captured step reads them there."""
    with torch.no_grad():
        for name, weight in pl_module.named_parameters():
            weight.copy_(weights[name])
