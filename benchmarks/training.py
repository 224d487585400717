"""Training speed of charlm beside its references: `python benchmarks/training.py`, on a GPU where there is one.

On CUDA each network is trained four ways, in one run and at one precision:

    bare graph    a loop that replays one CUDA graph of the step, with nothing around it
    charlm        `Trainer.fit` with the captured step and charlm's own log
    bare eager    a loop over the same step, kernel by kernel
    L. eager      `Trainer.fit` without capture

and on a CPU charlm beside the bare eager loop, and beside that loop at 32 bits. Every figure is the median of several
short runs by turns; the ratios are medians of those in each turn, so that what slows the machine for a while slows both
sides. See BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra import compose, initialize_config_dir
from measurement import ROOT, Table, by_turns, machine, ratio

from charlm.callbacks import TrainingLog
from charlm.capture import CapturedCharLM
from charlm.config import TrainConfig, register
from charlm.datamodule import CharDataModule
from charlm.manual import ManualCharLM
from charlm.module import CharLM
from charlm.network import detached, sized
from charlm.trainer import build_trainer, choose_precision
from charlm.windows import Batch

SIZES = ((64, 1), (128, 1), (128, 2), (256, 2), (512, 2))  # hidden units, layers
CUDA_CASES = [  # cell, hidden units, layers, batch, order of the windows
    *((cell, h, n, 128, "shuffled") for cell in ("lstm", "gru") for h, n in SIZES),
    *((cell, h, n, 512, "shuffled") for cell in ("lstm", "gru") for h, n in SIZES[2:]),
    *(("lstm", h, n, 128, "streams") for h, n in SIZES[:3]),
]
CPU_CASES = [
    *(("lstm", h, n, batch, "shuffled") for h, n, batch in ((64, 1, 64), (128, 1, 32), (256, 1, 32), (512, 2, 32))),
    ("gru", 128, 1, 64, "shuffled"),
    ("lstm", 128, 1, 32, "streams"),
]


class Clock(L.Callback):
    """The seconds that `steps` steps take behind the first `skip`."""

    def __init__(self, skip: int, steps: int) -> None:
        self._ends = (skip, skip + steps)
        self._begun = self.seconds = 0.0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step in self._ends:
            synchronize()
            self.seconds, self._begun = time.perf_counter() - self._begun, time.perf_counter()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def composed(*overrides: str) -> TrainConfig:
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return TrainConfig.of(compose("train", overrides=list(overrides)))


def by_lightning(config: TrainConfig, build: type[CharLM], skip: int, steps: int) -> float:
    """Return the seconds that `Trainer.fit` takes for a step."""
    data, trainer, model, clock = parts(config, build, skip, steps)
    trainer.fit(model, data)
    return clock.seconds / steps


def parts(
    config: TrainConfig, build: type[CharLM], skip: int, steps: int
) -> tuple[CharDataModule, L.Trainer, CharLM, Clock]:
    L.seed_everything(config.seed, verbose=False)
    data = CharDataModule(config.data, config.seed)
    data.setup()
    clock = Clock(skip, steps)
    vocabulary = data.corpus.vocabulary
    sizes = sized(config.model, len(vocabulary))
    arguments = choose_precision(config.trainer, sizes["cell"], sizes["hidden_size"]) | {
        "max_steps": skip + steps,
        "val_check_interval": 10**9,
        "limit_val_batches": 0,
        "enable_progress_bar": False,
    }
    trainer = build_trainer(
        arguments,
        callbacks=[TrainingLog(50), clock],
        default_root_dir=tempfile.gettempdir(),
        enable_checkpointing=False,
    )
    model = build(
        vocabulary.symbols,
        sizes,
        asdict(config.optimizer),
        skip + steps,
        regularization=asdict(config.regularization),
    )
    if isinstance(model, ManualCharLM):
        model.take_over(trainer, data)
    return data, trainer, model, clock


def endless(data: CharDataModule) -> Iterator[Any]:
    """Yield the batches of epoch after epoch."""
    batches = data._train_batches(0, 1)
    while True:
        yield from batches


class BareEager(CharLM):
    """Trains by a loop of its own, within the first step that Lightning asks of it: the same network, data, optimizer,
    precision and schedule, and nothing of Lightning in between.
    """

    skip = steps = 0
    seconds = 0.0

    def on_train_start(self) -> None:
        trainer, data = self.trainer, self._datamodule
        optimizer, scheduler = trainer.optimizers[0], trainer.lr_scheduler_configs[0].scheduler
        plugin, clip = trainer.precision_plugin, trainer.gradient_clip_val
        scaler = getattr(plugin, "scaler", None)
        batches, state = endless(data), None
        for step in range(self.skip + self.steps):
            if step == self.skip:
                synchronize()
                begun = time.perf_counter()
            batch = next(batches)
            batch = Batch(batch.tokens.to(self.device), batch.fresh)
            optimizer.zero_grad(set_to_none=True)
            with plugin.forward_context():
                nats, state = self._score(batch, None if batch.fresh else state)
                loss = nats.mean()
            state = detached(state)
            (scaler.scale(loss) if scaler else loss).backward()
            if scaler:
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters(), clip)
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
            scheduler.step()
        synchronize()
        type(self).seconds = time.perf_counter() - begun
        trainer.should_stop = True
        trainer.fit_loop.epoch_loop.max_steps = 1


class BareGraph(CapturedCharLM):
    """The same for the captured step: nothing but replays, each for other windows."""

    skip = steps = 0
    seconds = 0.0

    def on_train_start(self) -> None:
        super().on_train_start()
        assert self._replay is not None
        batches = endless(self._datamodule)
        for step in range(self.skip + self.steps):
            if step == self.skip:
                synchronize()
                begun = time.perf_counter()
            batch = next(batches)
            self._given.copy_(batch.starts)
            if batch.fresh and self.carried is not None:
                for part in self.carried if isinstance(self.carried, tuple) else (self.carried,):
                    part.zero_()
            self._replay()
        synchronize()
        type(self).seconds = time.perf_counter() - begun
        self.trainer.fit_loop.epoch_loop.max_steps = 1


def bare(build: type[Any]) -> Callable[[TrainConfig, int, int], float]:
    def measure(config: TrainConfig, skip: int, steps: int) -> float:
        build.skip, build.steps = skip, steps
        data, trainer, model, _ = parts(config, build, skip, steps)
        trainer.fit(model, data)
        return float(build.seconds) / steps

    return measure


def in_32_bits(config: TrainConfig) -> TrainConfig:
    return replace(config, trainer={**config.trainer, "precision": "32-true"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=None, help="steps of a run (default: 400 on CUDA, 20 on a CPU)")
    parser.add_argument("--runs", type=int, default=None, help="runs of each way (default: 3 on CUDA, 15 on a CPU)")
    parser.add_argument("--cases", nargs="*", help="only these, as lstm-128x2-512")
    parser.add_argument("--override", nargs="*", default=[], help="settings of train.py, such as data=text data.path=F")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    given = parser.parse_args()
    # Lightning's own handler takes a note, which the bare loops never read; one that is there before it is called too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    cuda = torch.cuda.is_available()
    steps, runs = given.steps or (400 if cuda else 20), given.runs or (3 if cuda else 15)
    ways: dict[str, Callable[[TrainConfig, int, int], float]] = {
        "bare eager": bare(BareEager),
        "L. eager": lambda config, skip, steps: by_lightning(config, CharLM, skip, steps),
    }
    if cuda:
        ways = {
            "bare graph": bare(BareGraph),
            "charlm": lambda config, skip, steps: by_lightning(config, CapturedCharLM, skip, steps),
            **ways,
        }
    else:
        del ways["L. eager"]
        ways["charlm"] = lambda config, skip, steps: by_lightning(config, ManualCharLM, skip, steps)
        ways["bare, 32-true"] = lambda config, skip, steps: ways["bare eager"](in_32_bits(config), skip, steps)
    where = machine("lightning")
    print(where)
    print(f"window 100, {runs} runs of {steps} steps; millions of characters a second")
    pairs = ("bare graph", "L. eager") if cuda else ("bare eager", "bare, 32-true")
    ratios = [("charlm", second) for second in pairs]
    table = Table("network, batch", "precision", *ways, *(f"{first} / {second}" for first, second in ratios))
    rows = []
    for cell, hidden, layers, batch, order in CUDA_CASES if cuda else CPU_CASES:
        name = f"{cell}-{hidden}x{layers}-{batch}" + ("-streams" if order == "streams" else "")
        if given.cases and name not in given.cases:
            continue
        config = composed(
            f"model={cell}",
            f"model.hidden_size={hidden}",
            f"model.num_layers={layers}",
            f"data.batch_size={batch}",
            f"data.order={order}",
            "logger=csv",
            *given.override,
        )

        def rate(way: str, config: TrainConfig, batch: int) -> float:
            fewer = max(40, steps // 5) if "eager" in way and cuda else steps
            return batch * config.data.window / ways[way](config, 10, fewer) / 1e6

        rates = by_turns({way: partial(rate, way, config, batch) for way in ways}, runs)
        precision = choose_precision(config.trainer, config.model.cell, config.model.hidden_size)["precision"]
        table.row(
            name,
            precision,
            *(statistics.median(values) for values in rates.values()),
            *(f"{ratio(rates, first, second):.2f}" for first, second in ratios),
        )
        rows.append({"case": name, "precision": precision, "rates": rates})
    if given.json:
        given.json.write_text(json.dumps({"where": where, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
