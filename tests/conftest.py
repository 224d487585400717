"""What the tests share: a small text, the configuration as Hydra composes it, and the programs as a user runs them."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from charlm.config import DataConfig, SampleConfig, TrainConfig, register

ROOT = Path(__file__).parent.parent
WORDS = ["the", "sea", "and", "a", "hill", "under", "some", "old", "tree", "where", "nobody", "waits", "for", "rain"]


@pytest.fixture(scope="session", autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)  # small networks, and other tests' processes beside


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reaches W&B, whoever runs it."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12,000 characters of made sentences."""
    draw = random.Random(0)
    lines = []
    while sum(map(len, lines)) < 12_000:
        lines.append(" ".join(draw.choices(WORDS, k=7)).capitalize() + ".\n")
    path = tmp_path_factory.mktemp("text") / "sentences.txt"
    path.write_text("".join(lines)[:12_000])
    return path


@pytest.fixture(scope="session")
def composed() -> Iterator[Callable[..., TrainConfig]]:
    """Return a function from overrides to train.py's checked configuration."""
    register()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):

        def config(*overrides: str) -> TrainConfig:
            return TrainConfig.of(compose("train", overrides=list(overrides)))

        yield config


@pytest.fixture(scope="session")
def data_config(composed: Callable[..., TrainConfig]) -> Callable[..., DataConfig]:
    """Return a function from a source and its settings to its checked configuration, with small windows."""
    small = {"window": 10, "batch_size": 4, "eval_lanes": 2}
    defaults = cache(lambda source, *given: composed(f"data={source}", *given).data)

    def config(source: str, **settings: Any) -> DataConfig:
        path_needed = "path: ???" in (ROOT / "conf" / "data" / f"{source}.yaml").read_text()
        needed = ("data.path=given.below",) if path_needed else ()
        return replace(defaults(source, *needed), **small | settings)

    return config


@pytest.fixture(scope="session")
def composed_sample(composed: Callable[..., TrainConfig]) -> Callable[..., SampleConfig]:
    """Return a function from overrides to sample.py's checked configuration."""

    def config(*overrides: str) -> SampleConfig:
        return SampleConfig.of(compose("sample", overrides=list(overrides)))

    return config


@pytest.fixture(scope="session")
def tiny(text_file: Path) -> list[str]:
    """Overrides that train a tiny network on the small text in a second or two."""
    return [
        *("data=text", f"data.path={text_file}", "data.window=20", "data.batch_size=8", "data.eval_lanes=4"),
        *("model.hidden_size=16", "trainer=cpu", "logger=csv", "sampling.length=30", "sampling.temperature=[0.5,1.0]"),
        *("trainer.max_steps=20", "trainer.val_check_interval=10", "trainer.log_every_n_steps=5"),
        "sampling.every_n_steps=10",
    ]


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs train.py or sample.py as a user would, in an empty folder of its own."""

    def run(script: str, *arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / script), *arguments],
            cwd=tmp_path,
            env={**os.environ, **environment},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    return run
