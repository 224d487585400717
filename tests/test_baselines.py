"""What a test figure stands beside is a probability, and what compressors really come to."""

from __future__ import annotations

import bz2
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from charlm.baselines import baselines, ngram_nats
from charlm.config import TrainConfig
from charlm.corpus import Corpus, load_corpus

V = 5


def drawn(length: int, seed: int = 0) -> np.ndarray:
    """A text in which each character says much of the next."""
    draw, ids = np.random.default_rng(seed), [1]
    for _ in range(length - 1):
        ids.append((ids[-1] + int(draw.choice([1, 1, 1, 2, 3]))) % V)
    return np.array(ids, dtype=np.uint8)


@pytest.mark.parametrize("order", [1, 2, 4])
@pytest.mark.parametrize("context", [[], [3], [0, 1, 2], [4, 4, 4, 4]])
def test_the_probabilities_of_all_next_characters_sum_to_one(order: int, context: list[int]) -> None:
    train = drawn(300)
    total = 0.0
    for symbol in range(V):
        block = np.concatenate([train, np.array([*context, symbol], dtype=np.uint8)])
        total += math.exp(-ngram_nats(block, [(0, 300)], [(300, len(block))], order, V)[-1])
    assert total == pytest.approx(1.0)


def test_a_symbol_that_training_never_saw_is_possible() -> None:
    block = np.array([0, 1, 0, 1, 0, 1, 2], dtype=np.uint8)
    nats = ngram_nats(block, [(0, 6)], [(6, 7)], 3, 3)
    assert np.isfinite(nats).all()
    even = np.random.default_rng(0).integers(1, 5, 20_000).astype(np.uint8)  # where discounts are estimated as none
    even[-10] = 0
    assert np.isfinite(ngram_nats(even, [(0, 18_000)], [(18_000, 20_000)], 6, 5)).all()


def test_the_kneser_ney_probability_is_the_formula_by_hand() -> None:
    # "abab" + "ac": counts of two characters ab 2, ba 2 (one of them before the c), ac 1.
    block = np.array([0, 1, 0, 1, 0, 2, 0, 1], dtype=np.uint8)
    nats = ngram_nats(block, [(0, 6)], [(6, 8)], 2, 3)
    # Different characters before each one, the border before the text among them: a 2 (border, b), b 1 (a), c 1 (a).
    # Of these counts two are 1 and one is 2, so that D is 1/2 for 1, and for 2, where none is 3, the same.
    lower = {symbol: (c - 0.5 + 1.5 / 3) / 4 for symbol, c in (("a", 2), ("b", 1), ("c", 1))}
    # Pairs: border-a 1, ab 2, ba 2, ac 1: two with count 1, two with 2, none with 3: Y = 2 / (2 + 4) = 1/3 and
    # D1 = 1 - 2 Y = 1/3; D2 = Y, since there is no 3 to estimate it from.
    of_b_after_a = (2 - 1 / 3 + (1 / 3 + 1 / 3) * lower["b"]) / 3
    assert math.exp(-nats[1]) == pytest.approx(of_b_after_a)


def test_a_longer_context_predicts_better_and_each_segment_stands_alone() -> None:
    block = drawn(4000)
    segments = [(3000, 3500), (3500, 4000)]
    one, two = (ngram_nats(block, [(0, 3000)], segments, order, V) for order in (1, 2))
    assert len(one) == 1000
    assert two.mean() < one.mean() - 0.3
    alone = ngram_nats(block, [(0, 3000)], segments[1:], 2, V)
    np.testing.assert_allclose(two[500:], alone)


@pytest.fixture
def corpus(composed: Callable[..., TrainConfig], text_file: Path) -> Corpus:
    return load_corpus(composed("data=text", f"data.path={text_file}").data)


def test_the_compressors_see_the_test_text(corpus: Corpus, text_file: Path) -> None:
    found = baselines(corpus, 6)
    text = text_file.read_text()[-1200:]
    assert found["baseline/bzip2_bpc"] == pytest.approx(8 * len(bz2.compress(text.encode())) / 1200)
    assert found["baseline/xz_given_train_bpc"] < found["baseline/xz_bpc"]
    assert found["baseline/ngram_bpc"] == pytest.approx(found["baseline/ngram_loss"] / math.log(2))
    # Seven words of fourteen a line: ln 14 nats a word of 4.3 characters, and little more for what no network knows.
    assert 0.6 < found["baseline/ngram_loss"] < 1.2
