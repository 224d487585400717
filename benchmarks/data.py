"""What encoding, batches and large corpora cost: `python benchmarks/data.py`, a CPU, about three minutes.

Each ratio is of two measurements in the same run, on one core. The text is made from Python's own reference, which
every CPython has, and for Chinese from characters drawn by Zipf's law; `--english FILE` and `--chinese FILE` take
others.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
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

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

MEGABYTE = 10**6
WINDOW, BATCH = 100, 128


def seconds(call: Callable[[], Any], repeats: int = 5) -> float:
    """Return the median duration of a call."""
    durations = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        durations.append(time.perf_counter() - begun)
    return statistics.median(durations)


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

    print("\nEncoding, million characters a second: a dictionary per character, and charlm")
    print(f"{'text':<10}{'symbols':>9}{'[d[c] for c in text]':>24}{'Vocabulary.encode':>20}{'ratio':>9}")
    for name, text in texts.items():
        vocabulary = Vocabulary.of([code_points(text)])
        ids = {symbol: i for i, symbol in enumerate(vocabulary.symbols)}
        assert vocabulary.encode(text).tolist() == [ids[c] for c in text]
        slow = len(text) / seconds(lambda text=text, ids=ids: [ids[c] for c in text]) / 1e6
        fast = len(text) / seconds(lambda text=text, encode=vocabulary.encode: encode(text), 15) / 1e6
        print(f"{name:<10}{len(vocabulary):>9,}{slow:>24.1f}{fast:>20.1f}{fast / slow:>8.1f}x")


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

    print(f"\nBatches of {BATCH} windows of {WINDOW} characters, shuffled: thousand windows a second")
    rates = {}
    for name, number, make in (
        ("Dataset, default collate", 100, lambda: DataLoader(PerItem(), BATCH, shuffle=True)),
        ("charlm", 3000, lambda: ShuffledBatches(block, windows, BATCH, seed=0)),
    ):
        draw(make(), 2)
        rates[name] = number * BATCH / seconds(lambda make=make, number=number: draw(make(), number)) / 1e3
    slow = rates["Dataset, default collate"]
    for name, rate in rates.items():
        print(f"{name:<30}{rate:>10,.0f}{rate / slow:>9.1f}x")


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
    print(f"\nA text of {size / 1e9:.1f} GB beside one of 1 MB: LSTM 128, batch 32, 100 steps behind the first 20")
    print(
        f"{'text':<18}{'prepare MB/s':>14}{'MB/s of CPU time':>18}{'peak MB over imports':>22}{'ms a step':>11}"
        f"{'100 steps, s':>14}{'ratio':>7}"
    )
    small = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for name, length in (("1 MB", MEGABYTE), (f"{size / 1e9:.1f} GB", size), ("the same, cached", size)):
            path = Path(folder) / f"{length}.txt"
            if not path.exists():
                with path.open("w", encoding="utf-8") as file:
                    file.writelines(varied(text, length, random.Random(0)))
            command = [sys.executable, "-W", "ignore", __file__, "--measure", str(path), folder]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            facts = json.loads(output.splitlines()[-1])
            hundred = facts["hundred_steps"]
            small = hundred if name == "1 MB" else small
            print(
                f"{name:<18}{facts['megabytes_a_second']:>14,.0f}{facts['megabytes_a_cpu_second']:>18,.0f}"
                f"{facts['memory']:>22,.0f}{facts['step']:>11.2f}"
                f"{hundred:>14.2f}{hundred / small:>7.2f}",
                flush=True,
            )
        for block_file in Path(folder).rglob("block.bin"):  # one, unless the text was too small to be kept
            from_disk(block_file)


def from_disk(block_file: Path) -> None:
    """Print how long batches take whose windows are not in memory yet, with and without asking for them before."""
    import torch

    from charlm.windows import ShuffledBatches, Windows

    print(f"\nThe first 100 batches of {BATCH} windows of a block on disk of {block_file.stat().st_size / 1e9:.1f} GB")
    print(f"{'':<44}{'ms a batch':>12}")
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
        print(f"{name:<44}{(time.perf_counter() - begun) * 10:>12.2f}", flush=True)
        del batches, block, mapped  # what is mapped cannot be taken out of memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--english", type=Path, help="a text file to encode")
    parser.add_argument("--chinese", type=Path, help="another one")
    parser.add_argument("--size", type=int, default=1_100, help="MB of the large text (default 1100)")
    parser.add_argument("--measure", nargs=2, metavar=("FILE", "CACHE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core, for this process and its children
    if arguments.measure:
        measure(*arguments.measure)
        return
    import torch

    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, one core; Python {platform.python_version()}, ", end="")
    print(f"numpy {np.__version__}, torch {torch.__version__}")
    texts = {
        "English": arguments.english.read_text(encoding="utf-8") if arguments.english else english() * 4,
        "Chinese": arguments.chinese.read_text(encoding="utf-8") if arguments.chinese else chinese(),
    }
    encoding(texts)
    batches(texts["English"])
    large(english(), arguments.size * MEGABYTE)


if __name__ == "__main__":
    main()
