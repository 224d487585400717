"""Train a character language model: `python train.py`, `python train.py model=gru trainer.devices=2`, `--help`."""

from __future__ import annotations

import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from charlm import commandline
from charlm.config import EvaluationConfig, TrainConfig, register

if TYPE_CHECKING:
    import torch

    from charlm.datamodule import CharDataModule
    from charlm.module import CharLM
    from charlm.run import Run

log = logging.getLogger("charlm")


def train(config: TrainConfig, folder: Path) -> float:
    """Train, test and sample one model; go on with what `folder` holds of it.

    Where all is done, only write what other sampling settings give.

    Args:
        config: what to train on what, and how.
        folder: where the run is kept; see charlm/run.py.

    Returns:
        The lowest validation loss, in nats per character.

    Raises:
        InputError: something in the configuration cannot work. Nothing is written then.
        RunStopped: under way; what is kept stays good.
        Interrupted: by a signal; the same command goes on.
    """
    # Here, so that --help and a mistyped setting are answered without waiting for torch.
    with commandline.importing():
        import lightning as L
        from lightning.pytorch.utilities import rank_zero_only
        from tqdm.contrib.logging import logging_redirect_tqdm

        from charlm.callbacks import build_callbacks
        from charlm.capture import CapturedCharLM, captures
        from charlm.datamodule import CharDataModule
        from charlm.generate import prompt_ids
        from charlm.manual import ManualCharLM, is_plain
        from charlm.memory import refuse_too_large, within_memory
        from charlm.module import CharLM
        from charlm.network import sized
        from charlm.ranks import watched
        from charlm.resume import find_resumable
        from charlm.run import Run
        from charlm.signals import Signals
        from charlm.tracking import tracked
        from charlm.trainer import (
            build_trainer,
            choose_precision,
            describe,
            describe_result,
            device_name,
            epoch_steps,
            refuse_limits_without_a_batch,
            refuse_ranks_in_a_shared_process,
            refuse_ranks_that_cannot_start,
            step_budget,
        )

    if rank_zero_only.rank != 0:
        log.setLevel(logging.ERROR)  # the first rank speaks for all
    run = Run(folder, config.resolved)
    if run.completed:
        return write_again(config, run)

    L.seed_everything(config.seed, verbose=False)
    data = CharDataModule(config.data, config.seed)
    data.setup()
    vocabulary = data.corpus.vocabulary
    for sampling in (asdict(config.sampling), *run.sampled.asked()):  # refused now, not at the first sample
        prompt_ids(vocabulary, sampling["prompt"], sampling["on_unknown"], "sampling.")
    sizes = sized(config.model, len(vocabulary))
    refuse_too_large(len(vocabulary), sizes)
    arguments = choose_precision(config.trainer, sizes["cell"], sizes["hidden_size"])
    arguments.setdefault("enable_progress_bar", sys.stdout.isatty())
    signals = Signals()
    callbacks = build_callbacks(config, run, signals, progress_bar=arguments["enable_progress_bar"])
    trainer = build_trainer(arguments, callbacks=callbacks.all, default_root_dir=folder)
    refuse_ranks_that_cannot_start(trainer)
    refuse_limits_without_a_batch(trainer, data)
    refuse_ranks_in_a_shared_process(trainer)
    steps_per_epoch = epoch_steps(trainer, data.steps_per_epoch(trainer.world_size))
    total_steps = step_budget(trainer, steps_per_epoch)
    captured = captures(config.capture, trainer, config.optimizer.name)
    build = CapturedCharLM if captured else ManualCharLM if is_plain(trainer) else CharLM
    model = build(
        vocabulary.symbols,
        sizes,
        asdict(config.optimizer),
        total_steps,
        steps_per_epoch,
        asdict(config.regularization),
    )
    trainer.precision_plugin.convert_module(model)  # now, so that a checkpoint is read into weights of that type
    if isinstance(model, ManualCharLM):
        model.take_over(trainer, data)
    describe(model, data, trainer)

    with run.claimed(), signals:
        if run.completed:  # by the process that it waited for
            return write_again(config, run)
        checkpoint, content = find_resumable(run, model, data, trainer.world_size)
        run.begin(data.corpus, content.get("written", {}))
        if checkpoint:
            log.info(f"going on from step {content['global_step']:,} of {total_steps:,}, by {checkpoint}")
        with tracked(trainer, config, run):
            # Log lines come above the progress bar, not through it.
            memory = within_memory(model, data, trainer.strategy.root_device)
            with watched(trainer, run.stopped), memory, logging_redirect_tqdm():
                trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
                judge = trainer.test if data.corpus.characters("test") else trainer.validate
                judge(model, data, callbacks.checkpoints.best_path, verbose=False, weights_only=True)
            figures = {
                name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("test/")
            }
            figures["val/loss"] = callbacks.checkpoints.best_loss
            figures |= {"skipped_steps": callbacks.finite.skipped} if callbacks.finite.skipped else {}
            if "test/loss" in figures and trainer.is_global_zero:
                figures |= beside_the_test(config.evaluation, model, data, trainer.strategy.root_device)
            unseen = {f"{split}/unseen_characters": data.corpus.unknown[split] for split in ("val", "test")}
            sized_as = {"hidden_size": sizes["hidden_size"], "parameters": model.network.size}
            computed = {"device": device_name(trainer), "precision": str(trainer.precision)}
            run.complete({**figures, **unseen, **sized_as, **computed})
    for line in describe_result(figures):
        log.info(line)
    log.info(f"kept in {folder}; write text with `python sample.py checkpoint={folder}`")
    return figures["val/loss"]


