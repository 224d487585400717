"""What is promised of a run that is killed, interrupted, or runs out of disk."""

from __future__ import annotations

import csv
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from lives import (
    Both,
    KillAtFileEvent,
    KillWhileWriting,
    OutOfMemory,
    Poison,
    SignalAt,
    begin,
    begin_ranks,
    kill_after,
    live,
    outcome,
    same,
)

from charlm.checkpoint import read_checkpoint
from charlm.config import TrainConfig
from charlm.errors import InputError
from train import train

COMBINATIONS = [(cell, order) for cell in ("lstm", "gru", "rnn") for order in ("shuffled", "streams")]


@pytest.fixture(scope="module")
def small(tiny: list[str]) -> list[str]:
    """Overrides of a run with dropout whose steps are no multiple of any interval."""
    kept = [override for override in tiny if not override.startswith("trainer.max_steps")]
    return [*kept, "model.dropout=0.3", "model.num_layers=2", "trainer.max_steps=23"]


@pytest.fixture(scope="module")
def undisturbed(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, float]]:
    """Return a function from overrides to what a run comes to that nothing happens to, and how long it lives."""
    folder, known = tmp_path_factory.mktemp("undisturbed"), dict[tuple[str, ...], tuple[Any, float]]()

    def find(*overrides: str) -> tuple[Any, float]:
        if overrides not in known:
            where = folder / str(len(known))
            if not known:
                live(folder / "warm", small)  # the first process of all waits for the imports
            begun = time.monotonic()
            assert live(where, [*small, *overrides]) == 0, where.with_suffix(".log").read_text()
            known[overrides] = outcome(where), time.monotonic() - begun
        return known[overrides]

    return find


def settings(cell: str, order: str) -> tuple[str, ...]:
    return f"model={cell}", f"data.order={order}"


