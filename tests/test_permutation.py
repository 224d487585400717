"""The order of shuffled windows, which is computed and not stored."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from charlm.windows import Permutation, ShuffledBatches, Windows

# Every small size, where the walk is the longest, then each side of the powers of two up to 10^5.
SIZES = [*range(1, 300), *(2**k + d for k in range(9, 17) for d in (-1, 0, 1)), 99_999, 100_000]


def test_every_size_gives_each_number_once() -> None:
    for size in SIZES:
        order = Permutation(size, (7, size))(np.arange(size))
        assert np.array_equal(np.sort(order), np.arange(size)), size


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 10**5), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**6))
def test_any_seed_gives_each_number_once(size: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(Permutation(size, (seed, epoch))(np.arange(size))), np.arange(size))


@settings(max_examples=30, deadline=None)
@given(size=st.integers(10**10 - 10**7, 10**10 + 10**7), seed=st.integers(0, 2**32))
def test_ten_thousand_million_windows_repeat_none_and_stay_in_range(size: int, seed: int) -> None:
    index = np.unique(np.random.default_rng(seed).integers(size, size=10**5))
    order = Permutation(size, (seed, 0))(index)
    assert order.min() >= 0
    assert order.max() < size
    assert len(np.unique(order)) == len(index)


def chi_square(counts: np.ndarray, expected: float) -> float:
    """Return how many standard deviations the statistic lies from its mean, under uniformity."""
    freedom = counts.size - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    return abs(statistic - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize("size", [1000, 100_003])
def test_a_window_comes_at_every_place_alike_over_the_epochs(size: int) -> None:
    places = np.array([Permutation(size, (3, epoch))(np.array([0, 1, size // 2, size - 1])) for epoch in range(4000)])
    for window in range(4):
        assert chi_square(np.bincount(places[:, window] * 20 // size, minlength=20), 200) < 5


def test_neighbouring_places_have_windows_from_all_over_the_text() -> None:
    size = 10**6
    first, second = Permutation(size, (0, 0))(np.arange(size)).reshape(-1, 2).T  # disjoint pairs
    pairs = np.bincount((first * 10 // size) * 10 + second * 10 // size, minlength=100)
    assert chi_square(pairs, size / 2 / 100) < 5


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    size = 10_000
    orders = [Permutation(size, seed)(np.arange(size)) for seed in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]]
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert (one == other).sum() < 15  # independent orders agree in one place on average
            assert abs(np.corrcoef(one, other)[0, 1]) < 0.05


@pytest.mark.parametrize("ranks", range(1, 9))
def test_ranks_share_an_epoch_without_overlap(ranks: int) -> None:
    windows = Windows([(0, 400), (450, 1200)], window=10)
    shards = [
        torch.cat(list(ShuffledBatches(torch.zeros(1200), windows, 8, seed=5, rank=r, world_size=ranks).starts(2, 0)))
        for r in range(ranks)
    ]
    seen = torch.cat(shards)
    whole = len(windows) // (8 * ranks) * 8 * ranks
    assert len({len(shard) for shard in shards}) == 1
    assert len(seen) == len(seen.unique()) == whole  # all but what does not fill a batch of all ranks
    assert len(windows) - whole < 8 * ranks
    assert set(seen.tolist()) <= {*range(390), *range(450, 1190)}


def test_an_epoch_taken_up_in_the_middle_goes_on_as_it_would_have() -> None:
    batches = ShuffledBatches(torch.zeros(5000), Windows([(0, 5000)], window=10), 16, seed=1)
    assert torch.equal(torch.stack(list(batches.starts(3, 0)))[100:], torch.stack(list(batches.starts(3, 100))))
