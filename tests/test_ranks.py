"""Several processes and several hosts: one that dies ends the run, and they train in one folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(what: Path, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 60
    while not what.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in Linux's /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_ends_the_run_with_its_name(rank: int, tiny: list[str], tmp_path: Path) -> None:
    endless = [*tiny, "trainer.devices=2", "trainer.max_steps=1000000", "hydra.run.dir=run"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *endless],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(tmp_path / "run" / "checkpoints" / "last.ckpt", process)
    (other,) = children(process.pid)
    os.kill(process.pid if rank == 0 else other, signal.SIGKILL)
    _, error = process.communicate(timeout=60)  # both hold the pipe: it ends when both have
    line = error.strip().splitlines()[-1]
    if rank == 0:
        assert "the process that started this rank is gone" in line or "lost the connection to another rank" in line
    else:
        assert process.returncode == 1
        assert "rank 1 was killed by SIGKILL; the last good checkpoint is" in line
        assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "failed"
    assert "Traceback" not in error


# --- several hosts ------------------------------------------------------------------------------------------------


@pytest.fixture
def hosts() -> Iterator[list[list[str]]]:
    """Return what to put before a command to run it on each of two hosts: network namespaces with a cable between."""
    names = [f"charlm{os.getpid()}{side}" for side in "ab"]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)

    try:
        ip("netns", "add", names[0])
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"makes no network namespace: {getattr(error, 'stderr', '') or error}")
    try:
        ip("netns", "add", names[1])
        ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        for number, name in enumerate(names, start=1):
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield [["ip", "netns", "exec", name] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def torchrun(hosts: list[list[str]], folder: Path, overrides: list[str]) -> list[subprocess.Popen[str]]:
    begin = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    meet = ["--master-addr=10.77.0.1", "--master-port=29400"]
    several = ["trainer.num_nodes=2", "trainer.devices=1", *overrides]
    return [
        subprocess.Popen(
            [*host, *begin, *meet, f"--node-rank={rank}", str(ROOT / "train.py"), *several],
            cwd=folder,
            env={**os.environ, "GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, host in enumerate(hosts)
    ]


def test_two_hosts_train_and_resume_in_one_folder(hosts: list[list[str]], tiny: list[str], tmp_path: Path) -> None:
    overrides = [*tiny, "data.batch_size=4", "model.dropout=0", "hydra.run.dir=run", "trainer.max_steps=400"]
    first = torchrun(hosts, tmp_path, overrides)
    wait_for(tmp_path / "run" / "checkpoints" / "last.ckpt", first[0])
    first[1].send_signal(signal.SIGTERM)  # to the rank that is not the first
    texts = [process.communicate(timeout=100)[0] for process in first]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "interrupted", texts
    second = torchrun(hosts, tmp_path, overrides)
    texts = [process.communicate(timeout=100)[0] for process in second]
    assert [process.returncode for process in second] == [0, 0], texts
    steps = [line.split(",")[0] for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()]
    assert steps.count("15") == steps.count("395") == 1
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "completed"


WAITS_FOR_EVER = """
import time
from types import SimpleNamespace

import torch

from charlm.ranks import watched

class Communicator:
    def __del__(self):
        time.sleep(1000)

left = Communicator()  # as NCCL's, which is taken down when Python ends
strategy = SimpleNamespace(cluster_environment=None, launcher=None, root_device=torch.device("cuda"))
with watched(SimpleNamespace(world_size=2, num_devices=1, num_nodes=2, strategy=strategy), print):
    raise torch.distributed.DistNetworkError("connection closed by peer")
"""


def test_what_waits_for_a_dead_rank_of_a_gpu_does_not_keep_the_others() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WAITS_FOR_EVER], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "RunStopped: lost the connection to another rank: connection closed by peer" in done.stderr


def test_processes_that_torchrun_starts_must_be_told_their_folder(
    tiny: list[str], program: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = program("train.py", *tiny, TORCHELASTIC_RUN_ID="none", RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "name the run's folder, the same for all, with hydra.run.dir=runs/NAME" in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_job_of_slurm_has_a_folder_that_its_requeue_finds_again(
    tiny: list[str], program: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "train", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"}
    first, again = program("train.py", *tiny, **job), program("train.py", *tiny, **job, SLURM_RESTART_COUNT="1")
    assert (first.returncode, again.returncode) == (0, 0), first.stderr + again.stderr
    assert (tmp_path / "runs" / "slurm-17-0" / "result.json").exists()
    assert "is complete" in again.stdout
