"""Two GPUs: they train as one with twice the batch, a rank's death ends the run, and one GPU goes on alone."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
Program = Callable[..., subprocess.CompletedProcess[str]]

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
GPUS = ("trainer=auto", "trainer.accelerator=gpu", "sampling.every_n_steps=1000000")
AT_EACH_STEP = ("trainer.max_steps=200", "trainer.val_check_interval=100", "trainer.log_every_n_steps=1")


def losses(run: Path) -> list[float]:
    """Return the training losses of a run, step by step."""
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.mark.parametrize("order", ["shuffled", "streams"])
@pytest.mark.parametrize("captured", ["true", "false"])
def test_two_gpus_train_as_one_with_twice_the_batch(
    tiny: list[str], program: Program, tmp_path: Path, captured: str, order: str
) -> None:
    same = (*tiny, *GPUS, *AT_EACH_STEP, "model=gru", "model.hidden_size=64", "model.dropout=0", f"data.order={order}")
    same = (*same, "trainer.precision=32-true", f"trainer.capture={captured}")
    two = program("train.py", *same, "trainer.devices=2", "data.batch_size=8", "hydra.run.dir=two")
    one = program("train.py", *same, "trainer.devices=1", "data.batch_size=16", "hydra.run.dir=one")
    assert (two.returncode, one.returncode) == (0, 0), two.stderr + one.stderr
    assert ("the step as one CUDA graph" in two.stdout) == (captured == "true")
    assert len(losses(tmp_path / "two")) == 200
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("two", "one")]
    for figure in ("val/loss", "test/loss", "test/loss_windowed"):
        assert results[0][figure] == pytest.approx(results[1][figure], rel=1e-3)


def test_by_default_two_gpus_are_found_and_the_step_is_captured(
    tiny: list[str], program: Program, tmp_path: Path
) -> None:
    done = program("train.py", *tiny, "trainer=auto", GPUS[-1], "model.hidden_size=128", "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    assert "on each of 2 devices" in done.stdout
    assert "16-mixed, the step as one CUDA graph" in done.stdout
    assert json.loads((tmp_path / "run" / "result.json").read_text())["device"].startswith("2 x ")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in Linux's /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_run_and_one_gpu_goes_on(
    tiny: list[str], program: Program, tmp_path: Path, rank: int
) -> None:
    endless = [*tiny, *GPUS, "trainer.max_steps=1000000", "trainer.val_check_interval=200", "hydra.run.dir=run"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *endless, "trainer.devices=2"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    until = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = [int(child) for child in children if b"train.py" in Path(f"/proc/{child}/cmdline").read_bytes()]
    os.kill(process.pid if rank == 0 else ranks[0], signal.SIGKILL)
    _, error = process.communicate(timeout=90)  # both hold the pipe: it ends when both have
    lines = error.strip().splitlines()
    if rank == 0:
        assert "the process that started this rank is gone" in lines[-1] or "lost the connection" in lines[-1], lines
    else:
        assert "rank 1 was killed by SIGKILL" in lines[-1], lines
        assert "Traceback" not in error
    # A run of two resumes on one: here with as many windows a step, so that it is the same training.
    loop = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    steps = loop["global_step"] + 50
    config = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(config.replace("max_steps: 1000000", f"max_steps: {steps}"))
    rest = [*tiny, *GPUS, f"trainer.max_steps={steps}", "trainer.val_check_interval=200", "hydra.run.dir=run"]
    done = program("train.py", *rest, "trainer.devices=1", "data.batch_size=16")
    assert done.returncode == 0, done.stderr
    assert "begun on 2 devices with 16 windows a step, resumes on 1 with 16" in done.stdout + done.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "completed"


def test_the_jobs_of_a_sweep_share_two_gpus(tiny: list[str], program: Program, tmp_path: Path) -> None:
    sizes = "model.hidden_size=16,24,32,40"
    done = program("train.py", "-m", *tiny, *GPUS, sizes, "trainer.max_steps=20", "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    results = [json.loads(path.read_text()) for path in (tmp_path / "sweep").glob("*/result.json")]
    assert [result["status"] for result in results] == ["completed"] * 4
    assert not any(result["device"].startswith("2 x") for result in results)