@pytest.mark.parametrize("moment", range(20))
def test_a_run_killed_at_any_moment_goes_on_as_if_it_had_not_been(
    moment: int, small: list[str], undisturbed: Callable[..., tuple[Any, float]], tmp_path: Path
) -> None:
    """Twenty moments spread over the life of a run, one in four in the middle of writing a checkpoint."""
    overrides = settings(*COMBINATIONS[moment % len(COMBINATIONS)])
    expected, seconds = undisturbed(*overrides)
    folder = tmp_path / "run"
    if moment % 4 == 3:
        assert live(folder, [*small, *overrides], KillWhileWriting(1 + moment // 4 % 3)) == -signal.SIGKILL
        assert list(folder.glob("checkpoints/*.part"))
    else:
        share = (moment + random.Random(moment).random()) / 20
        kill_after([begin(folder, [*small, *overrides])], share * seconds)
    assert live(folder, [*small, *overrides]) == 0, folder.with_suffix(".log").read_text()
    assert same(outcome(folder), expected)
    assert not list(folder.rglob("*.part"))


def test_a_run_killed_before_each_of_its_file_operations_in_turn_comes_to_the_same(
    small: list[str], undisturbed: Callable[..., tuple[Any, float]], tmp_path: Path
) -> None:
    """Between best and last checkpoint, between checkpoint and rows, in the test, at the very end: nowhere a gap."""
    folder = tmp_path / "run"
    kills = next(n for n in count(1) if live(folder, small, KillAtFileEvent(n)) != -signal.SIGKILL) - 1
    assert kills > 15
    assert same(outcome(folder), undisturbed()[0])


@pytest.fixture(scope="module")
def undisturbed_ranks(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Any, float]]:
    """Return the same of runs on two processes."""
    folder, known = tmp_path_factory.mktemp("two"), dict[tuple[str, ...], tuple[Any, float]]()

    def find(*overrides: str) -> tuple[Any, float]:
        if overrides not in known:
            where = folder / str(len(known))
            begun = time.monotonic()
            assert end_of(begin_ranks(where, [*small, *overrides])) == [0, 0], where.with_suffix(".log").read_text()
            known[overrides] = outcome(where), time.monotonic() - begun
        return known[overrides]

    return find


def end_of(processes: list[BaseProcess]) -> list[int | None]:
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


@pytest.mark.parametrize("moment", range(8))
def test_two_processes_killed_at_any_moment_go_on_as_if_they_had_not_been(
    moment: int, small: list[str], undisturbed_ranks: Callable[..., tuple[Any, float]], tmp_path: Path
) -> None:
    overrides = settings(*COMBINATIONS[moment % len(COMBINATIONS)])
    expected, seconds = undisturbed_ranks(*overrides)
    share = (moment + random.Random(moment).random()) / 9
    kill_after(begin_ranks(tmp_path / "run", [*small, *overrides]), share * seconds)
    ranks = begin_ranks(tmp_path / "run", [*small, *overrides])
    assert end_of(ranks) == [0, 0], (tmp_path / "run.log").read_text()
    assert same(outcome(tmp_path / "run"), expected)


STEP = "module.CharLM.training_step"
MANUAL_STEP = "manual.ManualCharLM.training_step"  # which is taken on one CPU
VALIDATION = "module.CharLM.validation_step"
TEST = "module.CharLM.test_step"


def status(folder: Path) -> str:
    return str(json.loads((folder / "result.json").read_text())["status"])


@pytest.mark.parametrize(
    ("where", "call", "number"),
    [
        (STEP, 1, signal.SIGTERM),
        (STEP, 4, signal.SIGINT),
        (STEP, 10, signal.SIGTERM),  # a validation is due behind it
        (STEP, 13, signal.SIGTERM),
        (MANUAL_STEP, 22, signal.SIGINT),
        (STEP, 23, signal.SIGTERM),  # the last
        (VALIDATION, 1, signal.SIGINT),
        (VALIDATION, 3, signal.SIGTERM),
        (VALIDATION, 15, signal.SIGTERM),  # its last batch
        (VALIDATION, 33, signal.SIGTERM),  # in the validation behind the last step
        ("resume.Checkpoints.on_train_end", 1, signal.SIGTERM),
        ("module.CharLM.test_step", 2, signal.SIGTERM),
    ],
)
def test_a_signal_saves_what_an_exact_resume_needs_and_ends_with_its_exit_code(
    where: str, call: int, number: int, small: list[str], undisturbed: Callable[..., tuple[Any, float]], tmp_path: Path
) -> None:
    folder, expected = tmp_path / "run", undisturbed(*settings("lstm", "streams"))[0]
    overrides = [*small, *settings("lstm", "streams")]
    code = live(folder, overrides, SignalAt(where, call, number))
    assert code == 128 + number, folder.with_suffix(".log").read_text()
    if where in (STEP, MANUAL_STEP):
        step = read_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"]
        assert step == call
    assert status(folder) == "interrupted"
    assert live(folder, overrides) == 0, folder.with_suffix(".log").read_text()
    assert same(outcome(folder), expected)


@pytest.mark.parametrize(("where", "call", "steps"), [(STEP, 10, 10), (VALIDATION, 1, 10), (VALIDATION, 33, 23)])
def test_a_signal_ends_a_validation_at_once_and_the_run_goes_on_with_it(
    where: str, call: int, steps: int, small: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert live(folder, small, SignalAt(where, call)) == 143
    last = read_checkpoint(folder / "checkpoints" / "last.ckpt")
    assert (last["global_step"], last["validating"]) == (steps, True)
    assert str(steps) not in validated(folder)
    assert live(folder, small, SignalAt(VALIDATION, 2)) == 143  # and again in the same one
    assert str(steps) not in validated(folder)
    assert live(folder, small) == 0, folder.with_suffix(".log").read_text()
    assert validated(folder) == ["10", "20", "23"]


def validated(folder: Path) -> list[str]:
    """Return the steps whose validation is written down."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [row["step"] for row in csv.DictReader(file) if row.get("val/loss")]


FEW_WINDOWS = {"shuffled": ("data.stride=70",), "streams": ()}  # streams have few by themselves
ENDS = {
    "epochs": (
        "trainer.max_steps=-1",
        "trainer.max_epochs=3",
        "trainer.val_check_interval=1.0",
        "trainer.check_val_every_n_epoch=1",
    ),
    "gathered": ("trainer.accumulate_grad_batches=2", "trainer.val_check_interval=9", "trainer.max_steps=12"),
    "averaged": ("weight_average.decay=0.9", "early_stopping.patience=1"),
}


@pytest.mark.parametrize("kind", list(ENDS))
@pytest.mark.parametrize("order", ["shuffled", "streams"])
def test_a_run_interrupted_in_each_validation_comes_to_the_same(
    kind: str, order: str, small: list[str], undisturbed: Callable[..., tuple[Any, float]], tmp_path: Path
) -> None:
    """At the ends of epochs and of the run, with gradients gathered over batches, with averaged weights in place."""
    overrides = (f"data.order={order}", *(FEW_WINDOWS[order] if kind == "epochs" else ()), *ENDS[kind])
    folder = tmp_path / "run"
    codes = [live(folder, [*small, *overrides], SignalAt(VALIDATION, call)) for call in (7, 19, 20, 31)]
    assert codes.count(143) >= 3
    assert live(folder, [*small, *overrides]) == 0, folder.with_suffix(".log").read_text()
    assert same(outcome(folder), undisturbed(*overrides)[0])


@pytest.mark.parametrize(
    "overrides",
    [
        ("early_stopping.patience=2",),
        ("trainer.limit_train_batches=5",),
        ("trainer.precision=64-true", "weight_average.decay=0.9"),
    ],
    ids=lambda overrides: overrides[0],
)
def test_a_run_killed_behind_the_end_of_an_epoch_comes_to_the_same(
    overrides: tuple[str, ...], small: list[str], undisturbed: Callable[..., tuple[Any, float]], tmp_path: Path
) -> None:
    overrides = (*FEW_WINDOWS["shuffled"], *ENDS["epochs"], *overrides)
    folder, (expected, _) = tmp_path / "run", undisturbed(*overrides)
    step = int(expected["rows"][-1]["step"]) // 2  # in the middle of the second epoch of three
    assert live(folder, [*small, *overrides], SignalAt(STEP, step, signal.SIGKILL)) == -signal.SIGKILL
    assert len(validated(folder)) == 1
    assert live(folder, [*small, *overrides]) == 0, folder.with_suffix(".log").read_text()
    assert len(validated(folder)) == 3
    assert same(outcome(folder), expected)


@pytest.mark.parametrize("order", ["shuffled", "streams"])
def test_another_batch_size_is_refused_on_as_many_devices_however_they_are_written(
    order: str, small: list[str], tmp_path: Path
) -> None:
    folder, overrides = tmp_path / "run", [*small, f"data.order={order}"]
    assert live(folder, overrides, SignalAt(STEP, 7)) == 143
    assert live(folder, [*overrides, "trainer.devices=auto", "data.batch_size=4"]) == 2
    assert "begun with data.batch_size=8 on as many devices" in folder.with_suffix(".log").read_text()
    assert live(folder, [*overrides, "trainer.devices=auto"]) == 0


@pytest.mark.parametrize("order", ["shuffled", "streams"])
def test_a_run_interrupted_in_every_third_step_comes_to_the_same(
    order: str, small: list[str], undisturbed: Callable[..., tuple[Any, float]], tmp_path: Path
) -> None:
    """Across the ends of epochs, and with gradients gathered over batches."""
    short = (*FEW_WINDOWS[order], "trainer.accumulate_grad_batches=2", f"data.order={order}")
    folder = tmp_path / "run"
    for _ in range(7):
        assert live(folder, [*small, *short], SignalAt(STEP, 5)) == 143
    assert live(folder, [*small, *short]) == 0
    assert same(outcome(folder), undisturbed(*short)[0])


@pytest.mark.parametrize("order", ["shuffled", "streams"])
def test_a_run_in_16_bits_goes_on_as_exactly(
    order: str, small: list[str], undisturbed: Callable[..., tuple[Any, float]], tmp_path: Path
) -> None:
    half = ("trainer.precision=bf16-mixed", "model.hidden_size=64", f"data.order={order}")
    folder = tmp_path / "run"
    assert live(folder, [*small, *half], SignalAt(STEP, 12, signal.SIGKILL)) == -signal.SIGKILL
    assert live(folder, [*small, *half], SignalAt(STEP, 5)) == 143
    assert live(folder, [*small, *half]) == 0, folder.with_suffix(".log").read_text()
    assert same(outcome(folder), undisturbed(*half)[0])


def test_a_second_signal_ends_at_once(small: list[str], tmp_path: Path) -> None:
    assert live(tmp_path / "run", small, SignalAt(STEP, 13, times=2)) == 143
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 10
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize(
    ("where", "call", "rank", "precision"),
    [
        (STEP, 12, 0, "32-true"),
        (STEP, 12, 1, "bf16-mixed"),
        (VALIDATION, 4, 0, "32-true"),
        (VALIDATION, 12, 1, "32-true"),
    ],
)
def test_a_signal_to_one_of_two_processes_ends_both_at_one_place(
    where: str,
    call: int,
    rank: int,
    precision: str,
    small: list[str],
    undisturbed_ranks: Callable[..., tuple[Any, float]],
    tmp_path: Path,
) -> None:
    told = (*settings("lstm", "shuffled"), f"trainer.precision={precision}")
    folder, overrides = tmp_path / "run", [*small, *told]
    assert end_of(begin_ranks(folder, overrides, SignalAt(where, call, rank=rank))) == [143, 143]
    assert status(folder) == "interrupted"
    assert end_of(begin_ranks(folder, overrides)) == [0, 0]
    assert same(outcome(folder), undisturbed_ranks(*told)[0])


def test_a_requeued_job_of_slurm_goes_on_in_its_folder(
    small: list[str], undisturbed: Callable[..., tuple[Any, float]], tmp_path: Path
) -> None:
    asked = tmp_path / "scontrol"
    asked.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/asked\n")
    asked.chmod(0o755)
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "train", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert live(tmp_path / "run", small, SignalAt(STEP, 13, signal.SIGUSR1), **job) == 138
    assert (tmp_path / "asked").read_text() == "requeue 17\n"
    assert live(tmp_path / "run", small, **job, SLURM_RESTART_COUNT="1") == 0
    assert same(outcome(tmp_path / "run"), undisturbed()[0])


def test_a_run_killed_twice_is_one_run_of_wandb(small: list[str], tmp_path: Path) -> None:
    for step in (7, 15):
        assert live(tmp_path / "run", [*small, "logger=wandb"], SignalAt(STEP, step, signal.SIGKILL)) == -signal.SIGKILL
    assert live(tmp_path / "run", [*small, "logger=wandb"]) == 0, (tmp_path / "run.log").read_text()
    ids = {path.name.rsplit("-", 1)[1] for path in (tmp_path / "wandb").glob("offline-run-*")}
    assert ids == {(tmp_path / "run" / "wandb_id.txt").read_text()}


@pytest.mark.parametrize(
    ("order", "where", "call"), [("shuffled", STEP, 13), ("streams", STEP, 13), ("streams", VALIDATION, 4)]
)
def test_a_run_begun_on_two_processes_goes_on_on_one(
    order: str, where: str, call: int, small: list[str], undisturbed: Callable[..., tuple[Any, float]], tmp_path: Path
) -> None:
    """With twice the batch the steps are the same ones, so that without dropout the losses are too, to rounding."""
    same_steps = [*small, f"data.order={order}", "model.dropout=0"]
    folder = tmp_path / "run"
    half = [*same_steps, "data.batch_size=4"]
    assert end_of(begin_ranks(folder, half, SignalAt(where, call))) == [143, 143], folder.with_suffix(
        ".log"
    ).read_text()
    assert live(folder, same_steps) == 0, folder.with_suffix(".log").read_text()
    expected = undisturbed(f"data.order={order}", "model.dropout=0")[0]
    found = outcome(folder)
    assert [row["step"] for row in found["rows"]] == [row["step"] for row in expected["rows"]]
    for name in ("train/loss", "val/loss", "test/loss"):
        losses = [[float(row[name]) for row in which["rows"] if row[name]] for which in (found, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_run_begun_on_two_processes_goes_on_on_one_with_half_the_steps_size(small: list[str], tmp_path: Path) -> None:
    short = [*small, "data.stride=70"]  # several epochs
    assert end_of(begin_ranks(tmp_path / "run", short, SignalAt(STEP, 13))) == [143, 143]
    assert live(tmp_path / "run", short) == 0, (tmp_path / "run.log").read_text()
    assert [row["step"] for row in outcome(tmp_path / "run")["rows"] if row["val/loss"]] == ["10", "20", "23"]
    assert "data.batch_size=16 keeps the steps as they were" in (tmp_path / "run.log").read_text()


# --- numbers that are none ----------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run_and_spoils_nothing(
    small: list[str], undisturbed: Callable[..., tuple[Any, float]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert live(folder, small, Poison(14)) == 1
    last = folder.with_suffix(".log").read_text().splitlines()[-1]
    assert "loss or gradient of step 14 is not finite, at a learning rate of " in last
    assert f"the last good checkpoint is {folder / 'checkpoints' / 'last.ckpt'}" in last
    assert status(folder) == "failed"
    assert read_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] == 10
    assert live(folder, small) == 0
    assert same(outcome(folder), undisturbed()[0])


class PoisonValidation:
    """Makes the loss of every validation not a number."""

    def __call__(self, folder: Path) -> None:
        import charlm.module

        score = charlm.module.CharLM._score

        def poisoned(model: Any, batch: Any, state: Any) -> Any:
            nats, state = score(model, batch, state)
            return nats if model.training else nats * float("nan"), state

        charlm.module.CharLM._score = poisoned  # type: ignore[method-assign]


def test_a_run_without_a_validation_loss_does_not_complete(small: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for _ in range(2):  # nor when it goes on where nothing is left to train
        assert live(folder, small, PoisonValidation()) == 1
        assert (
            "no validation came to a loss that is a number" in folder.with_suffix(".log").read_text().splitlines()[-1]
        )
        assert status(folder) == "failed"
    assert not (folder / "checkpoints" / "best.ckpt").exists()


def test_steps_that_are_no_number_are_left_out_and_counted_where_that_is_asked_for(
    small: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert live(folder, [*small, "on_nonfinite=skip"], Poison(4, 5, 14)) == 0
    assert json.loads((folder / "result.json").read_text())["skipped_steps"] == 3
    assert "3 steps left out so far" in folder.with_suffix(".log").read_text()
    assert all(math.isfinite(float(row["train/loss"])) for row in outcome(folder)["rows"] if row["train/loss"])


@pytest.mark.parametrize(("where", "call", "number"), [(STEP, 7, signal.SIGTERM), (TEST, 1, signal.SIGKILL)])
def test_steps_that_were_left_out_are_known_of_when_a_run_goes_on(
    where: str, call: int, number: int, small: list[str], tmp_path: Path
) -> None:
    folder, overrides = tmp_path / "run", [*small, "on_nonfinite=skip"]
    assert live(folder, overrides, Both(Poison(3, 5), SignalAt(where, call, number))) in (143, -signal.SIGKILL)
    assert live(folder, overrides) == 0, folder.with_suffix(".log").read_text()
    assert json.loads((folder / "result.json").read_text())["skipped_steps"] == 2
    assert folder.with_suffix(".log").read_text().count("is not finite") == 2


# --- what there is too little of ----------------------------------------------------------------------------------


def test_out_of_memory_says_which_batch_size_would_fit(small: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert live(folder, [*small, "data.batch_size=64"], OutOfMemory(3)) == 1
    last = folder.with_suffix(".log").read_text().splitlines()[-1]
    assert "out of memory on cpu at data.batch_size=64, data.window=20; by estimate data.batch_size=32 fits" in last
    assert last.endswith("it had not come to a checkpoint yet")
    assert status(folder) == "failed"


def test_out_of_memory_leaves_the_last_good_checkpoint(
    small: list[str], undisturbed: Callable[..., tuple[Any, float]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert live(folder, small, OutOfMemory(30)) == 1  # ten steps, their validation, and a few steps more
    last = folder.with_suffix(".log").read_text().splitlines()[-1]
    assert last.endswith(f"the last good checkpoint is {folder / 'checkpoints' / 'last.ckpt'}")
    assert read_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"] == 10
    assert live(folder, small) == 0
    assert same(outcome(folder), undisturbed()[0])


class FullDisk:
    """Lets files grow to so many bytes, as a disk does that is nearly full."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, folder: Path) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


@pytest.mark.parametrize(("size", "which"), [(2500, "metrics.csv|samples.jsonl|next.ckpt"), (40_000, "next.ckpt")])
def test_a_full_disk_stops_the_run_with_one_line(size: int, which: str, small: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert live(folder, [*small, "trainer.max_steps=60"], FullDisk(size)) == 1
    last = folder.with_suffix(".log").read_text().splitlines()[-1]
    assert re.search(f"cannot write .*({which}): File too large", last), last
    assert "Traceback" not in folder.with_suffix(".log").read_text()
    for path in (folder / "checkpoints").iterdir():
        read_checkpoint(path)
    assert live(folder, [*small, "trainer.max_steps=60"]) == 0


def test_what_is_written_on_a_full_disk_leaves_the_last_good_checkpoint(
    small: list[str], undisturbed: Callable[..., tuple[Any, float]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert live(folder, small, SignalAt(STEP, 13)) == 143
    before = (folder / "checkpoints" / "last.ckpt").read_bytes()
    assert live(folder, small, FullDisk(len(before) // 2)) == 1
    assert (folder / "checkpoints" / "last.ckpt").read_bytes() == before
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == [
        "best.ckpt",
        "last.ckpt",
        "previous.ckpt",
    ]
    assert live(folder, small) == 0
    assert same(outcome(folder), undisturbed()[0])


def test_a_folder_that_may_not_be_written_to_is_refused_in_one_line(
    tiny: list[str], program: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    done = program("train.py", *tiny, "hydra.run.dir=file/run")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "cannot write file/run: Not a directory; choose another folder" in done.stderr


def test_a_read_only_disk_is_refused_in_one_line(
    composed: Callable[..., TrainConfig], small: list[str], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(disk)], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip(f"may not mount a file system: {mounted.stderr.decode()}")
    try:
        with pytest.raises(InputError, match=f"cannot write {disk}/run: Read-only file system"):
            train(composed(*small), disk / "run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)