def beside_the_test(
    config: EvaluationConfig, model: CharLM, data: CharDataModule, device: torch.device
) -> dict[str, float]:
    """Return what the test figure stands beside: a copy that learns as it reads, compressors and an n-gram model."""
    from charlm.baselines import baselines
    from charlm.dynamic import dynamic_loss
    from charlm.metrics import bits

    figures: dict[str, float] = {}
    if config.dynamic:
        loss = dynamic_loss(model.network, data.corpus, config, device)
        figures |= {"test/loss_dynamic": loss, "test/bpc_dynamic": bits(loss)}
    if data.corpus.characters("train") + data.corpus.characters("test") <= config.baselines_up_to:
        figures |= baselines(data.corpus, config.ngram_order)
    return figures


def write_again(config: TrainConfig, run: Run) -> float:
    """Have a finished training write with the sampling settings that are new to it, those that a sweep asked for too.

    Returns:
        Its lowest validation loss.

    Raises:
        InputError: its text is another one by now.
    """
    from charlm.checkpoint import open_checkpoint
    from charlm.console import shown
    from charlm.provenance import confirm_text, find_text
    from charlm.sampled import drawn_with
    from charlm.text_metrics import TrainingText

    corpus = find_text(config.data)
    text = TrainingText(corpus) if corpus and confirm_text(run.folder, corpus.identity) else None
    loss = float(run.result["val/loss"])
    log.info(f"{run.folder} is complete, val {loss:.4f} nats; to train anew, choose another folder")
    sampling = asdict(config.sampling)
    if drawn_with(sampling) != run.sampled.own() and not run.sampled.holds(sampling):
        run.sampled.ask([sampling, *run.sampled.asked()])
    if any(run.sampled.asked()):
        model = open_checkpoint(run.best_checkpoint)
        if text is None:
            log.warning("copies and real words are not measured, which takes the training text")
        for rows in run.sampled.write(model.network, model.vocabulary, config.seed, run.last_step, text):
            log.info(shown(rows, "the best checkpoint"))
        log.info(f"kept in {run.folder / 'sampled'}")
    return loss


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(cfg: DictConfig) -> float:
    with commandline.job() as folder:
        return train(TrainConfig.of(cfg), folder)


if __name__ == "__main__":
    register()
    files = ("data.path", "data.cache_dir", "hydra.run.dir", "hydra.sweep.dir")
    commandline.run(main, text_keys=(*files, "data.separator", "data.delimiter", "sampling.prompt"))
