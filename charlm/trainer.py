"""Lightning's Trainer, with its complaints in one line and its step budget known before it starts."""

from __future__ import annotations

import logging
import math
import os
import platform
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from charlm.capture import CapturedCharLM
from charlm.checkpoint import WholeCheckpoints
from charlm.datamodule import CharDataModule, limited
from charlm.decode_cpu import chosen
from charlm.errors import InputError
from charlm.module import CharLM
from charlm.sources import SPLITS

log = logging.getLogger(__name__)

# `describe` says what Lightning would, and the rest of its notes are advertisements. It sets its level when imported.
for name in ("lightning.pytorch", "lightning.fabric"):
    logging.getLogger(name).setLevel(logging.WARNING)
logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # what trainer.profiler was asked for
# Lightning 2.6 asks torch 2.13 a question in a way that torch is about to retire.
warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
# Ours goes on counting over the end of an epoch.
warnings.filterwarnings(
    "ignore", message=r"The number of training batches \(\d+\) is smaller than the logging interval"
)


def build_trainer(arguments: dict[str, Any], **ours: Any) -> L.Trainer:
    """Return a Trainer made from the user's `arguments` and ours.

    Raises:
        InputError: Lightning refuses the combination, or the machine has no such device.
    """
    arguments = dict(arguments)
    try:
        # Our windows are dealt to the ranks as they are made; Lightning's sampler would deal text out letter by letter.
        plugins = [*_listed(arguments.pop("plugins", None)), WholeCheckpoints()]
        arguments["profiler"] = arguments.get("profiler") or NoProfiler()
        return L.Trainer(**arguments, **ours, plugins=plugins, logger=False, use_distributed_sampler=False)
    except _REFUSALS as error:
        given = ", ".join(f"trainer.{name}={value}" for name, value in arguments.items() if name in _OF_THE_MACHINE)
        raise InputError(f"{' '.join(str(error).split())} (asked for: {given})") from None


class NoProfiler(PassThroughProfiler):
    """Measures nothing, as Lightning's own does, but without a generator for each of the hooks around a step."""

    _nothing = nullcontext("")

    def profile(self, action_name: str) -> AbstractContextManager[str]:  # type: ignore[override]
        return self._nothing


