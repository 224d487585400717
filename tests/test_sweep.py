"""Sweeps as a user runs them: one process a training, resumed by the same command, right with several devices."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from charlm.config import TrainConfig
from charlm.errors import InputError
from charlm.sweep import Grid, take_folder

ROOT = Path(__file__).parent.parent
Program = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def short(tiny: list[str]) -> list[str]:
    """Overrides of a training of 4 steps, with nothing in them that the tests vary."""
    kept = [override for override in tiny if not override.startswith(("model.", "sampling.temperature", "trainer.max"))]
    return [*kept, "trainer.max_steps=4", "trainer.val_check_interval=2", "hydra.launcher.jobs=2"]


def results(sweep: Path) -> dict[str, dict[str, Any]]:
    """Return each run's result.json by the name of its folder."""
    return {file.parent.name: json.loads(file.read_text()) for file in sweep.glob("*/result.json")}


def losses(sweep: Path) -> dict[str, tuple[float, float]]:
    return {name: (result["val/loss"], result["test/loss"]) for name, result in results(sweep).items()}


def temperatures(run: Path) -> list[float]:
    """Return the temperatures at which a finished run has written."""
    files = [run / "samples.jsonl", *(run / "sampled").glob("*.jsonl")]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    last = max(row["step"] for row in rows)
    return sorted(row["temperature"] for row in rows if row["step"] == last)


# --- what is trained ----------------------------------------------------------------------------------------------


def test_a_sweep_trains_each_cell_and_size_once_writes_at_each_temperature_and_goes_on_when_widened(
    short: list[str], program: Program, tmp_path: Path
) -> None:
    sweep = ("-m", *short, "+sweep=cell_size_temperature", "model.hidden_size=8,12", "sampling.temperature=0.5,1.0,1.3")
    done = program("train.py", *sweep, "model=lstm,gru")
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    first = results(folder)
    assert sorted(name.split("_")[0] for name in first) == ["gru-12x1", "gru-8x1", "lstm-12x1", "lstm-8x1"]
    assert {result["status"] for result in first.values()} == {"completed"}
    assert all(temperatures(folder / name) == [0.0, 0.5, 1.0, 1.3] for name in first)
    assert len((folder / "sweep.csv").read_text().splitlines()) == 1 + 4

    again = program("train.py", *sweep, "model=lstm,gru")
    assert again.returncode == 0
    assert "12 jobs: 4 trainings, 4 done before" in again.stdout
    wider = program("train.py", *sweep, "model=lstm,gru,rnn")
    assert wider.returncode == 0, wider.stdout + wider.stderr
    assert list((tmp_path / "runs").iterdir()) == [folder]
    assert len(results(folder)) == 6
    assert {name: result for name, result in results(folder).items() if name in first} == first


def test_a_damaged_file_of_a_finished_training_is_named(short: list[str], program: Program, tmp_path: Path) -> None:
    given = ("-m", *short, "model.hidden_size=8", "hydra.sweep.dir=s")
    assert program("train.py", *given).returncode == 0
    (file,) = (tmp_path / "s").glob("*/config.yaml")
    whole = file.read_text()
    for content in ("a: [", "[]", whole.replace("sampling:", "samplin:"), whole.replace("  temperature:", "  warmth:")):
        file.write_text(content)
        done = program("train.py", *given)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert f"s/{file.parent.name}/config.yaml is damaged" in done.stderr
        assert "choose another" in done.stderr
    file.write_text(whole)
    for content in ("[]", '{"status": "completed"}'):  # which train.py refuses, as that training's own failure
        file.with_name("result.json").write_text(content)
        done = program("train.py", *given)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1), done.stderr
        assert "1 of 1 trainings failed" in done.stderr
        assert "result.json is damaged" in done.stderr


def test_a_job_that_fails_costs_only_itself_and_is_tried_again(
    short: list[str], program: Program, tmp_path: Path
) -> None:
    given = ("hydra.sweep.dir=s", "model.hidden_size=8", "data.window=20,90000")
    done = program("train.py", "-m", *short, *given)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "1 of 2 trainings failed: lstm-8x1_" in done.stderr
    assert "is the largest that fits every split" in done.stderr
    assert [result["status"] for result in results(tmp_path / "s").values()] == ["completed"]
    again = program("train.py", "-m", *short, *given)
    assert again.returncode == 1
    assert "2 trainings, 1 done before" in again.stdout


def test_a_sweep_of_which_a_job_cannot_work_is_refused_and_leaves_nothing(program: Program, tmp_path: Path) -> None:
    done = program("train.py", "-m", "model.hidden_size=8,0", "seed=1,2")
    assert "model.hidden_size=0 must be 1 or more (in 2 of 4 jobs; none has begun)" in done.stderr
    for bad in ("model.hidden_size=8,0", "model.hidden_size=0,-1", "model.hiden_size=8,16", "hydra.launcher.jobs=0"):
        done = program("train.py", "-m", bad)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
        assert not list(tmp_path.iterdir())


def test_a_live_table_shows_the_trainings_on_a_terminal(short: list[str], tmp_path: Path) -> None:
    import pty

    command = [sys.executable, str(ROOT / "train.py"), "-m", *short, "model.hidden_size=8", "data.window=20,90000"]
    shown = b""

    def read(descriptor: int) -> bytes:
        nonlocal shown
        data = os.read(descriptor, 1024)
        shown += data
        return b"." if data else data

    before = Path.cwd()
    os.chdir(tmp_path)
    os.environ |= {"TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
    try:
        pty.spawn(command, read)
    finally:
        os.chdir(before)
    last = shown.decode().rpartition("1 done, 1 failed")[2]
    assert re.search(r"lstm-8x1_\w+ .*done.* 4 of 4 .* data.window=20", last)
    assert re.search(r"lstm-8x1_\w+ .*failed.* the train split has \d+ characters in one piece.*…", last)


# --- several devices ----------------------------------------------------------------------------------------------


def test_trainings_of_one_and_of_two_processes_follow_one_another_in_either_order(
    short: list[str], program: Program, tmp_path: Path
) -> None:
    for name, devices in (("one_first", "1,2"), ("two_first", "2,1")):
        given = (
            f"trainer.devices={devices}",
            "model.hidden_size=8",
            "hydra.launcher.jobs=1",
            f"hydra.sweep.dir={name}",
        )
        done = program("train.py", "-m", *short, *given)
        assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one_first", "two_first"]
    assert losses(tmp_path / "one_first") == losses(tmp_path / "two_first")
    worlds = ["on each of 2 devices" in log.read_text() for log in (tmp_path / "one_first").glob("*/output.log")]
    assert sorted(worlds) == [False, True]


AT_EACH_STEP = '''
import importlib.abc, importlib.util, os, sys

class Hook(importlib.abc.MetaPathFinder):
    """Has `at_step`, below, called before each training step."""

    def find_spec(self, name, path, target=None):
        if name != "charlm.callbacks":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def patched(module):
            load(module)
            module.FinalValidation.on_train_batch_start = lambda self, *given: at_step(*given)

        spec.loader.exec_module = patched
        return spec

sys.meta_path.insert(0, Hook())
'''
FAIL = (
    AT_EACH_STEP
    + """
def at_step(trainer, module, batch, number):
    if trainer.world_size == 2 and trainer.global_rank == int(os.environ["FAILING_RANK"]):
        raise RuntimeError("the power went out")
"""
)
WRITE_DOWN = (
    AT_EACH_STEP
    + """
def at_step(trainer, module, batch, number):
    with open(f"{trainer.default_root_dir}.rank{trainer.global_rank}", "a") as seen:
        seen.writelines(f"{row}\\n" for row in batch.tokens.tolist())
"""
)


def test_in_a_sweep_on_two_devices_each_rank_trains_on_one_half_of_the_windows(
    short: list[str], program: Program, tmp_path: Path
) -> None:
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(WRITE_DOWN)
    epoch = ("data.stride=20", "trainer.max_steps=-1", "trainer.max_epochs=1", "trainer.val_check_interval=29")
    given = ("trainer.devices=2", "model.hidden_size=8,12", "hydra.sweep.dir=s", "hydra.launcher.jobs=1")
    done = program("train.py", "-m", *short, *epoch, *given, PYTHONPATH=str(tmp_path / "hook"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert [name.split("_")[0] for name in sorted(losses(tmp_path / "s"))] == ["lstm-12x1", "lstm-8x1"]
    windows = (9_600 - 1) // 20 // 16 * 16  # of 80 % of the text; the last batch of two times 8 is left out if not full
    for name in losses(tmp_path / "s"):
        seen = [(tmp_path / "s" / f"{name}.rank{rank}").read_text().splitlines() for rank in (0, 1)]
        assert [len(rows) for rows in seen] == [windows // 2] * 2
        assert len({*seen[0], *seen[1]}) == windows  # none twice


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_costs_only_its_training(
    rank: int, short: list[str], program: Program, tmp_path: Path
) -> None:
    (tmp_path / "fault").mkdir()
    (tmp_path / "fault" / "sitecustomize.py").write_text(FAIL)
    fault = {"PYTHONPATH": str(tmp_path / "fault"), "FAILING_RANK": str(rank)}
    given = ("model.hidden_size=8", "trainer.devices=2,1", "hydra.sweep.dir=s", "hydra.launcher.jobs=1")
    done = program("train.py", "-m", *short, *given, **fault)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 of 2 trainings failed: lstm-8x1_" in done.stderr
    assert "RuntimeError: the power went out" in done.stderr
    completed = [result["command"] for result in results(tmp_path / "s").values() if result["status"] == "completed"]
    assert ["trainer.devices=1" in command for command in completed] == [True]


def test_several_devices_are_refused_where_jobs_share_a_process(short: list[str], program: Program) -> None:
    kept = [override for override in short if not override.startswith("hydra.launcher")]
    done = program("train.py", "-m", *kept, "trainer.devices=2", "hydra/launcher=basic", "model.hidden_size=8")
    assert done.returncode == 2, done.stderr
    assert "hydra/launcher=pool" in done.stderr.splitlines()[-1]


# --- interruptions ------------------------------------------------------------------------------------------------


def started(arguments: Sequence[str], folder: Path) -> subprocess.Popen[str]:
    """Start train.py as a terminal would, in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_a_sweep_killed_at_any_moment_ends_like_an_undisturbed_one(
    short: list[str], program: Program, tmp_path: Path
) -> None:
    given = ("-m", *short, "model.hidden_size=8,12", "sampling.temperature=0.5,1.0", "trainer.max_steps=60")
    assert program("train.py", *given, "hydra.sweep.dir=undisturbed").returncode == 0
    draw = random.Random(5)
    for _ in range(3):
        sweep = started([*given, "hydra.sweep.dir=killed"], tmp_path)
        time.sleep(draw.uniform(1.0, 6.0))
        os.killpg(sweep.pid, signal.SIGKILL)
        sweep.communicate()
    last = program("train.py", *given, "hydra.sweep.dir=killed")
    assert last.returncode == 0, last.stdout + last.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "undisturbed")
    for name in losses(tmp_path / "killed"):
        runs = [tmp_path / sweep / name for sweep in ("killed", "undisturbed")]
        assert temperatures(runs[0]) == temperatures(runs[1]) == [0.0, 0.5, 1.0]
        steps = [
            [row["step"] for row in csv.DictReader((run / "metrics.csv").read_text().splitlines())] for run in runs
        ]
        assert steps[0] == steps[1]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_every_training_and_the_same_command_goes_on(
    signum: signal.Signals, short: list[str], program: Program, tmp_path: Path
) -> None:
    given = ("-m", *short, "trainer.devices=2", "model.hidden_size=8", "trainer.max_steps=100000", "hydra.sweep.dir=s")
    sweep = started(given, tmp_path)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "s").glob("*/checkpoints/last.ckpt")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.kill(sweep.pid, signum)
    printed, _ = sweep.communicate(timeout=60)
    assert sweep.returncode == 128 + signum, printed
    assert "the same command goes on" in printed
    assert ": interrupted after" in printed
    assert [result["status"] for result in results(tmp_path / "s").values()] == ["interrupted"]
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in running


# --- Hydra's plugins ----------------------------------------------------------------------------------------------


def test_optuna_is_told_what_two_ranks_came_to_and_goes_on_with_more_trials(
    short: list[str], program: Program, tmp_path: Path
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="pip install -e '.[optuna]'")
    given = ("-m", *short, "sweep=optuna", "model.hidden_size=choice(8,12)", "trainer.devices=2")
    done = program("train.py", *given, "hydra.sweeper.n_trials=2")
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    first = results(folder)
    assert len(first) == 2
    best = min(result["val/loss"] for result in first.values())
    assert yaml.safe_load((folder / "optimization_results.yaml").read_text())["best_value"] == best
    for name in first:
        assert "on each of 2 devices" in (folder / name / "output.log").read_text()
    more = program("train.py", *given, "hydra.sweeper.n_trials=3", "trainer.max_steps=4")
    assert more.returncode == 0, more.stdout + more.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert len(results(folder)) == 3
    assert {name: result for name, result in results(folder).items() if name in first} == first
    with sqlite3.connect(folder / "study.db") as study:
        assert study.execute("select count(*) from trials where state = 'COMPLETE'").fetchone() == (3,)
    study.close()


@pytest.mark.parametrize(
    ("launcher", "plugin"),
    [("submitit_local", "hydra_submitit_launcher"), ("ray_cluster", "hydra_ray_launcher")],
)
def test_a_clusters_launcher_trains_in_the_same_folders_and_goes_on_there(
    launcher: str, plugin: str, short: list[str], program: Program, tmp_path: Path
) -> None:
    pytest.importorskip(f"hydra_plugins.{plugin}", reason="the launcher's extra is not installed")
    kept = [override for override in short if not override.startswith("hydra.launcher")]
    given = ("-m", *kept, "model.hidden_size=8,12", f"hydra/launcher={launcher}")
    for _ in range(2):
        done = program("train.py", *given)
        assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert sorted(name.split("_")[0] for name in results(folder)) == ["lstm-12x1", "lstm-8x1"]
    assert {result["status"] for result in results(folder).values()} == {"completed"}
    assert len((folder / "sweep.csv").read_text().splitlines()) == 1 + 2
    alone = program(*next(iter(results(folder).values()))["command"])
    assert (alone.returncode, "is complete" in alone.stdout) == (0, True), alone.stderr


@pytest.mark.parametrize(
    ("choice", "plugin", "remedy"),
    [
        ("hydra/launcher=slurm", "hydra_submitit_launcher", "-e '.[slurm]'"),
        ("hydra/launcher=ray_cluster", "hydra_ray_launcher", "make setup-ray"),
        ("sweep=optuna", "hydra_optuna_sweeper", "-e '.[optuna]'"),
    ],
)
def test_a_plugin_that_is_not_installed_is_named_with_what_installs_it(
    choice: str, plugin: str, remedy: str, program: Program
) -> None:
    if importlib.util.find_spec(f"hydra_plugins.{plugin}"):
        pytest.skip("it is installed")
    done = program("train.py", "-m", choice, "model=lstm")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert remedy in done.stderr


# --- folders ------------------------------------------------------------------------------------------------------


def grid(**values: str) -> Grid:
    return Grid({name.replace("__", "."): given.split() for name, given in values.items()}, {})


@pytest.fixture
def chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Grid], Path]:
    """Return a function from a grid to the folder that a sweep of it, which ends at once, would have taken."""
    monkeypatch.setattr("charlm.sweep._held", held := [])

    def take(told: Grid, folder: str = "auto") -> Path:
        taken = take_folder(tmp_path / folder, told)
        held.pop().release()
        return taken

    return take


def test_the_same_sweep_goes_on_in_its_folder_and_so_does_a_wider_or_a_narrower_one(
    chosen: Callable[..., Path],
) -> None:
    first = chosen(grid(model="lstm gru", seed="1"))
    assert chosen(grid(model="lstm gru", seed="1")) == first
    assert chosen(grid(model="lstm gru rnn", seed="1 2")) == first
    assert chosen(grid(model="rnn", seed="2")) == first
    assert chosen(grid(model="lstm", seed="1", sampling__temperature="0.3 0.8")) == first


def test_another_sweep_has_a_folder_of_its_own(chosen: Callable[..., Path]) -> None:
    first = chosen(grid(model="lstm gru", seed="1"))
    for other in (
        grid(model="lstm gru"),
        grid(model="lstm gru", seed="2"),
        grid(model="gru rnn", seed="1"),
        Grid(grid(model="lstm gru", seed="1").settings, {"n_trials": 5}),
    ):
        assert chosen(other) != first


def test_two_sweeps_at_the_same_time_never_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("charlm.sweep._held", [])
    first = take_folder(tmp_path / "auto", grid(model="lstm gru"))
    with pytest.raises(InputError, match="another process sweeps in"):
        take_folder(tmp_path / "auto", grid(model="lstm gru"))
    with pytest.raises(InputError, match="another process sweeps in"):
        take_folder(first, grid(model="lstm gru"))
    assert take_folder(tmp_path / "auto", grid(model="lstm gru rnn")) != first
    assert take_folder(tmp_path / "auto", grid(model="rnn")).parent == first.parent


def test_a_named_folder_of_another_sweep_is_refused_with_the_difference(
    chosen: Callable[..., Path], tmp_path: Path
) -> None:
    chosen(grid(model="lstm gru", trainer__max_steps="20"), "named")
    chosen(grid(model="gru rnn", trainer__max_steps="20"), "named")
    with pytest.raises(InputError, match=r"trainer\.max_steps: 20 there, 40 now"):
        chosen(grid(model="lstm gru", trainer__max_steps="40"), "named")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    with pytest.raises(InputError, match="a single run's folder"):
        chosen(grid(model="lstm gru"), "run")


def test_a_training_is_named_by_what_it_is(composed: Callable[..., TrainConfig]) -> None:
    name = composed("model=gru", "model.hidden_size=64").run_name
    assert name.startswith("gru-64x1_")
    assert composed("model=gru", "model.hidden_size=64", "sampling.temperature=0.1").run_name == name
    assert composed("model=gru", "model.hidden_size=64", "optimizer.learning_rate=0.1").run_name != name
