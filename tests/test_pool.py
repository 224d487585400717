"""The pool: what runs beside what, on which devices, and that nothing outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from charlm.errors import Interrupted
from charlm.pool import Pool, Task, wanted_gpus

ROOT = Path(__file__).parent.parent
SAY_WHERE = "import os, time; print(os.environ.get('CUDA_VISIBLE_DEVICES'), flush=True); time.sleep(0.3)"


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(what: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_no_more_run_at_a_time_than_asked_and_none_waits_for_a_slow_one(tmp_path: Path) -> None:
    seconds = [1.5, 0.1, 0.1, 0.1, 0.1]
    tasks = [Task(python(f"import time; time.sleep({s})"), tmp_path / str(i)) for i, s in enumerate(seconds)]
    most = 0

    def watch() -> None:
        nonlocal most
        most = max(most, sum(task.began is not None and task.ended is None for task in tasks))

    Pool(2, []).run(tasks, watch)
    assert most == 2
    assert [task.exit_code for task in tasks] == [0] * 5
    ended = [task.ended or 0 for task in tasks]
    assert max(ended) == ended[0]


def test_each_task_has_gpus_of_its_own_while_there_are_enough(tmp_path: Path) -> None:
    tasks = [Task(python(SAY_WHERE), tmp_path / str(i), gpus=1) for i in range(3)]
    Pool(None, ["4", "GPU-x", "6"]).run(tasks)
    assert [(tmp_path / str(i)).read_text().strip() for i in range(3)] == ["4", "GPU-x", "6"]


def test_more_jobs_than_gpus_share_them_evenly(tmp_path: Path) -> None:
    tasks = [Task(python(SAY_WHERE), tmp_path / str(i), gpus=1) for i in range(4)]
    Pool(4, ["0", "1"]).run(tasks)
    assert sorted((tmp_path / str(i)).read_text().strip() for i in range(4)) == ["0", "0", "1", "1"]


def test_a_task_of_two_gpus_waits_until_both_are_free_and_others_go_before(tmp_path: Path) -> None:
    slow = Task(python(SAY_WHERE.replace("0.3", "1.5")), tmp_path / "slow", gpus=1)
    wide = Task(python(SAY_WHERE), tmp_path / "wide", gpus=2)
    narrow = Task(python(SAY_WHERE), tmp_path / "narrow", gpus=1)
    Pool(2, ["0", "1"]).run([slow, wide, narrow])
    assert (tmp_path / "wide").read_text().strip() in ("0,1", "1,0")
    assert (narrow.began or 0) < (slow.ended or 0) <= (wide.began or 0)


@pytest.mark.parametrize(
    ("trainer", "gpus"),
    [
        ({}, 1),
        ({"devices": "auto"}, 1),
        ({"devices": 2}, 2),
        ({"devices": "2"}, 2),
        ({"devices": -1}, 4),
        ({"devices": [0, 1]}, None),
        ({"accelerator": "cpu", "devices": 2}, 0),
    ],
    ids=str,
)
def test_a_training_takes_as_many_gpus_as_its_trainer_would(trainer: dict[str, object], gpus: int | None) -> None:
    assert wanted_gpus(trainer, 4) == gpus
    assert wanted_gpus(trainer, 0) == 0


def test_a_task_is_no_rank_of_its_pools_and_has_its_share_of_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "NODE_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    say = python("import os; print(sorted(os.environ), os.environ['OMP_NUM_THREADS'])")
    Pool(2, []).run([Task(say, tmp_path / "one"), Task(say, tmp_path / "two")])
    said = (tmp_path / "one").read_text()
    assert not any(name in said for name in ("RANK", "WORLD_SIZE", "MASTER", "TORCHELASTIC"))
    assert int(said.split()[-1]) == max(1, len(os.sched_getaffinity(0)) // 2)


def test_a_task_over_its_time_is_ended_and_the_next_one_runs(tmp_path: Path) -> None:
    slow = Task(python("import time; time.sleep(60)"), tmp_path / "slow")
    quick = Task(python("pass"), tmp_path / "quick")
    Pool(1, [], time_limit=0.5).run([slow, quick])
    assert (slow.timed_out, slow.exit_code) == (True, -signal.SIGTERM)
    assert (quick.timed_out, quick.exit_code) == (False, 0)


def test_what_a_task_leaves_running_is_ended_with_it(tmp_path: Path) -> None:
    start = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid)"
    task = Task(python(start), tmp_path / "log")
    Pool(1, []).run([task])
    assert not is_alive(int((tmp_path / "log").read_text()))


def test_a_task_that_is_not_ready_holds_no_place(tmp_path: Path) -> None:
    other = Task(python("pass"), tmp_path / "other")
    held = Task(python("pass"), tmp_path / "held", ready=lambda: other.ended is not None)
    Pool(1, []).run([held, other])
    assert (other.ended or 0) <= (held.began or 0)


@pytest.mark.parametrize(("signum", "times"), [(signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGTERM, 2)])
def test_a_signal_reaches_every_process_of_a_task_and_starts_no_more(
    signum: signal.Signals, times: int, tmp_path: Path
) -> None:
    """A second one kills: here the processes ignore the first."""
    ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " if times == 2 else ""
    code = ignore + "import os, time; os.fork(); print(os.getpid(), flush=True); time.sleep(60)"
    first, second = Task(python(code), tmp_path / "first"), Task(python("pass"), tmp_path / "second")
    sent = 0

    def watch() -> None:
        nonlocal sent
        if sent < times and first.log.exists() and first.log.read_text().count("\n") == 2:
            os.kill(os.getpid(), signum)
            sent += 1

    with pytest.raises(Interrupted) as raised:
        Pool(1, []).run([first, second], watch)
    assert raised.value.code == 128 + signum
    assert second.began is None
    assert not any(is_alive(int(line)) for line in first.log.read_text().splitlines()[:2])


def test_tasks_end_with_a_pool_that_is_killed(tmp_path: Path) -> None:
    task = (
        "from charlm.pool import follow_pool as f; f(); import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    )
    pool = f"""
from pathlib import Path; import sys
from charlm.pool import Pool, Task
Pool(2, []).run([Task([sys.executable, "-c", {task!r}], Path({str(tmp_path)!r}) / str(i)) for i in range(2)])
"""
    process = subprocess.Popen([sys.executable, "-c", pool], cwd=ROOT, start_new_session=True)
    logs = [tmp_path / "0", tmp_path / "1"]
    wait_until(lambda: all(log.exists() and log.read_text().endswith("\n") for log in logs))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(is_alive(int(log.read_text())) for log in logs))