def refuse_ranks_that_cannot_start(trainer: L.Trainer) -> None:
    """Refuse copies of this process, which has parts that none can have, and hosts on which nothing has started it.

    Raises:
        InputError: the trainer would copy it, or wait for other hosts in vain.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise InputError(
            "trainer.strategy copies the process that starts it (spawn, fork); choose trainer.strategy=ddp"
        )
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.num_nodes > 1 and isinstance(environment, LightningEnvironment) and "MASTER_ADDR" not in os.environ:
        raise InputError(
            f"trainer.num_nodes={trainer.num_nodes}: Lightning starts processes on this host alone; start train.py on "
            "each host with torchrun or srun; see README, Several devices and hosts"
        )


def refuse_limits_without_a_batch(trainer: L.Trainer, data: CharDataModule) -> None:
    """Refuse shares of validation or test that are not even one batch, and validations at a batch that no epoch has.

    Raises:
        InputError: there is one.
    """
    interval, batches = trainer.val_check_interval, data.steps_per_epoch(trainer.world_size)
    batches = limited(batches, trainer.limit_train_batches)
    if trainer.check_val_every_n_epoch is not None and isinstance(interval, int) and interval > batches:
        raise InputError(
            f"trainer.val_check_interval={interval} is more than the {batches} batches of an epoch; lower it, or leave "
            "out trainer.check_val_every_n_epoch, so that it counts across epochs"
        )
    for split in ("val", "test"):
        limit, batches = getattr(trainer, f"limit_{split}_batches"), data.evaluation_steps(split)
        if isinstance(limit, float) and limit > 0 and batches and batches * limit < 1:
            raise InputError(
                f"trainer.limit_{split}_batches={limit} of {batches} batches is less than one; make it at least "
                f"{1 / batches:.2g}, or a whole number"
            )


def _listed(value: Any) -> list[Any]:
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def refuse_ranks_in_a_shared_process(trainer: L.Trainer) -> None:
    """Let no job that shares its process with other jobs of a sweep start ranks.

    Lightning starts them by the command of the whole sweep, and leaves its variables behind for the next job.

    Raises:
        InputError: it is such a job.
    """
    shared = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if shared and trainer.world_size > 1 and environment and not environment.creates_processes_externally:
        raise InputError(
            f"trainer.devices={trainer.num_devices} does not go with a launcher whose jobs share a process; sweep with "
            "hydra/launcher=pool, or with trainer.devices=1"
        )


# As Lightning says that it will not have something; the last of an accelerator whose library is not installed.
_REFUSALS = (
    MisconfigurationException,
    ValueError,
    TypeError,
    AttributeError,
    RuntimeError,
    AssertionError,
    ImportError,
)
_OF_THE_MACHINE = ("accelerator", "devices", "strategy", "num_nodes", "precision")


def choose_precision(arguments: Mapping[str, Any], cell: str, hidden_size: int) -> dict[str, Any]:
    """Return the Trainer's arguments with a precision of Lightning's in the place of "auto".

    On CUDA, fp16 with a dynamic loss scaler ("16-mixed", Micikevicius et al., "Mixed precision training", 2018) from
    128 hidden units on: below, cuDNN's fp32 kernels are as fast. Not bfloat16: under its autocast torch runs cuDNN's
    recurrent layers in fp16 all the same, but without the scaler, so that small gradients become 0.

    On a CPU with AMX, bfloat16 ("bf16-mixed") for an LSTM from 64 hidden units on, whose layers oneDNN computes. It
    makes GRUs and plain networks slower, whose steps torch takes one by one, and LSTMs too where a CPU has no more
    for bfloat16 than AVX-512's instructions (BENCHMARKS.md). Elsewhere fp32.
    """
    if arguments.get("precision") != "auto":
        return dict(arguments)
    accelerator = arguments.get("accelerator", "auto")
    precision = "32-true"
    if torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda"):
        if hidden_size >= 128:
            precision = "16-mixed"
    elif accelerator in ("auto", "cpu") and cell == "lstm" and hidden_size >= 64 and has_amx():
        precision = "bf16-mixed"
    return {**arguments, "precision": precision}


def has_amx() -> bool:
    """Return whether the processor multiplies matrices of bfloat16 (Intel's AMX), as far as this torch can tell."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch
    return bool(capabilities.get("amx_bf16", False))


def describe(model: CharLM, data: CharDataModule, trainer: L.Trainer) -> None:
    """Say in two lines what is about to be trained, on what text, and where."""
    corpus, config = data.corpus, data.config
    sizes = " + ".join(f"{corpus.characters(split):,} {split}" for split in SPLITS)
    unseen = sum(corpus.unknown[split] for split in ("val", "test"))
    log.info(
        f"text: {config.source}, {sizes} characters, {len(corpus.vocabulary)} symbols"
        + (", one of them the carriage return of CRLF line ends" if "\r" in corpus.vocabulary.symbols else "")
        + (f"; {unseen:,} characters of val and test are not in the training text" if unseen else "")
    )
    parameters = model.network.size
    captured = isinstance(model, CapturedCharLM)
    rounded = trainer.strategy.root_device.type == "cpu" and chosen(model.network, "auto") == "int8"
    rnn = model.network.rnn
    batch = f"{config.batch_size} x {config.window} characters"
    if trainer.world_size > 1:
        batch += f" on each of {trainer.world_size} devices"
    log.info(
        f"model: {model.hparams['model']['cell']}, {rnn.num_layers} x {rnn.hidden_size}, {parameters:,} parameters; "
        f"{trainer.accelerator.name()}, {trainer.precision}{', the step as one CUDA graph' if captured else ''}"
        f"{', samples with weights=int8' if rounded else ''}; "
        f"{model.hparams['total_steps']:,} steps of {batch}"
    )


def device_name(trainer: L.Trainer) -> str:
    """Return what a run computes on, for its result: figures of two machines are not alike."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        name = f"{platform.machine()} {device.type.upper()}, {threads} thread{'s' if threads > 1 else ''}"
    return name if trainer.world_size == 1 else f"{trainer.world_size} x {name}"


def describe_result(figures: dict[str, float]) -> list[str]:
    """Return what a run came to, and what that stands beside, each in one line."""
    text = f"val {figures['val/loss']:.4f} nats per character"
    if "test/loss" in figures:
        text += (
            "   test {test/loss:.4f} +- {test/loss_standard_error:.4f} nats = {test/bpc:.4f} bits, "
            "{test/bpb:.4f} bits per byte; {test/loss_windowed:.4f} nats without what came before the window"
        ).format(**figures)
    lines = [text]
    if "test/loss_dynamic" in figures:
        lines.append(
            "test {test/loss_dynamic:.4f} nats = {test/bpc_dynamic:.4f} bits, learning while it reads".format(**figures)
        )
    if "baseline/ngram_loss" in figures:
        lines.append(
            "the same text: {baseline/ngram_order:.0f}-gram {baseline/ngram_loss:.4f} nats = {baseline/ngram_bpc:.4f} "
            "bits; xz {baseline/xz_bpc:.2f} bits, given the training text {baseline/xz_given_train_bpc:.2f}; bzip2 "
            "{baseline/bzip2_bpc:.2f}".format(**figures)
        )
    return lines


def epoch_steps(trainer: L.Trainer, batches: int) -> int:
    """Return how many optimizer steps an epoch of `batches` batches is."""
    return math.ceil(limited(batches, trainer.limit_train_batches) / trainer.accumulate_grad_batches)


def step_budget(trainer: L.Trainer, steps_per_epoch: int) -> int:
    """Return how many optimizer steps a run takes at most.

    Computed here, since Lightning's own `estimated_stepping_batches` loses the place of a run that resumes.

    Raises:
        InputError: neither `trainer.max_steps` nor `trainer.max_epochs` sets an end, or an epoch has no steps.
    """
    if not steps_per_epoch:
        raise InputError(
            f"trainer.limit_train_batches={trainer.limit_train_batches} leaves an epoch without a batch; raise it"
        )
    budgets = []
    if trainer.max_steps is not None and trainer.max_steps > 0:
        budgets.append(trainer.max_steps)
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        budgets.append(trainer.max_epochs * steps_per_epoch)
    if not budgets:
        raise InputError("the run would have no end; set trainer.max_steps or trainer.max_epochs above 0")
    return min(budgets)
