"""The sampler."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from charlm import generate
from charlm.draw import draw, prepared
from charlm.errors import InputError
from charlm.generate import Sampler, next_character_entropy, prompt_ids
from charlm.network import CharRNN
from charlm.vocabulary import END, UNKNOWN, Vocabulary


def many(logits: list[float], temperature: float, count: int = 20_000, **options: float) -> np.ndarray:
    """Draw from the same logits many times and return how often each id came."""
    uniform = torch.from_numpy(np.random.default_rng(0).random(count))
    rows = torch.tensor([logits]).expand(count, -1)
    ids = drawn(rows, temperature, uniform, **options)
    return np.bincount(ids.numpy(), minlength=len(logits))


def drawn(logits: torch.Tensor, temperature: float, uniform: torch.Tensor, **options: float) -> torch.Tensor:
    cold, numbers = prepared(torch.full((len(logits),), temperature), uniform)
    return draw(logits, logits / cold[:, None], numbers, **options)  # type: ignore[arg-type]


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = counts.sum() * probabilities
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.fixture
def sampler() -> Sampler:
    torch.manual_seed(0)
    vocabulary = Vocabulary([UNKNOWN, "\n", *"abcdefgh"])
    return Sampler(CharRNN(len(vocabulary), "lstm", 12), vocabulary)


def test_temperature_0_is_the_largest() -> None:
    torch.manual_seed(0)
    logits, uniform = torch.randn(50, 20), torch.rand(50)
    assert torch.equal(drawn(logits, 0.0, uniform), logits.argmax(dim=1))


def test_an_infinite_temperature_is_uniform() -> None:
    counts = many([5.0, -3.0, 0.0, 100.0, -100.0], torch.inf)
    assert chi_square(counts, np.full(5, 0.2)) < 18.47  # 0.1 % of the chi-square distribution with 4 degrees


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    logits = np.array([1.0, 0.0, -1.0, 2.0])
    weights = np.exp(logits / temperature)
    assert chi_square(many(logits.tolist(), temperature), weights / weights.sum()) < 16.27  # 0.1 %, 3 degrees


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-10])
def test_a_tiny_temperature_is_greedy_not_a_number_gone_wrong(temperature: float) -> None:
    assert many([1.0, 3.0, 2.0], temperature, 100).tolist() == [0, 100, 0]


def test_top_k_keeps_the_k_likeliest() -> None:
    assert np.flatnonzero(many([0.0, 0.3, 0.1, 0.2], 1.0, top_k=2)).tolist() == [1, 3]
    assert np.flatnonzero(many([0.0, 0.3], 1.0, top_k=10)).tolist() == [0, 1]


def test_top_p_keeps_the_fewest_that_suffice() -> None:
    logits = np.log([0.1, 0.5, 0.15, 0.25]).tolist()
    assert np.flatnonzero(many(logits, 1.0, top_p=0.74)).tolist() == [1, 3]
    assert np.flatnonzero(many(logits, 1.0, top_p=0.76)).tolist() == [1, 2, 3]
    assert np.flatnonzero(many(logits, 1.0, top_p=0.01)).tolist() == [1]


def test_the_last_of_the_distribution_is_never_passed() -> None:
    logits = torch.tensor([[0.0, 0.0, -1e4]])  # the last is of probability 0
    assert drawn(logits, 1.0, torch.tensor([np.nextafter(1.0, 0.0)])).tolist() == [1]


def test_the_same_seed_gives_the_same_text_whatever_is_drawn_beside_it(sampler: Sampler) -> None:
    alone = sampler.texts([2], 40, [0.8], [(7, 1)])
    beside = sampler.texts([2], 40, [0.0, 0.8, 1.5, 0.8], [(7, 0), (7, 1), (7, 2), (8, 1)])
    assert beside[1] == alone[0]
    assert len(set(beside)) == 4


def test_unknown_is_never_written(sampler: Sampler) -> None:
    sampler.network.output.bias.data[0] = 100.0
    assert UNKNOWN not in "".join(sampler.texts([2], 50, [0.0, 1.0, torch.inf], [(1, 0)] * 3))


def test_a_text_goes_on_from_its_prompt_as_from_any_text(sampler: Sampler) -> None:
    first = sampler.texts([2, 3], 20, [0.0], [(0, 0)])[0]
    ids = [2, 3, *(int(i) for i in sampler.vocabulary.encode(first[:5]))]
    assert sampler.texts(ids, 15, [0.0], [(0, 0)])[0] == first[5:]


def test_an_empty_prompt_begins_behind_a_newline(sampler: Sampler) -> None:
    assert sampler.texts([], 20, [0.7], [(0, 0)]) == sampler.texts([1], 20, [0.7], [(0, 0)])


def test_an_empty_prompt_works_without_newline_or_end() -> None:
    vocabulary = Vocabulary([UNKNOWN, "a", "b"])
    texts = Sampler(CharRNN(3, "gru", 4), vocabulary).texts([], 30, [1.0], [(0, 0)])
    assert len(texts[0]) == 30


def test_a_text_stops_behind_its_stop(sampler: Sampler) -> None:
    whole = sampler.texts([2], 60, [1.0, 1.0], [(1, 0), (1, 1)])
    stop = whole[0][10:12]
    pieces = list(sampler.grow([2], 60, [1.0, 1.0], [(1, 0), (1, 1)], stop))
    for number, text in enumerate(whole):
        found = "".join(row[number] for row in pieces)
        assert found == (text[: text.index(stop) + len(stop)] if stop in text else text)


def test_a_text_ends_at_the_end_symbol_without_showing_it() -> None:
    vocabulary = Vocabulary([UNKNOWN, "a", END])
    network = CharRNN(3, "rnn", 4)
    network.output.bias.data = torch.tensor([0.0, 0.0, 50.0])
    assert Sampler(network, vocabulary).texts([1], 20, [1.0], [(0, 0)]) == [""]


def test_sampling_leaves_the_network_in_training(sampler: Sampler) -> None:
    sampler.network.train()
    sampler.texts([2], 3, [1.0], [(0, 0)])
    assert sampler.network.training


def test_an_unknown_prompt_character_is_named(sampler: Sampler) -> None:
    with pytest.raises(InputError, match=r"the prompt has 'é' \(U\+00E9\)"):
        prompt_ids(sampler.vocabulary, "abé")
    assert prompt_ids(sampler.vocabulary, "abé", "replace") == [2, 3, 0]


def test_the_entropy_of_the_next_character_is_that_of_the_networks_distribution(sampler: Sampler) -> None:
    ids = torch.tensor([[2, 5, 7], [3, 3, 1]])
    logits = sampler.network.eval()(ids)[0].detach().double().numpy()  # (B, T, V)
    weights = np.exp(logits)
    probabilities = weights / weights.sum(axis=-1, keepdims=True)
    expected = -(probabilities * np.log(probabilities)).sum(axis=-1)
    sampler.network.train()
    for piece in (1024, 2):  # a long text is read piece by piece
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generate, "_PIECE", piece)
            entropy = next_character_entropy(sampler.network, ids)
        assert sampler.network.training
        assert entropy.numpy() == pytest.approx(expected, abs=1e-5)


def test_the_entropy_lies_between_certain_and_uniform(sampler: Sampler) -> None:
    size = len(sampler.vocabulary)
    sampler.network.output.weight.data.zero_()
    sampler.network.output.bias.data.zero_()
    assert next_character_entropy(sampler.network, torch.tensor([[1]])).item() == pytest.approx(np.log(size), abs=1e-5)
    sampler.network.output.bias.data[3] = 1e4
    assert next_character_entropy(sampler.network, torch.tensor([[1]])).item() == 0
