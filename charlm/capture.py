"""The whole training step as one CUDA graph: recorded once, then replayed with one call a step.

A small network's step is a thousand kernels of a few microseconds each. Started one by one from Python, the device
waits for most of them; a graph starts them all at once (Gray, "Getting started with CUDA graphs", 2019).

    outside    where the windows begin ---> given        the learning rate ---> rate
    the graph  gather from the block -> forward -> backward -> clip -> optimizer -> sum of losses, carried state

On several devices each rank records its own graph, in which, behind the backward pass, the gradients are averaged over
the ranks (NCCL's kernels are recorded like any other). They travel in one piece: cuDNN gives the gradients of most
networks' recurrent layers at once, so that there is little to send while others are still computed.

A text too large for the device stays in the host's memory; then the windows themselves are given, and none is gathered.

What a replay reads and writes lies in fixed places, so every batch must have one shape, and whatever changes from step
to step is copied into its place before. Random numbers go on from replay to replay: torch advances the generator.

Legend: B batch, T window, L layers, H hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from charlm.datamodule import CharDataModule
from charlm.errors import InputError
from charlm.finite import clip, withhold
from charlm.manual import ManualCharLM
from charlm.module import OPTIMIZERS
from charlm.network import State, parts
from charlm.windows import Batch, Starts, gather

WARM_UP_STEPS = 3  # libraries choose their kernels and take their memory in the first ones
LARGEST_SHARE = 0.25  # of the device's free memory that a text may take


def captures(setting: str | bool, trainer: L.Trainer, optimizer: str) -> bool:
    """Return whether the step of a run shall be a CUDA graph.

    Args:
        setting: `trainer.capture`: "auto" captures where it can, True must, False never does.
        trainer: whose device, precision and accumulation decide.
        optimizer: its name in `OPTIMIZERS`.

    Raises:
        InputError: `setting` is True, but it cannot be.
    """
    if setting is False:
        return False
    obstacle = _obstacle(trainer, optimizer)
    if setting is True and obstacle:
        raise InputError(f"trainer.capture=true is not available: {obstacle}; trainer.capture=auto trains without")
    return not obstacle


def _obstacle(trainer: L.Trainer, optimizer: str) -> str | None:
    device = trainer.strategy.root_device
    if device.type != "cuda":
        return f"it needs a CUDA device, and this run is on {trainer.accelerator.name()}"
    if type(trainer.strategy) not in (SingleDeviceStrategy, DDPStrategy):
        return f"it works on one device or with trainer.strategy=ddp, and this is {type(trainer.strategy).__name__}"
    if trainer.accumulate_grad_batches != 1:
        return f"each step is one batch, and trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}"
    if type(trainer.precision_plugin) not in (Precision, MixedPrecision):
        return f"trainer.precision={trainer.precision} is none of 32-true, 16-mixed and bf16-mixed"
    parameters = inspect.signature(OPTIMIZERS[optimizer]).parameters
    if not set(_FLAGS[optimizer]) <= parameters.keys():
        return f"this torch ({torch.__version__}) cannot capture optimizer={optimizer}"
    if trainer._detect_anomaly:
        return "trainer.detect_anomaly looks at every step"
    return None


def _fits(data: CharDataModule, device: torch.device) -> bool:
    """Return whether the text can lie on a device, beside all else that training needs there."""
    return device.type != "cuda" or data.corpus.block.nbytes <= LARGEST_SHARE * torch.cuda.mem_get_info(device)[0]


# What lets the host stay out of an optimizer's step.
_FLAGS: Mapping[str, dict[str, bool]] = {
    "adam": {"fused": True, "capturable": True},
    "adamw": {"fused": True, "capturable": True},
    "rmsprop": {"capturable": True},
    "sgd": {"fused": True},
}


class CapturedCharLM(ManualCharLM):
    """A `CharLM` whose training step is one CUDA graph.

    It trains as `CharLM` does, up to rounding, and their checkpoints go on with either. Between a small GRU's layers it
    draws other units to drop.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.network.regularizer.recorded = True
        self._replay: Callable[[], None] | None = None

    @property
    def optimizer_flags(self) -> dict[str, bool]:
        return _FLAGS[self.hparams["optimizer"]["name"]]

    def take_over(self, trainer: L.Trainer, data: CharDataModule) -> None:
        """Take from `trainer` the clipping of gradients and their averaging over ranks, and from `data`, where its text
        fits on the device, the gathering of windows into the step.
        """
        super().take_over(trainer, data)
        if isinstance(trainer.strategy, DDPStrategy):
            # DistributedDataParallel would average them too, by hooks of Python's that no graph can hold.
            trainer.strategy.configure_ddp = lambda: None  # type: ignore[method-assign]
        data.resident_on = trainer.strategy.root_device if _fits(data, trainer.strategy.root_device) else None

    # --- recording --------------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Record the step. A run that resumes has its weights, optimizer and random state again by now."""
        super().on_train_start()
        data, config, device = self._datamodule, self._datamodule.config, self.device
        if self.trainer.world_size > 1:
            for parameter in self.parameters():  # as DistributedDataParallel begins
                torch.distributed.broadcast(parameter.data, src=0)
        self._window = config.window
        self._block = data.resident_block() if data.resident_on else None
        if self._block is not None:
            self._given = torch.zeros(config.batch_size, dtype=torch.int64, device=device)  # (B,) where windows begin
        else:
            windows = np.zeros((config.batch_size, config.window + 1), data.corpus.block.dtype)
            self._given = torch.from_numpy(windows).to(device)  # (B, T + 1)
        if config.order == "streams":
            self.carried = self.carried if self.carried is not None else self._zero_state(config.batch_size)
        optimizer = self.trainer.optimizers[0]
        for group in optimizer.param_groups:
            group.update(self.optimizer_flags)  # a checkpoint knows none
        for state in optimizer.state.values():
            if "step" in state:
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=device)
        (self._rate_set,) = {float(group["lr"]) for group in optimizer.param_groups}  # every group has the same
        self._rate = torch.tensor(self._rate_set, device=device)
        for group in optimizer.param_groups:
            group["lr"] = self._rate
        self._replay = self._record(optimizer)
        # The graph has what it needs; to schedule, log and save, the rate is a number as ever.
        for group in optimizer.param_groups:
            group["lr"] = self._rate_set

    def on_fit_end(self) -> None:
        """Let go of the graph: Lightning moves the weights away from where it reads them."""
        self._replay = None

    def _record(self, optimizer: Optimizer) -> Callable[[], None]:
        """Return what replays the step. Weights, optimizer and random state are left as they were."""
        self.network.regularizer.begin(self.network.rnn)
        random = torch.cuda.get_rng_state(self.device)
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self._warm_up(optimizer)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step(optimizer)
        torch.cuda.set_rng_state(random, self.device)
        return graph.replay

    def _zero_state(self, batch_size: int) -> State:
        rnn = self.network.rnn
        shape = (rnn.num_layers, batch_size, rnn.hidden_size)  # (L, B, H)
        parts = [torch.zeros(shape, device=self.device) for _ in range(2 if isinstance(rnn, torch.nn.LSTM) else 1)]
        return (parts[0], parts[1]) if len(parts) == 2 else parts[0]

    def _warm_up(self, optimizer: Optimizer) -> None:
        """Take a few steps, and then everything back: what they leave is kernels chosen and an optimizer with state."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = scaler.state_dict() if scaler else None
        places = [*self.parameters(), *parts(self.carried), self._loss_sum, self._losses, self.withheld]
        drawn = self.network.regularizer.cudnn_dropout.state
        places += [] if drawn is None else [drawn]
        before = [place.detach().clone() for place in places]
        state_before = {
            parameter: {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}
            for parameter, state in optimizer.state.items()
        }
        for _ in range(WARM_UP_STEPS):
            optimizer.zero_grad(set_to_none=True)
            self._step(optimizer)
        optimizer.zero_grad(set_to_none=True)  # the graph is to have gradients of its own
        with torch.no_grad():
            for place, value in zip(places, before, strict=True):
                place.copy_(value)
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    if isinstance(value, Tensor):
                        # Zero is what a fresh optimizer's count, means and momentum begin with.
                        known = state_before.get(parameter, {}).get(name)
                        value.copy_(known) if known is not None else value.zero_()
        if scaler:
            scaler.load_state_dict(scale)

    def _step(self, optimizer: Optimizer) -> None:
        """One training step, without a word to the host."""
        plugin = self.trainer.precision_plugin
        scaler = getattr(plugin, "scaler", None)
        tokens = self._given if self._block is None else gather(self._block, self._given, self._window)
        batch = Batch(tokens, fresh=self.carried is None)
        with plugin.forward_context():
            nats, state = self._score(batch, self.carried)
            loss = nats.mean()
        objective = self.network.regularizer.penalized(loss)
        (scaler.scale(objective) if scaler else objective).backward()
        if self.trainer.world_size > 1:
            average_over_ranks(self.parameters(), self.trainer.world_size)
        if scaler:
            scaler.unscale_(optimizer)
        finite = clip(self.parameters(), *self._clip).isfinite()
        if scaler:  # which leaves out a step of its own accord
            if "fused" in self.optimizer_flags:  # asks the device itself whether a gradient overflowed
                scaler.step(optimizer)
            else:
                _step_unless_overflowed(optimizer, scaler)
            scaler.update()
        else:
            self.withheld += ~finite
            withhold(optimizer, finite)
            optimizer.step()
        with torch.no_grad():
            self._count_loss(loss.detach())
            for place, value in zip(parts(self.carried), parts(state), strict=False):
                place.copy_(value)

    # --- replaying --------------------------------------------------------------------------------------------------

    def _take_step(self, batch: Batch | Starts, batch_idx: int, optimizer: Optimizer) -> None:
        """Train on the windows that begin at the starts given, or on those given themselves."""
        assert self._replay is not None
        self._given.copy_(batch.starts if isinstance(batch, Starts) else batch.tokens)
        if batch.fresh:
            for part in parts(self.carried):
                part.zero_()
        rate = optimizer.param_groups[0]["lr"]
        if rate != self._rate_set:
            self._rate_set = rate
            self._rate.fill_(rate)
        self._replay()

    # --- checkpoints: as `CharLM` writes and reads them ---------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out how the step was done."""
        super().on_save_checkpoint(checkpoint)
        for i, saved in enumerate(checkpoint.get("optimizer_states", ())):
            state = {
                number: {name: value.cpu() if name == "step" else value for name, value in values.items()}
                for number, values in saved["state"].items()
            }
            groups = [{**group, **dict.fromkeys(self.optimizer_flags, False)} for group in saved["param_groups"]]
            checkpoint["optimizer_states"][i] = {**saved, "state": state, "param_groups": groups}


def average_over_ranks(parameters: Iterable[nn.Parameter], ranks: int) -> None:
    """Give each rank the mean of the ranks' gradients in one message, as DistributedDataParallel does in several (Li et
    al., "PyTorch Distributed", 2020).
    """
    given = [(parameter, parameter.grad) for parameter in parameters if parameter.grad is not None]
    whole = torch.cat([gradient.flatten() for _, gradient in given])
    whole /= ranks
    torch.distributed.all_reduce(whole)
    parts = torch.split(whole, [gradient.numel() for _, gradient in given])
    for (parameter, gradient), part in zip(given, parts, strict=True):
        parameter.grad = part.view_as(gradient)


@torch.no_grad()
def _step_unless_overflowed(optimizer: Optimizer, scaler: torch.amp.GradScaler) -> None:
    """Do what `scaler.step` does without asking the host whether to take the step: it is taken, and taken back."""
    (overflowed,) = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values()
    places = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    places += [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    before = [place.clone() for place in places]
    optimizer.step()
    for place, value in zip(places, before, strict=True):
        place.copy_(torch.where(overflowed > 0, value, place))
