"""The network as Lightning trains and scores it: loss, optimizer, schedule, the state carried between batches.

Legend: B batch, T window, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from charlm.datamodule import CharDataModule
from charlm.finite import clip, has_scaler, withhold
from charlm.metrics import bits, bootstrap_standard_error
from charlm.network import CharRNN, State, detached
from charlm.vocabulary import Vocabulary
from charlm.windows import Batch

OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}
_CHANGING = {"_current_fx_name", "carried", "_loss_sum", "_losses", "withheld"}
IGNORED = -100  # a target that cross_entropy passes over


class CharLM(L.LightningModule):
    """A character language model.

    Takes plain values only, so that a checkpoint holds all it needs to be built again and loads without running code.

    Args:
        symbols: the vocabulary, in the order of the ids.
        model: the arguments of `CharRNN` but the vocabulary's size.
        optimizer: `name`, `learning_rate`, `weight_decay` (of matrices only), `schedule`, `warmup_steps`, `decay` and
            `decay_after` (see `schedule`), and what the named torch optimizer takes besides.
        total_steps: optimizer steps that the schedule spans.
        steps_per_epoch: optimizer steps in which training sees the text once; of use to "exponential" alone.
        regularization: the arguments of `Regularizer`.
    """

    def __init__(
        self,
        symbols: Sequence[str],
        model: Mapping[str, Any],
        optimizer: Mapping[str, Any],
        total_steps: int,
        steps_per_epoch: int = 1,
        regularization: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(
            {
                "symbols": list(symbols),
                "model": dict(model),
                "optimizer": dict(optimizer),
                "total_steps": total_steps,
                "steps_per_epoch": steps_per_epoch,
                "regularization": dict(regularization or {}),
            }
        )
        self.vocabulary = Vocabulary(symbols)
        self.network = CharRNN(len(self.vocabulary), **model, regularization=regularization)
        self.carried: State | None = None  # the training state behind the last batch
        # Over the steps since someone last looked, scalars on the device: finite losses, and how many they are.
        self._loss_sum, self._losses = torch.zeros(()), torch.zeros(())
        self.withheld = torch.zeros(())  # steps of the run that were not taken, for they were not finite; see finite.py
        self._evaluated_state: State | None = None
        self._scores: dict[str, list[Tensor]] = {}

    # --- training -------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        """Return the mean loss of a batch, in nats per character."""
        nats, state = self._score(batch, None if batch.fresh else self.carried)
        self.carried = detached(state)
        loss = nats.mean()
        self._count_loss(loss.detach())
        return self.network.regularizer.penalized(loss)

    # Lightning asks for the signature in each step; kept here, it need not be worked out anew.
    training_step.__signature__ = inspect.signature(training_step)  # type: ignore[attr-defined]

    def take_mean_loss(self) -> Tensor:
        """Return the mean loss of the steps since the last call, a scalar on the device; at least one must lie between.

        Whoever makes a number of it waits for the device: once an interval, not each step.
        """
        mean = self._loss_sum / self._losses
        self._loss_sum.zero_()
        self._losses.zero_()
        return mean

    def on_train_start(self) -> None:
        """Have the counts where the losses are."""
        self.count_on(**self.counted())

    def counted(self) -> dict[str, float]:
        """Return what was counted over steps, for a checkpoint."""
        return {"loss_sum": float(self._loss_sum), "losses": float(self._losses), "withheld": float(self.withheld)}

    def count_on(self, loss_sum: float, losses: float, withheld: float) -> None:
        """Go on with what `counted` returned before a run was interrupted."""
        self._loss_sum, self._losses, self.withheld = torch.tensor([loss_sum, losses, withheld], device=self.device)

    def _count_loss(self, loss: Tensor) -> None:
        """Add a loss, if it is finite. With fp16, whose scaler leaves out a step itself, the step is counted here."""
        if loss.device.type == "cpu":  # to look costs less there than to add without a look; and there is no scaler
            if math.isfinite(loss):
                self._loss_sum += loss
                self._losses += 1.0
            return
        finite = torch.isfinite(loss)
        self._loss_sum += torch.where(finite, loss, 0.0)
        self._losses += finite
        if self._leaves_out_steps_itself:
            self.withheld += ~finite

    @property
    def _leaves_out_steps_itself(self) -> bool:
        """Whether a loss scaler does, which meets such gradients as a matter of course."""
        return self._trainer is not None and has_scaler(self.trainer)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient, and withhold the step if it is not finite."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        norm = clip(parameters, gradient_clip_val, gradient_clip_algorithm)
        if self._leaves_out_steps_itself:
            return
        if norm.device.type == "cuda":
            finite = norm.isfinite()
            self.withheld += ~finite
            withhold(optimizer, finite)
        elif not math.isfinite(norm):
            self.withheld += 1
            for parameter in parameters:
                parameter.grad = None

    def _score(self, batch: Batch, state: State | None) -> tuple[Tensor, State]:
        """Return the loss of each character (B, T), 0 where it does not count, and the state behind the last one."""
        ids, targets = batch.tokens[:, :-1].long(), batch.tokens[:, 1:].long()  # (B, T) each
        if batch.lengths is not None:
            column = torch.arange(targets.shape[1], device=targets.device)
            targets = targets.masked_fill(column >= batch.lengths[:, None], IGNORED)
        logits, state = self.network(ids, state)  # (B, T, V)
        nats = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none", ignore_index=IGNORED)
        return nats.view_as(targets), state

    @property
    def optimizer_flags(self) -> dict[str, bool]:
        """How the optimizer does its work, which changes nothing of what it does: torch's `fused`, `capturable`."""
        return {}

    def configure_optimizers(self) -> Any:
        """Return the optimizer, and its schedule by the step."""
        options = dict(self.hparams["optimizer"])
        cls = OPTIMIZERS[options.pop("name")]
        learning_rate, weight_decay = options.pop("learning_rate"), options.pop("weight_decay")
        factor = schedule(
            options.pop("schedule"),
            options.pop("warmup_steps"),
            self.hparams["total_steps"],
            self.hparams["steps_per_epoch"],
            options.pop("decay", 1.0),
            options.pop("decay_after", 0),
        )
        parameters = list(self.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = cls(groups, lr=learning_rate, **options, **self.optimizer_flags)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # --- what Lightning asks around each step, answered shortly, as by the signature above ----------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        """Note what changes in each step, such as the name of the hook that is called, not by way of a parameter."""
        if name in _CHANGING:
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        """Do nothing, without a search for who would."""
        return batch

    def _apply_batch_transfer_handler(self, batch: Any, device: Any = None, dataloader_idx: int = 0) -> Any:
        """Leave a batch, or its starts, where it is to be."""
        if batch[0].device == (device or self.device):
            return batch
        return super()._apply_batch_transfer_handler(batch, device, dataloader_idx)

    # --- validation and test: the whole split in lanes, the state carried from batch to batch -----------------------

    def on_validation_epoch_start(self) -> None:
        self._begin_scoring()

    def on_test_epoch_start(self) -> None:
        self._begin_scoring()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._score_carried(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._score_carried(batch)
        # Beside it, what the same characters cost a network that sees nothing before their window.
        nats, _ = self._score(batch, None)
        self._scores["windowed"].append(nats.sum(dim=1))

    def on_validation_epoch_end(self) -> None:
        nats, _, characters = self._gathered()
        self._report("val", nats.sum() / characters.sum())

    def on_test_epoch_end(self) -> None:
        nats, windowed, characters = self._gathered()
        counts = characters > 0
        error = bootstrap_standard_error(nats[counts], characters[counts])
        self._report(
            "test",
            nats.sum() / characters.sum(),
            loss_standard_error=error,
            bpc_standard_error=bits(error),
            loss_windowed=windowed.sum() / characters.sum(),
        )

    def _begin_scoring(self) -> None:
        self._evaluated_state = None
        self._scores = {"nats": [], "windowed": [], "characters": []}

    def _score_carried(self, batch: Batch) -> None:
        assert batch.lengths is not None
        nats, self._evaluated_state = self._score(batch, None if batch.fresh else self._evaluated_state)
        self._scores["nats"].append(nats.sum(dim=1))  # (B,)
        self._scores["characters"].append(batch.lengths)

    def _gathered(self) -> list[np.ndarray]:
        """Return the loss, the windowed loss and the number of characters of every row of every rank's batches."""
        # Rows are summed in float64: float32 would round a long text's sum.
        gathered = []
        for scores in self._scores.values():
            ranks = [torch.stack(scores) if scores else torch.empty(0)]  # (batches, B), of the same shape on every rank
            if self.trainer.world_size > 1:
                mine = ranks[0].to(self.device)
                ranks = [torch.empty_like(mine) for _ in range(self.trainer.world_size)]
                torch.distributed.all_gather(ranks, mine)
            gathered.append(torch.cat(ranks).double().cpu().numpy().ravel())
        return gathered

    def _report(self, stage: str, loss: float, **more: float) -> None:
        bytes_per_character = self._datamodule.corpus.bytes_per_character[stage]
        values = {"loss": loss, "bpc": bits(loss), "bpb": bits(loss) / bytes_per_character, **more}
        metrics = {f"{stage}/{name}": float(value) for name, value in values.items()}
        if stage == "test" or between_steps(self.trainer):
            self.record(metrics)
        # For checkpointing, early stopping and the caller of the trainer.
        self.log_dict(metrics, logger=False, sync_dist=True)

    def record(self, metrics: Mapping[str, float]) -> None:
        """Write metrics to every tracker, under the number of optimizer steps taken.

        Not through `self.log`, which costs more than a small network's step and numbers steps from 0.
        """
        for logger in self.trainer.loggers:
            logger.log_metrics(dict(metrics), step=self.global_step)

    @property
    def _datamodule(self) -> CharDataModule:
        return cast(CharDataModule, self.trainer.datamodule)  # type: ignore[attr-defined]


def between_steps(trainer: L.Trainer) -> bool:
    """Return whether a validation is one between training steps, not one before them or of a finished run."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def schedule(
    name: str,
    warmup_steps: int,
    total_steps: int,
    steps_per_epoch: int = 1,
    decay: float = 1.0,
    decay_after: int = 0,
) -> Callable[[int], float]:
    """Return the learning rate's factor by optimizer step.

    A linear warm-up over `warmup_steps`, then

    - "constant": 1;
    - "cosine": down to 0 at `total_steps` (Loshchilov and Hutter, "SGDR", 2017, without its restarts);
    - "exponential": times `decay` behind each epoch from number `decay_after` on, as char-rnn.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if name == "constant":
            return 1.0
        if name == "exponential":
            return decay ** max(0, step // steps_per_epoch - max(1, decay_after) + 1)
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor
