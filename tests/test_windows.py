"""Windows and the orders in which they come."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from charlm.cache import advise
from charlm.errors import InputError
from charlm.windows import (
    Batch,
    Batches,
    LaneBatches,
    ShuffledBatches,
    Windows,
    evaluation_lanes,
    gather,
    number_of_lanes,
    stream_lanes,
)

BLOCK = torch.arange(200)  # ids that say where they stand


def rows(batches: Batches) -> list[list[int]]:
    return [row for batch in batches for row in batch.tokens.tolist()]


@pytest.mark.parametrize(("length", "window"), [(11, 10), (50, 10), (50, 1), (101, 100)])
def test_a_text_of_length_l_has_l_minus_n_windows_and_they_are_its_slices(length: int, window: int) -> None:
    windows = Windows([(0, length)], window)
    assert len(windows) == length - window
    starts = torch.from_numpy(windows.starts(np.arange(len(windows))))
    assert gather(BLOCK, starts, window).tolist() == [list(range(i, i + window + 1)) for i in range(length - window)]


@pytest.mark.parametrize("stride", [1, 3, 7, 100])
def test_windows_begin_every_stride_and_cross_no_boundary(stride: int) -> None:
    segments = [(0, 30), (30, 35), (35, 36), (50, 90)]
    windows = Windows(segments, 9, stride)
    starts = windows.starts(np.arange(len(windows))).tolist()
    assert starts == [s for a, b in segments for s in range(a, b - 9, stride)]


def test_segments_shorter_than_a_window_have_none() -> None:
    assert len(Windows([(0, 5), (5, 15)], 10)) == 0


def shuffled(
    batch_size: int = 8, seed: int = 0, rank: int = 0, world_size: int = 1, length: int = 90
) -> ShuffledBatches:
    return ShuffledBatches(BLOCK, Windows([(0, length)], 10), batch_size, seed, rank, world_size)


def test_an_epoch_is_every_window_once_in_batches_of_one_size() -> None:
    batches = shuffled()
    seen = rows(batches)
    assert len(batches) == 10
    assert sorted(row[0] for row in seen) == list(range(80))
    assert all(row == list(range(row[0], row[0] + 11)) for row in seen)


def test_epochs_of_fewer_batches_are_the_first_of_each_or_always_the_same() -> None:
    for repeats in (False, True):
        batches = shuffled()
        batches.end, batches.repeats = 3, repeats
        epochs = [[batch.tokens.tolist() for batch in itertools.islice(batches, 3)] for _ in range(3)]
        whole = shuffled()
        firsts = [[batch.tokens.tolist() for batch in whole][:3] for _ in range(3)]
        assert epochs == ([firsts[0]] * 3 if repeats else firsts)


def test_what_does_not_fill_a_batch_is_left_out_and_differs_by_epoch() -> None:
    batches = shuffled(length=87)
    left_out = [set(range(77)) - {row[0] for row in rows(batches)} for _ in range(2)]
    assert [len(left) for left in left_out] == [5, 5]
    assert left_out[0] != left_out[1]


def test_another_epoch_or_seed_is_another_order() -> None:
    batches = shuffled()
    first, second = rows(batches), rows(batches)
    assert first != second
    assert first != rows(shuffled(seed=1))
    assert first == rows(shuffled())


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_ranks_together_read_each_batch_of_one_process_once(world_size: int) -> None:
    alone = list(shuffled(batch_size=3 * world_size, length=100))
    together = [list(shuffled(3, rank=rank, world_size=world_size, length=100)) for rank in range(world_size)]
    for step, batch in enumerate(alone):
        parts = torch.cat([together[rank][step].tokens for rank in range(world_size)])
        assert parts.tolist() == batch.tokens.tolist()


@pytest.mark.parametrize("taken", [0, 4, 10, 13])
def test_a_restored_place_goes_on_as_if_never_left(taken: int) -> None:
    undisturbed, left = shuffled(), shuffled()
    expected = rows(undisturbed) + rows(undisturbed)
    found: list[list[int]] = []
    iterator = iter(left)
    for count in range(taken):
        if count and count % len(left) == 0:
            iterator = iter(left)
        found += next(iterator).tokens.tolist()
    resumed = shuffled()
    resumed.load_state_dict(left.state_dict())
    while len(found) < len(expected):
        found += rows(resumed)
    assert found == expected


@pytest.mark.parametrize("taken", [0, 3, 7])
def test_windows_on_disk_are_asked_for_once_and_a_batch_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    np.arange(200, dtype=np.int16).tofile(tmp_path / "block")
    mapped = np.memmap(tmp_path / "block", np.int16, mode="c")
    asked: list[int] = []
    monkeypatch.setattr("charlm.windows.advise", lambda block, advice, start, stop: asked.append(start))
    in_memory, on_disk = (
        ShuffledBatches(torch.from_numpy(block), Windows([(0, 200)], 5), 8, seed=3, mapped=block)
        for block in (np.array(mapped), mapped)
    )
    for batches in (in_memory, on_disk):
        batches.load_state_dict({"epoch": 1, "position": taken})
    expected = [batch.tokens[:, 0].tolist() for batch in in_memory]
    assert asked == []
    for number, batch in enumerate(on_disk):
        assert batch.tokens[:, 0].tolist() == expected[number]
        assert asked == list(itertools.chain(*expected[: number + 2]))
        assert on_disk.state_dict() == {"epoch": 1, "position": taken + number + 1}


def test_any_part_of_a_mapped_block_can_be_asked_for(tmp_path: Path) -> None:
    content = np.arange(3 * 4096, dtype=np.int32)
    content.tofile(tmp_path / "block")
    mapped = np.memmap(tmp_path / "block", np.int32, mode="c")
    for start, stop in ((0, 1), (1023, 1025), (5000, 9000), (3 * 4096 - 1, 3 * 4096)):
        advise(mapped, "WILLNEED", start, stop)
        advise(mapped, "DONTNEED", start, stop)
    assert np.array_equal(mapped, content)


def scored(batches: list[Batch]) -> list[int]:
    """Return every target that counts."""
    targets = []
    for batch in batches:
        assert batch.lengths is not None
        for row, length in zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True):
            targets += row[1 : length + 1]
    return targets


@pytest.mark.parametrize("segments", [[(0, 200)], [(0, 101), (101, 103), (103, 104), (110, 200)], [(3, 5)]])
@pytest.mark.parametrize("lanes", [1, 4, 7])
@pytest.mark.parametrize("world_size", [1, 2])
def test_evaluation_scores_every_character_but_each_lanes_first_once(
    segments: list[tuple[int, int]], lanes: int, world_size: int
) -> None:
    cut = evaluation_lanes(segments, lanes)
    found = Counter[int]()
    for rank in range(world_size):
        found.update(scored(list(LaneBatches(BLOCK, cut, lanes, 8, rank, world_size))))
    whole = {i for start, stop in segments for i in range(start, stop) if stop - start > 1}
    assert set(found.values()) == {1}
    assert set(found) == whole - {start for start, _ in cut}


def test_evaluation_carries_on_within_a_lane_and_begins_anew_with_another() -> None:
    batches = list(LaneBatches(BLOCK, [(0, 60), (60, 120), (120, 140)], 2, 20))
    assert [batch.fresh for batch in batches] == [True, False, False, True]
    first, second = batches[0].tokens, batches[1].tokens
    assert first[:, -1].tolist() == second[:, 0].tolist()


def test_ranks_evaluate_batches_of_one_shape() -> None:
    cut = evaluation_lanes([(0, 200)], 5)
    shapes = [[len(batch.tokens) for batch in LaneBatches(BLOCK, cut, 5, 8, rank, 2)] for rank in (0, 1)]
    assert shapes[0] == shapes[1]


def test_streams_go_on_where_they_were_and_read_whole_windows() -> None:
    lanes = stream_lanes([(0, 200)], 4, 10)
    batches = list(LaneBatches(BLOCK, lanes, 4, 10))
    assert [stop - start for start, stop in lanes] == [41] * 4
    assert [batch.fresh for batch in batches] == [True, False, False, False]
    for before, after in itertools.pairwise(batches):
        assert before.tokens[:, -1].tolist() == after.tokens[:, 0].tolist()
        assert before.lengths is not None
        assert before.lengths.tolist() == [10] * 4


def test_streams_share_lanes_out_by_length() -> None:
    lanes = stream_lanes([(0, 150), (150, 200)], 4, 5)
    assert [sum(a >= start and b <= stop for a, b in lanes) for start, stop in [(0, 150), (150, 200)]] == [3, 1]


def test_streams_refuse_what_leaves_no_window() -> None:
    with pytest.raises(InputError, match=r"shorter than data\.window"):
        stream_lanes([(0, 30)], 4, 10)
    with pytest.raises(InputError, match="must not be joined"):
        stream_lanes([(0, 30), (30, 60), (60, 90)], 2, 10)


def test_a_larger_split_is_read_in_more_lanes_within_bounds() -> None:
    assert [number_of_lanes(n) for n in (0, 46_505, 160_000, 500_000, 10**9)] == [16, 16, 16, 50, 128]
