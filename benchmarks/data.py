"""What encoding, batches and large corpora cost: `python benchmarks/data.py`, a CPU, about four minutes.

Each ratio is of two measurements in the same run, on one core. The text is made from Python's own reference, which
every CPython has, and for Chinese from characters drawn by Zipf's law; `--english FILE` and `--chinese FILE` take
others.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from measurement import Table, by_turns, machine, on_one_core, ratio, seconds

MEGABYTE = 10**6
WINDOW, BATCH = 100, 128


def english() -> str:
    from pydoc_data.topics import topics

    return "".join(topics[name] for name in sorted(topics))


def chinese() -> str:
    draw = np.random.default_rng(0)
    weight = 1 / np.arange(1, 4_447)
    return "".join(map(chr, 0x4E00 + draw.choice(len(weight), size=900_000, p=weight / weight.sum())))


def varied(text: str, size: int, draw: random.Random) -> Iterator[str]:
    """Yield the lines of a text in ever other orders, `size` characters of them."""
    lines = text.splitlines(keepends=True)
    written = 0
    while written < size:
        draw.shuffle(lines)
        part = "".join(lines)[: size - written]
        written += len(part)
        yield part


def encoding(texts: dict[str, str]) -> None:
    from charlm.vocabulary import Vocabulary, code_points

    print("\nEncoding, million characters a second: a dictionary per character, and charlm\n")
    table = Table("text", "symbols", "[d[c] for c in text]", "charlm", "ratio")
    for name, text in texts.items():
        vocabulary = Vocabulary.of([code_points(text)])
        ids = {symbol: i for i, symbol in enumerate(vocabulary.symbols)}
        assert vocabulary.encode(text).tolist() == [ids[c] for c in text]

        def slow(text: str = text, ids: dict[str, int] = ids) -> float:
            return len(text) / seconds(lambda: [ids[c] for c in text]) / 1e6

        def fast(text: str = text, vocabulary: Vocabulary = vocabulary) -> float:
            return 5 * len(text) / seconds(lambda: [vocabulary.encode(text) for _ in range(5)]) / 1e6

        rates = by_turns({"slow": slow, "fast": fast}, 5)
        medians = [statistics.median(rates[way]) for way in ("slow", "fast")]
        table.row(name, f"{len(vocabulary):,}", *medians, f"{ratio(rates, 'fast', 'slow'):.1f}")


def batches(text: str) -> None:
    import torch
    from torch.utils.data import DataLoader, Dataset

    from charlm.vocabulary import Vocabulary, code_points
    from charlm.windows import ShuffledBatches, Windows

    block = torch.from_numpy(Vocabulary.of([code_points(text)]).encode(text))
    windows = Windows([(0, len(block))], WINDOW)

    class PerItem(Dataset[Any]):
        def __len__(self) -> int:
            return len(block) - WINDOW

        def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
            return block[i : i + WINDOW], block[i + 1 : i + WINDOW + 1]

    def draw(loader: Any, number: int) -> None:
        for k, _ in enumerate(loader, start=1):
            if k == number:
                return

    def rate(make: Callable[[], Any], number: int) -> float:
        return number * BATCH / seconds(lambda: draw(make(), number)) / 1e3

    print(f"\nBatches of {BATCH} windows of {WINDOW} characters, shuffled: thousand windows a second\n")
    rates = by_turns(
        {
            "Dataset, default collate": lambda: rate(lambda: DataLoader(PerItem(), BATCH, shuffle=True), 100),
            "charlm": lambda: rate(lambda: ShuffledBatches(block, windows, BATCH, seed=0), 3000),
        },
        5,
    )
    table = Table("", "thousand windows/s", "ratio")
    for name, values in rates.items():
        table.row(name, statistics.median(values), f"{ratio(rates, name, 'Dataset, default collate'):.1f}")


def measure(path: str, cache: str) -> None:
    """Print what one corpus costs in this process: MB/s to prepare, memory, milliseconds a training step."""
    import lightning as L
    import torch
    from hydra import compose, initialize_config_dir

    from charlm.config import TrainConfig, register

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    from charlm.datamodule import CharDataModule
    from charlm.module import CharLM
    from charlm.network import sized

    torch.set_num_threads(1)
    register()
    with initialize_config_dir(str(Path(__file__).parent.parent / "conf"), version_base="1.3"):
        overrides = ["data=text", f"data.path='{path}'", f"data.cache_dir='{cache}'", "model.hidden_size=128"]
        config = TrainConfig.of(compose("train", overrides=overrides))
    data = CharDataModule(config.data, seed=1)
    begun, begun_of_own = time.perf_counter(), time.process_time()
    data.setup()
    prepared, prepared_of_own = time.perf_counter() - begun, time.process_time() - begun_of_own

    class Clock(L.Callback):
        times: list[float]

        def on_train_start(self, *_: Any) -> None:
            self.times = [time.perf_counter()]

        def on_train_batch_end(self, *_: Any) -> None:
            self.times.append(time.perf_counter())

    from dataclasses import asdict

    clock = Clock()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        accelerator="cpu", max_steps=120, limit_val_batches=0, callbacks=[clock], enable_model_summary=False, **quiet
    )
    vocabulary = data.corpus.vocabulary
    sizes = sized(config.model, len(vocabulary))
    trainer.fit(CharLM(vocabulary.symbols, sizes, asdict(config.optimizer), 120), data)
    now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    steps = np.diff(clock.times)[20:]
    print(
        json.dumps(
            {
                "megabytes_a_second": os.path.getsize(path) / MEGABYTE / prepared,
                "megabytes_a_cpu_second": os.path.getsize(path) / MEGABYTE / prepared_of_own,
                "memory": (now - peak) / 1024,
                "step": float(np.median(steps) * 1e3),
                "hundred_steps": float(steps.sum()),
            }
        )
    )


def large(text: str, size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, length in (("1 MB", MEGABYTE), (f"{size / 1e9:.1f} GB", size)):
            files[name] = Path(folder) / f"{length}.txt"
            with files[name].open("w", encoding="utf-8") as file:
                file.writelines(varied(text, length, random.Random(0)))

        def measured(name: str) -> dict[str, float]:
            command = [sys.executable, "-W", "ignore", __file__, "--measure", str(files[name]), folder]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            facts: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
            return facts

        small, big = files
        print(f"\nPreparing a text of {big}\n")
        table = Table("", "MB/s", "MB/s of its CPU time", "peak MB over imports")
        for name in ("prepared", "found in the cache"):
            facts = measured(big)
            table.row(name, facts["megabytes_a_second"], facts["megabytes_a_cpu_second"], facts["memory"])
        print("\nTraining on it, LSTM 128, batch 32: 100 steps behind the first 20\n")
        steps = by_turns({name: lambda name=name: measured(name)["hundred_steps"] for name in files}, 3)
        table = Table("text", "seconds", "ratio")
        for name, values in steps.items():
            table.row(name, statistics.median(values), f"{ratio(steps, name, small):.2f}")
        for block_file in Path(folder).rglob("block.bin"):  # one, unless the text was too small to be kept
            from_disk(block_file)


def from_disk(block_file: Path) -> None:
    """Print how long batches take whose windows are not in memory yet, with and without asking for them before."""
    import torch

    from charlm.windows import ShuffledBatches, Windows

    size = block_file.stat().st_size
    print(f"\nThe first 100 batches of {BATCH} windows of a block of {size / 1e9:.1f} GB, milliseconds a batch\n")
    table = Table("", "ms a batch")
    for name, in_memory, asks in (
        ("all of it in memory", True, True),
        ("not in memory, each window waited for", False, False),
        ("not in memory, asked for a batch before", False, True),
    ):
        if in_memory:
            block_file.read_bytes()
        else:
            os.sync()
            with block_file.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        mapped = np.memmap(block_file, np.uint8, mode="c")
        block = torch.from_numpy(mapped)
        windows = Windows([(0, len(block))], WINDOW)
        batches = iter(ShuffledBatches(block, windows, BATCH, seed=0, mapped=mapped if asks else None))
        begun = time.perf_counter()
        for _ in range(100):
            next(batches)
        table.row(name, (time.perf_counter() - begun) * 10)
        del batches, block, mapped  # what is mapped cannot be taken out of memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--english", type=Path, help="a text file to encode")
    parser.add_argument("--chinese", type=Path, help="another one")
    parser.add_argument("--size", type=int, default=1_100, help="MB of the large text (default 1100)")
    parser.add_argument("--measure", nargs=2, metavar=("FILE", "CACHE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    on_one_core()
    if arguments.measure:
        measure(*arguments.measure)
        return
    import torch

    torch.set_num_threads(1)
    print(f"{machine('lightning', 'numpy')}; one core")
    texts = {
        "English": arguments.english.read_text(encoding="utf-8") if arguments.english else english() * 4,
        "Chinese": arguments.chinese.read_text(encoding="utf-8") if arguments.chinese else chinese(),
    }
    encoding(texts)
    batches(texts["English"])
    large(english(), arguments.size * MEGABYTE)


if __name__ == "__main__":
    main()
