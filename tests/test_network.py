"""The network's shapes, state and input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from charlm.config import TrainConfig
from charlm.errors import InputError
from charlm.network import DEFAULT_EMBEDDING, LARGEST_ONE_HOT, CharRNN, parts, sized

CELLS = ("lstm", "gru", "rnn")


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("embedding_size", [0, 5])
def test_chunks_with_carried_state_equal_one_forward(cell: str, num_layers: int, embedding_size: int) -> None:
    torch.manual_seed(0)
    network = CharRNN(11, cell, 7, num_layers, embedding_size=embedding_size).eval()
    ids = torch.randint(11, (3, 30))
    whole, end = network(ids)
    state, chunks = None, []
    for chunk in ids.split((4, 1, 16, 9), dim=1):
        logits, state = network(chunk, state)
        chunks.append(logits)
    torch.testing.assert_close(torch.cat(chunks, dim=1), whole)
    assert state is not None
    for found, expected in zip(parts(state), parts(end), strict=True):
        torch.testing.assert_close(found, expected)


def test_one_hot_input_is_the_recurrence_over_one_hot_vectors() -> None:
    torch.manual_seed(0)
    network = CharRNN(9, "lstm", 5).eval()
    ids = torch.randint(9, (2, 6))
    hidden, _ = network.rnn(nn.functional.one_hot(ids, 9).float())
    torch.testing.assert_close(network(ids)[0], network.output(hidden))


@pytest.mark.parametrize("cell", CELLS)
def test_a_scaled_one_hot_input_begins_alike_and_learns_faster_by_the_scale(cell: str) -> None:
    networks = []
    for scale in (1.0, 8.0):
        torch.manual_seed(0)
        networks.append(CharRNN(9, cell, 5, one_hot_scale=scale))
    ids = torch.randint(9, (2, 6))
    scores = [network(ids)[0] for network in networks]
    torch.testing.assert_close(scores[1], scores[0])
    for logits in scores:
        logits.logsumexp(-1).sum().backward()
    plain, scaled = (network.rnn for network in networks)
    assert plain.weight_ih_l0.grad is not None
    torch.testing.assert_close(scaled.weight_ih_l0 * 8, plain.weight_ih_l0)
    torch.testing.assert_close(scaled.weight_ih_l0.grad, plain.weight_ih_l0.grad * 8)
    torch.testing.assert_close(scaled.weight_hh_l0.grad, plain.weight_hh_l0.grad)


@pytest.mark.parametrize(
    ("vocabulary_size", "embedding_size", "tied", "input_size"),
    [
        (LARGEST_ONE_HOT, None, False, LARGEST_ONE_HOT),
        (LARGEST_ONE_HOT + 1, None, False, DEFAULT_EMBEDDING),
        (LARGEST_ONE_HOT + 1, 0, False, LARGEST_ONE_HOT + 1),
        (10, 4, False, 4),
        (10, None, True, 6),
    ],
)
def test_the_input_is_one_hot_or_an_embedding(
    vocabulary_size: int, embedding_size: int | None, tied: bool, input_size: int
) -> None:
    network = CharRNN(vocabulary_size, "gru", 6, embedding_size=embedding_size, tied=tied)
    assert network.rnn.input_size == input_size
    assert network(torch.zeros(2, 3, dtype=torch.long))[0].shape == (2, 3, vocabulary_size)


def test_tied_weights_are_one_matrix() -> None:
    network = CharRNN(10, "gru", 6, tied=True)
    assert network.embedding is not None
    assert network.output.weight is network.embedding.weight
    with pytest.raises(InputError, match="hidden_size=6"):
        CharRNN(10, "gru", 6, embedding_size=5, tied=True)


def test_forget_gates_begin_open() -> None:
    network = CharRNN(10, "lstm", 4, num_layers=2)
    for layer in range(2):
        bias = getattr(network.rnn, f"bias_ih_l{layer}") + getattr(network.rnn, f"bias_hh_l{layer}")
        assert bias[4:8].tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("cell", "size", "spread"),
    [("lstm", 100, 3.0), ("lstm", 500, 3**-0.5), ("gru", 100, 3**-0.5), ("rnn", 100, 3**-0.5)],
)
def test_a_small_lstm_begins_with_layers_that_hear_of_each_other(cell: str, size: int, spread: float) -> None:
    """In units of 1/sqrt(H); torch's own, uniform in +-1 of them, has a spread of 0.58."""
    network = CharRNN(10, cell, size, num_layers=3)
    for layer in (1, 2):
        weight = getattr(network.rnn, f"weight_ih_l{layer}").detach()
        assert float(weight.std()) * size**0.5 == pytest.approx(spread, rel=0.05)
    uniform = CharRNN(10, cell, size, num_layers=3, uniform_init=0.08)
    assert float(uniform.rnn.weight_ih_l1.detach().abs().max()) <= 0.08


@pytest.mark.parametrize(
    ("options", "spread"),
    [({}, 3**-0.5), ({"output_gain": 2.0}, 2.0), ({"tied": True}, 1.0), ({"tied": True, "output_gain": 2.0}, 2.0)],
    ids=str,
)
def test_the_output_begins_with_its_gain(options: dict[str, Any], spread: float) -> None:
    """In units of 1/sqrt(H), as above."""
    weight = CharRNN(100, "gru", 100, **options).output.weight.detach()
    assert float(weight.std()) * 10 == pytest.approx(spread, rel=0.05)


def test_dropout_acts_in_training_alone() -> None:
    network = CharRNN(10, "rnn", 8, dropout=0.5)
    ids = torch.zeros(1, 4, dtype=torch.long)
    assert not torch.equal(network(ids)[0], network(ids)[0])
    network.eval()
    assert torch.equal(network(ids)[0], network(ids)[0])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("parameters", [20_000, 1_300_000])
def test_the_hidden_size_comes_closest_to_the_number_of_parameters(
    cell: str, num_layers: int, parameters: int, composed: Callable[..., TrainConfig]
) -> None:
    model = composed(f"model={cell}", f"model.num_layers={num_layers}", f"model.parameters={parameters}").model

    def distance(hidden_size: int) -> int:
        network = CharRNN(65, cell, hidden_size, num_layers)
        return abs(sum(parameter.numel() for parameter in network.parameters()) - parameters)

    arguments = sized(model, 65)
    assert "parameters" not in arguments
    chosen = arguments["hidden_size"]
    step = 8 if chosen >= 128 else 1
    assert chosen % step == 0
    assert distance(chosen) == min(distance(chosen - step), distance(chosen), distance(chosen + step))


def test_too_few_parameters_are_refused(composed: Callable[..., TrainConfig]) -> None:
    with pytest.raises(InputError, match=r"model.parameters=100 is too few: .* has 402"):
        sized(composed("model.parameters=100").model, 65)


def test_all_weights_begin_uniform_where_a_range_is_given() -> None:
    network = CharRNN(10, "lstm", 32, num_layers=2, uniform_init=0.08)
    for name, parameter in network.named_parameters():
        assert float(parameter.detach().abs().max()) <= (1.0 if "bias" in name else 0.08)
        if parameter.ndim == 2:
            assert float(parameter.detach().std()) == pytest.approx(0.08 / 3**0.5, rel=0.1)
    assert network.rnn.bias_ih_l0[32:64].tolist() == [1.0] * 32
