"""What is promised of a run that is killed, interrupted, or runs out of disk."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from lives import (
    KillAtFileEvent,
    KillWhileWriting,
    begin,
    begin_ranks,
    kill_after,
    live,
    outcome,
    same,
)

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
