"""What samples are worth: each measure against its definition, spelled out."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from charlm import copying, text_metrics
from charlm.copying import Copying, find_copying
from charlm.corpus import Corpus
from charlm.network import CharRNN
from charlm.text_metrics import METRICS, TrainingText, distinct_4grams, entropy, loop_rate, measured
from charlm.vocabulary import END, UNKNOWN, Vocabulary

# --- copying ------------------------------------------------------------------------------------------------------


def copied_by_the_book(sample: str, text: list[str]) -> Copying:
    """Look for every piece of a sample in every segment of a text."""
    n = len(sample)
    stands = {(i, j): any(sample[i:j] in segment for segment in text) for i in range(n) for j in range(i + 1, n + 1)}
    copied = {
        position
        for (i, j), there in stands.items()
        if there and j - i == copying.LENGTH
        for position in range(i, j)
    }  # fmt: skip
    return Copying(max((j - i for (i, j), there in stands.items() if there), default=0), len(copied) / n if n else 0.0)


def found(samples: list[str], text: list[str], dtype: type = np.uint8) -> list[Copying]:
    def ids(string: str) -> np.ndarray:
        return np.array([ord(char) for char in string], dtype=dtype)

    bounds = np.cumsum([0, *map(len, text)]).tolist()
    return find_copying([ids(sample) for sample in samples], ids("".join(text)), list(pairwise(bounds)))


few_letters = st.text(alphabet="ab", max_size=40)  # so that runs in common are long


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32])
@pytest.mark.parametrize("multiplier", [copying._MULTIPLIER, 1])  # 1: each order of the same characters collides
@settings(max_examples=60, deadline=None)
@given(samples=st.lists(few_letters, min_size=1, max_size=3), text=st.lists(few_letters, min_size=1, max_size=4))
def test_copying_is_what_a_search_for_every_piece_finds_also_where_hashes_collide_and_chunks_are_small(
    dtype: type, multiplier: int, samples: list[str], text: list[str]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "LENGTH", 5)
        patch.setattr(copying, "_CHUNK", 7)
        patch.setattr(copying, "_MULTIPLIER", multiplier)
        assert [
            (c.longest, pytest.approx(c.share, nan_ok=True)) for c in map(copied_by_the_book, samples, [text] * 9)
        ] == [(copy.longest, 0.0 if math.isnan(copy.share) else copy.share) for copy in found(samples, text, dtype)]


def test_a_copy_from_any_place_of_a_long_text_is_found_whole() -> None:
    draw = np.random.default_rng(0)
    text = "".join(map(chr, draw.integers(97, 123, size=200_000)))
    for place in (0, copying._CHUNK - 50, copying._CHUNK, 2 * copying._CHUNK - 1, len(text) - 100):
        (copy,) = found(["~" * 100 + text[place : place + 100] + "~" * 50], [text])
        assert copy == Copying(100, 0.4)


def test_a_run_does_not_go_on_from_one_document_into_the_next() -> None:
    (copy,) = found(["a" * 20 + "b" * 20], ["a" * 20, "b" * 20])
    assert copy == Copying(20, 0.0)


def test_a_long_loop_of_what_the_text_is_full_of_is_no_trouble() -> None:
    (copy,) = found(["-" * 5000], ["-" * 300_000])
    assert copy == Copying(5000, 1.0)


# --- words, variety, loops ----------------------------------------------------------------------------------------


def corpus(text: str, segments: list[tuple[int, int]] | None = None) -> Corpus:
    vocabulary = Vocabulary([UNKNOWN, *sorted(set(text)), END])
    block = vocabulary.encode(text)
    return Corpus(vocabulary, block, {"train": segments or [(0, len(block))]}, {}, {})


def test_real_words_are_those_of_the_training_split_whatever_their_case() -> None:
    training = TrainingText(corpus("The sea, and a hill.\nL'été 3rd under_score", [(0, 40)]))
    assert training.real_words(["THE SEA the", "hill xyzzy. ", "sea hil", "été, été, ètè!", "12 ... ", ""]) == [
        *(1.0, 0.5, 1.0, pytest.approx(2 / 3)),
        *(pytest.approx(math.nan, nan_ok=True),) * 2,
    ]
    assert training.real_words(["score."]) == [0.0]  # behind the split's end
    assert training.real_words(["hill wor d"]) == [0.5]  # a letter that ends a text is no word that was cut


@settings(max_examples=50, deadline=None)
@given(text=st.text(alphabet="ab ", min_size=1, max_size=300), piece=st.integers(1, 30))
def test_no_word_of_the_training_split_is_missed_where_it_is_read_in_pieces(text: str, piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_metrics, "_PIECE", piece)
        patch.setattr(text_metrics, "_LONGEST_WORD", 300)
        training = TrainingText(corpus(text))
        words = [word for word in text.split() if len(word) > 1]
        assert training.real_words([" ".join(words) + " "]) == [pytest.approx(1.0 if words else math.nan, nan_ok=True)]
        assert "".join(training._pieces()) == text


@given(st.text(alphabet="abc", max_size=50))
def test_distinct_4grams_are_as_many_as_there_are_over_as_many_as_there_could_be(text: str) -> None:
    grams = [text[i : i + 4] for i in range(len(text) - 3)]
    expected = len(set(grams)) / len(grams) if grams else math.nan
    assert distinct_4grams(text) == pytest.approx(expected, nan_ok=True)


def looped_by_the_book(text: str) -> float:
    """Try every stretch as a loop of every period."""
    repeated = set()
    for start in range(len(text)):
        for stop in range(start + text_metrics.LOOP_LENGTH, len(text) + 1):
            for period in range(1, (stop - start) // text_metrics.LOOP_TURNS + 1):
                if all(text[i] == text[i - period] for i in range(start + period, stop)):
                    repeated.update(range(start + period, stop))
    return len(repeated) / len(text) if text else math.nan


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.text(alphabet="abc", min_size=1, max_size=6), st.integers(1, 6)), max_size=4).map(
        lambda parts: "".join(part * times for part, times in parts)[:60]
    )
)
def test_loops_are_all_stretches_of_three_turns_and_twenty_characters(text: str) -> None:
    assert loop_rate(text) == pytest.approx(looped_by_the_book(text), nan_ok=True)


def test_a_text_that_goes_in_a_circle_is_known_by_its_loop_rate() -> None:
    assert loop_rate("the same string of " * 50) == pytest.approx(49 / 50)
    assert loop_rate("An indentation    and ... an ellipsis, -- and nothing that comes again and again.") == 0


# --- all together -------------------------------------------------------------------------------------------------


def test_entropy_is_between_none_and_that_of_an_even_draw() -> None:
    torch.manual_seed(0)
    network = CharRNN(8, "gru", 4)
    with torch.no_grad():
        network.output.weight.zero_()
        network.output.bias.zero_()
        assert entropy(network, [1, 2], [3, 4, 5]) == pytest.approx(3.0)  # bits of one of eight
        network.output.bias[5] = 100.0
        assert entropy(network, [], [3, 4, 5]) == pytest.approx(0.0, abs=1e-6)
        assert math.isnan(entropy(network, [1], []))


def test_entropy_is_that_of_the_distributions_that_were_drawn_from_without_a_prompt_too() -> None:
    torch.manual_seed(0)
    vocabulary = Vocabulary([UNKNOWN, "\n", *"ab"])
    network = CharRNN(len(vocabulary), "lstm", 8)
    (row,) = measured([{"prompt": "", "text": "abba"}], network, vocabulary)
    assert row["entropy"] == pytest.approx(entropy(network, [1], [2, 3, 3, 2]))  # drawn behind a newline


@pytest.mark.parametrize("text", ["", "a", "abab " * 30])
def test_every_measure_is_there_for_every_text(text: str) -> None:
    made = corpus("abab abab ba " * 20)
    network = CharRNN(len(made.vocabulary), "rnn", 4)
    row = {"prompt": "a", "text": text}
    (alone,) = measured([row], network, made.vocabulary)
    (whole,) = measured([row], network, made.vocabulary, TrainingText(made))
    assert tuple(whole) == ("prompt", "text", *METRICS)
    assert list(alone) == ["prompt", "text", "distinct_4grams", "loop_rate", "entropy"]
    assert all(math.isnan(whole[name]) or whole[name] >= 0 for name in METRICS)


def test_a_memory_mapped_text_is_read_like_any_other(tmp_path: Path) -> None:
    text = "The sea and a hill under some old tree, where nobody waits for rain.\n" * 50
    inside = corpus(text)
    (tmp_path / "block").write_bytes(inside.block.tobytes())
    mapped = np.memmap(tmp_path / "block", dtype=inside.block.dtype, mode="r")
    outside = Corpus(inside.vocabulary, mapped, inside.segments, {}, {})
    samples = [text[5:90], "some old sea where rain waits"]
    assert TrainingText(outside).measure(samples) == TrainingText(inside).measure(samples)
