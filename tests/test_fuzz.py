"""Whatever settings and whatever bytes are given: two steps are trained, or one line says what is wrong.

`FUZZ_CASES=5000 python -m pytest tests/test_fuzz.py` draws more, and other ones each time.
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.errors import HydraException
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf.errors import OmegaConfBaseException

from charlm.config import TrainConfig
from charlm.errors import InputError, RunStopped
from train import train

CASES = int(os.environ.get("FUZZ_CASES", "300"))
SMALL = [
    *("trainer=cpu", "logger=csv", "data.window=8", "data.batch_size=4", "data.eval_lanes=2", "model.hidden_size=4"),
    *("trainer.max_steps=2", "trainer.val_check_interval=2", "sampling.length=3", "sampling.temperature=[1.0]"),
]
# What one line of an error ends with, on the command line with exit code 2 or, under way, 1.
REFUSALS = (InputError, RunStopped, HydraException, OmegaConfBaseException)

HOSTILE = st.sampled_from(
    [
        "null",
        "0",
        "1",
        "2",
        "-1",
        "0.5",
        "1.5",
        "-0.5",
        "nan",
        "inf",
        "true",
        "false",
        "abc",
        "''",
        "[]",
        "[1,2]",
        "{}",
    ]
)
# For settings where most values are refused: some that are not, so that what comes behind is reached.
LIKELY: dict[str, list[str]] = {
    "data.split": ["contiguous", "documents", "stream_tail"],
    "data.order": ["shuffled", "streams"],
    "data.fractions": ["[0.8,0.1,0.1]", "[0.9,0.1,0]", "[0.1,0.8,0.1]", "[0.5,0.5]", "[1,0,0]"],
    "data.separator": ["null", "'<eos>'", "''", "' '"],
    "data.window": ["1", "2", "30", "500", "100000000"],
    "data.stride": ["3", "1000", "100000000"],
    "data.batch_size": ["1", "7", "50", "100000000"],
    "data.eval_lanes": ["1", "9", "100000000"],
    "model.cell": ["lstm", "gru", "rnn"],
    "model.hidden_size": ["1", "3", "9", "100000000"],
    "model.num_layers": ["1", "2", "3", "100000000"],
    "model.embedding_size": ["0", "3", "4", "100000000"],
    "model.parameters": ["500", "2k", "1.2M", "1e30"],
    "optimizer.learning_rate": ["1e-30", "0.1", "1e10", "1e38"],
    "optimizer.schedule": ["cosine", "constant", "exponential"],
    "trainer.precision": ["auto", "32-true", "bf16-mixed", "16-mixed", "64-true", "bf16-true"],
    "trainer.val_check_interval": ["1", "2", "0.5", "1.0", "100"],
    "trainer.check_val_every_n_epoch": ["null", "1", "2"],
    "trainer.max_steps": ["0", "1", "3"],
    "trainer.max_epochs": ["-1", "0", "1", "2"],
    "trainer.accumulate_grad_batches": ["1", "2", "3"],
    "trainer.gradient_clip_val": ["null", "0", "1", "0.001"],
    "trainer.limit_val_batches": ["0", "1", "0.5", "1.0"],
    "trainer.limit_test_batches": ["0", "1", "0.5"],
    "trainer.limit_train_batches": ["0", "1", "2", "0.5"],
    "trainer.overfit_batches": ["0", "1", "0.1"],
    "trainer.num_sanity_val_steps": ["0", "2", "-1"],
    "trainer.log_every_n_steps": ["1", "2", "0"],
    "trainer.fast_dev_run": ["true", "2"],
    "trainer.gradient_clip_algorithm": ["norm", "value"],
    "trainer.deterministic": ["true", "false", "warn"],
    "trainer.detect_anomaly": ["true"],
    "trainer.inference_mode": ["true", "false"],
    "trainer.barebones": ["true"],
    "trainer.min_steps": ["1", "5"],
    "trainer.max_time": ["00:00:00:01", "00:01"],
    "trainer.accelerator": ["cpu", "auto", "gpu", "tpu"],
    "trainer.devices": ["1", "auto", "0", "-1"],
    "trainer.capture": ["auto", "true", "false"],
    "sampling.temperature": ["[0.5,1.0]", "0", "inf", "1e-30", "1e30"],
    "sampling.prompt": ["the", "' '", "Ж"],
    "sampling.on_unknown": ["error", "replace"],
    "sampling.top_k": ["1", "3", "1000"],
    "sampling.top_p": ["0.5", "1.0", "1e-9"],
    "sampling.every_n_steps": ["1", "2"],
    "on_nonfinite": ["stop", "skip"],
}
# Which would reach for other machines or folders, or take for ever as they were told to.
LEFT_OUT = ("logger.", "data.path", "data.cache_dir", "data.source", "sampling.length", "trainer.num_nodes")
LEFT_OUT += ("trainer.strategy", "trainer.plugins", "trainer.profiler")
ONLY_LIKELY = (
    "trainer.devices",
    "trainer.accelerator",
    "trainer.max_steps",
    "trainer.max_epochs",
    "trainer.fast_dev_run",
)


@pytest.fixture(autouse=True)
def _as_a_user_sees_it(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A warning is no error here, and what takes too much memory fails and does not take the machine's."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + 4 * 2**30, hard))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def outcome(composed: Callable[..., TrainConfig], *overrides: str) -> str:
    folder = Path(tempfile.mkdtemp())
    try:
        train(composed(*overrides), folder / "run")
        return "trained"
    except REFUSALS:
        return "refused"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)
        torch.autograd.set_detect_anomaly(False)
        shutil.rmtree(folder)


def names(config: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from names(value, f"{prefix}{name}.")
        elif not f"{prefix}{name}".startswith(LEFT_OUT):
            yield f"{prefix}{name}"


@pytest.mark.timeout(1200)
def test_any_settings_train_or_are_refused(composed: Callable[..., TrainConfig], text_file: Path) -> None:
    base = [*SMALL, "data=text", f"data.path={text_file}"]
    known = sorted({*names(composed(*base).resolved), *LIKELY})
    counts = {"trained": 0, "refused": 0}

    @settings(max_examples=CASES, deadline=None, derandomize=CASES == 300, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def any_settings(data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(known), unique=True, max_size=5))
        groups = [f"{name}={data.draw(st.sampled_from(choices))}" for name, choices in GROUPS.items()]
        given_values = []
        for name in chosen:
            likely = st.sampled_from(LIKELY[name]) if name in LIKELY else HOSTILE
            value = data.draw(likely if name in ONLY_LIKELY else st.one_of(likely, likely, HOSTILE))
            given_values.append(f"{name}={value}")
        counts[outcome(composed, *base, *groups, *given_values)] += 1

    any_settings()
    print(counts)
    assert min(counts.values()) > CASES / 10


GROUPS = {"model": ["lstm", "gru", "rnn"], "optimizer": ["adamw", "adam", "rmsprop", "sgd"]}

BYTES = st.one_of(
    st.binary(max_size=400),
    st.text(max_size=400).map(str.encode),
    st.text(alphabet="ab \n\r\t\0\x1b<>&é\u2028😀", min_size=50, max_size=400).map(str.encode),
    st.builds(lambda text, times: text.encode() * times, st.text(min_size=1, max_size=9), st.integers(1, 200)),
)


@pytest.mark.timeout(1200)
def test_any_bytes_train_or_are_refused(composed: Callable[..., TrainConfig], tmp_path: Path) -> None:
    counts = {"trained": 0, "refused": 0}
    path = tmp_path / "text.txt"

    @settings(max_examples=CASES, deadline=None, derandomize=CASES == 300, suppress_health_check=list(HealthCheck))
    @given(
        content=BYTES,
        encoding=st.sampled_from(["utf-8", "latin-1", "utf-16", "cp1252"]),
        separator=st.sampled_from(["null", "'<eos>'"]),
        order=st.sampled_from(["shuffled", "streams"]),
    )
    def any_bytes(content: bytes, encoding: str, separator: str, order: str) -> None:
        path.write_bytes(content)
        source = ("data=text", f"data.path={path}", f"data.encoding={encoding}", f"data.separator={separator}")
        small = ("data.window=3", "data.batch_size=2", "trainer.max_steps=1", f"data.order={order}")
        counts[outcome(composed, *SMALL, *source, *small)] += 1

    any_bytes()
    print(counts)
    assert min(counts.values()) > CASES / 10
