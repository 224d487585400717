"""Steps whose loss or gradient is no finite number: none is taken, and the run stops, or goes on without them.

A step that was taken with such a gradient would leave no weight to go on with. On a GPU the host does not look at each
step, for it would have to wait: the device itself withholds the step and counts, and the host reads the count once an
interval.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from charlm.errors import RunStopped

log = logging.getLogger(__name__)


def clip(parameters: Iterable[nn.Parameter], bound: float | None, algorithm: str | None) -> Tensor:
    """Clip gradients as Lightning does, and return the norm that they had together: a scalar on the device.

    It is finite where every gradient is, and its square in reach of its type.

    Args:
        parameters: whose gradients.
        bound: of their norm, or of each value; None or 0 clips nothing.
        algorithm: "norm", the same as None, or "value".
    """
    parameters = list(parameters)
    if bound and algorithm != "value":
        norm: Tensor = torch.nn.utils.clip_grad_norm_(parameters, bound)
        return norm
    norms = [torch.linalg.vector_norm(p.grad) for p in parameters if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    if bound:
        torch.nn.utils.clip_grad_value_(parameters, bound)
    return norm


def withhold(optimizer: Optimizer, finite: Tensor) -> None:
    """Have the optimizer's next step change nothing where `finite` is false, without asking the device.

    Torch's fused optimizers can do so. Of others the gradient is set to zero: what momentum and weight decay do to the
    weights remains.
    """
    if any(group.get("fused") for group in optimizer.param_groups):
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()  # type: ignore[attr-defined]
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.copy_(torch.where(finite, parameter.grad, 0.0))


def has_scaler(trainer: L.Trainer) -> bool:
    """Return whether a loss scaler leaves out steps: it meets gradients that are not finite as a matter of course."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


class FiniteSteps(L.Callback):
    """Looks at how many steps were withheld: on a CPU after each one, else every `interval` steps and validations.

    Args:
        on_nonfinite: "stop" ends the run at the first; "skip" says so and goes on.
        interval: optimizer steps.
    """

    def __init__(self, on_nonfinite: str, interval: int) -> None:
        self._skips = on_nonfinite == "skip"
        self._interval = interval
        self._known = 0
        self._step = 0  # when it last looked
        self._rate = 0.0

    @property
    def skipped(self) -> int:
        """How many steps were withheld as far as is known."""
        return self._known

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Know of the steps that were left out before; of one that shall stop the run nobody may have known yet."""
        if trainer.state.fn == TrainerFn.FITTING and self._skips:
            counts = [int(rank["counted"]["withheld"]) for rank in checkpoint["ranks"]]
            self._known = sum(counts) if has_scaler(trainer) else counts[0]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._rate = float(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if pl_module.device.type == "cpu" or trainer.global_step % self._interval == 0:
            self._look(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._look(trainer, pl_module)

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        withheld = pl_module.withheld
        assert isinstance(withheld, Tensor)
        if has_scaler(trainer):  # there each rank counts losses of its own
            withheld = trainer.strategy.reduce(withheld, reduce_op="sum")
        count, earlier, first = int(withheld), self._known, self._step + 1
        self._known, self._step = count, trainer.global_step
        if count == earlier:
            return
        where = f"step {first:,}" if first >= self._step else f"a step from {first:,} to {self._step:,}"
        what = f"loss or gradient of {where} is not finite, at a learning rate of {self._rate:.2e}"
        if self._skips:
            log.warning(f"{what}; {count:,} steps left out so far")
        else:
            raise RunStopped(f"{what}; lower optimizer.learning_rate, or leave such steps out with on_nonfinite=skip")
