"""Training speed of charlm beside its references: `python benchmarks/training.py`, on a GPU where there is one.

On CUDA each network is trained four ways, in one run and at one precision:

    bare graph    a loop that replays one CUDA graph of the step, with nothing around it
    charlm        `Trainer.fit` with the captured step and charlm's own log
    bare eager    a loop over the same step, kernel by kernel
    L. eager      `Trainer.fit` without capture

and on a CPU charlm beside the bare eager loop. Every figure is the median of several runs of the same number of steps;
the ratios are of medians. See BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import lightning as L
import torch
from hydra import compose, initialize_config_dir

from charlm.callbacks import TrainingLog
from charlm.capture import CapturedCharLM
from charlm.config import TrainConfig, register
from charlm.datamodule import CharDataModule
from charlm.module import CharLM
from charlm.network import sized
from charlm.trainer import build_trainer, choose_precision
from charlm.windows import Batch

CUDA_CASES = [  # cell, hidden units, layers, batch
    *((cell, h, n, 128) for cell in ("lstm", "gru") for h, n in ((64, 1), (128, 1), (128, 2), (256, 2), (512, 2))),
    *((cell, h, n, 512) for cell in ("lstm", "gru") for h, n in ((128, 2), (256, 2), (512, 2))),
]
CPU_CASES = [("lstm", 64, 1, 64), ("lstm", 256, 1, 32), ("gru", 128, 1, 64)]


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
    with initialize_config_dir(str(Path(__file__).parent.parent / "conf"), version_base="1.3"):
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
    arguments = choose_precision(config.trainer, sizes["hidden_size"]) | {
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
    model = build(vocabulary.symbols, sizes, asdict(config.optimizer), skip + steps)
    if isinstance(model, CapturedCharLM):
        model.take_over(trainer, data)
    return data, trainer, model, clock


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
        batches = iter(data._train_batches(0, 1))
        for step in range(self.skip + self.steps):
            if step == self.skip:
                synchronize()
                begun = time.perf_counter()
            batch = next(batches)
            batch = Batch(batch.tokens.to(self.device), batch.fresh)
            optimizer.zero_grad(set_to_none=True)
            with plugin.forward_context():
                nats, _ = self._score(batch, None)
                loss = nats.mean()
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
        batches = iter(self._datamodule._train_batches(0, 1))
        for step in range(self.skip + self.steps):
            if step == self.skip:
                synchronize()
                begun = time.perf_counter()
            self._given.copy_(next(batches).starts)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=None, help="steps of a run (default: 400 on CUDA, 40 on a CPU)")
    parser.add_argument("--runs", type=int, default=3, help="runs, of which the median counts")
    parser.add_argument("--cases", nargs="*", help="only these, as lstm-128x2-512")
    parser.add_argument("--override", nargs="*", default=[], help="settings of train.py, such as data=text data.path=F")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    given = parser.parse_args()
    cuda = torch.cuda.is_available()
    steps = given.steps or (400 if cuda else 40)
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
        ways["charlm"] = ways.pop("L. eager")
    where = torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{where}; torch {torch.__version__}, lightning {L.__version__}, Python {platform.python_version()}")
    print(f"window 100, {given.runs} runs of {steps} steps; millions of characters a second")
    head = f"{'':16}{'precision':>10}" + "".join(f"{name:>12}" for name in ways)
    ratios = (("charlm", "bare graph"), ("charlm", "L. eager")) if cuda else (("charlm", "bare eager"),)
    print(head + "".join(f"{a + ' / ' + b:>22}" for a, b in ratios))
    rows = []
    for cell, hidden, layers, batch in CUDA_CASES if cuda else CPU_CASES:
        name = f"{cell}-{hidden}x{layers}-{batch}"
        if given.cases and name not in given.cases:
            continue
        config = composed(
            f"model={cell}",
            f"model.hidden_size={hidden}",
            f"model.num_layers={layers}",
            f"data.batch_size={batch}",
            "logger=none",
            *given.override,
        )
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(given.runs):
            for way, measure in ways.items():  # by turns, so that what drifts drifts for all
                eager = "eager" in way and cuda
                taken = measure(config, 10, max(40, steps // 5) if eager else steps)
                rates[way].append(batch * config.data.window / taken / 1e6)
        medians = {way: statistics.median(values) for way, values in rates.items()}
        precision = choose_precision(config.trainer, hidden)["precision"]
        line = f"{name:16}{precision:>10}" + "".join(f"{value:12.3f}" for value in medians.values())
        print(line + "".join(f"{medians[a] / medians[b]:22.2f}" for a, b in ratios), flush=True)
        rows.append({"case": name, "precision": precision, "rates": rates})
    if given.json:
        given.json.write_text(json.dumps({"where": where, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
