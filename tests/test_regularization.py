"""Each regulariser alone: off it changes nothing, on it acts in training and leaves evaluation as it is."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from charlm import cudnn_layer
from charlm.network import CharRNN
from charlm.regularization import Regularizer

CELLS = ("lstm", "gru", "rnn")
DROPOUTS = ("input_dropout", "hidden_dropout", "output_dropout", "embedding_dropout", "weight_dropout")
PENALTIES = ("activation", "temporal_activation")
V, B, T, H = 11, 6, 9, 8


def network(cell: str = "lstm", num_layers: int = 2, embedding_size: int = 5, **regularization: float) -> CharRNN:
    torch.manual_seed(0)
    return CharRNN(V, cell, H, num_layers, dropout=0.0, embedding_size=embedding_size, regularization=regularization)


def ids() -> torch.Tensor:
    return torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))


def loss_of(model: CharRNN, seed: int = 2) -> torch.Tensor:
    torch.manual_seed(seed)
    logits, _ = model(ids())
    return model.regularizer.penalized(F.cross_entropy(logits.flatten(0, 1), ids().roll(-1, 1).flatten()))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_off_the_network_is_the_plain_stack_bit_for_bit(cell: str, num_layers: int) -> None:
    off = network(cell, num_layers, **dict.fromkeys(DROPOUTS + PENALTIES, 0.0))
    plain, inputs = copy.deepcopy(off), ids()
    hidden, end = plain.rnn(plain.embedding(inputs))  # type: ignore[misc]
    logits, state = off(inputs)
    assert torch.equal(logits, plain.output(hidden))
    assert all(torch.equal(a, b) for a, b in zip(state, end, strict=True))
    assert off.regularizer.penalized(torch.ones(())) == 1


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("carried", [False, True])
def test_layers_run_one_by_one_are_the_stack(cell: str, num_layers: int, carried: bool) -> None:
    """A share of weights to drop so small that none is: the layers run one by one, and nothing else happens."""
    apart, stack = network(cell, num_layers, weight_dropout=1e-12), network(cell, num_layers)
    with torch.no_grad():
        state = stack(ids())[1] if carried else None
    found, expected = apart(ids(), state), stack(ids(), state)
    torch.testing.assert_close(found, expected)
    for model, (logits, _) in ((apart, found), (stack, expected)):
        logits.square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
    for a, b in zip(apart.parameters(), stack.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("name", DROPOUTS + PENALTIES)
def test_each_acts_in_training_alone_and_lets_gradients_through(cell: str, num_layers: int, name: str) -> None:
    on, plain = network(cell, num_layers, **{name: 0.5}), network(cell, num_layers)
    if name == "hidden_dropout" and num_layers == 1:
        assert torch.equal(loss_of(on), loss_of(plain))  # there is no layer to stand between
        return
    loss = loss_of(on)
    assert not torch.equal(loss, loss_of(plain))
    if name in DROPOUTS:
        assert not torch.equal(loss, loss_of(on, seed=3))
    loss.backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in on.parameters())
    assert all(parameter.grad.any() for parameter in on.parameters())  # type: ignore[union-attr]
    on.eval(), plain.eval()
    assert torch.equal(loss_of(on), loss_of(plain))


def test_a_locked_mask_holds_for_the_whole_window_and_differs_by_row() -> None:
    regularizer = Regularizer(output_dropout=0.5)
    kept = regularizer.outputs(torch.ones(64, 10, 16), torch.ones(64, 10, 16))
    assert (kept == kept[:, :1]).all()
    assert len(kept[:, 0].unique(dim=0)) > 60
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert float(kept.mean()) == pytest.approx(1.0, abs=0.1)


def test_embedding_dropout_takes_every_place_of_a_character_in_a_row_or_none() -> None:
    regularizer = Regularizer(embedding_dropout=0.5)
    places = torch.arange(4).repeat(32, 5)  # each of 4 characters 5 times a row
    kept = regularizer.inputs(places, torch.ones(32, 20, 3), 4)
    assert (kept == kept[:, :, :1]).all()
    rows = kept[:, :, 0].view(32, 5, 4)
    assert (rows == rows[:, :1]).all()
    assert set(rows.unique().tolist()) == {0.0, 2.0}
    assert len(rows[:, 0].unique(dim=0)) > 8


def test_weight_dropout_zeroes_its_share_of_the_recurrent_weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    plain_gru = torch.gru

    def gru(inputs: torch.Tensor, hx: torch.Tensor, weights: list[torch.Tensor], *rest: object) -> object:
        seen.append(weights)
        return plain_gru(inputs, hx, weights, *rest)

    monkeypatch.setitem(cudnn_layer.LAYERS, torch.nn.GRU, gru)
    torch.manual_seed(0)
    model = CharRNN(V, "gru", 64, 2, regularization={"weight_dropout": 0.3})
    model(ids())
    assert len(seen) == 2
    for layer, (of_input, recurrent, *_) in enumerate(seen):
        assert of_input is getattr(model.rnn, f"weight_ih_l{layer}")
        whole = getattr(model.rnn, f"weight_hh_l{layer}")
        assert float((recurrent == 0).float().mean()) == pytest.approx(0.3, abs=0.02)
        torch.testing.assert_close(recurrent[recurrent != 0], whole[recurrent != 0] / 0.7)


def test_the_penalties_are_what_their_papers_say() -> None:
    hidden = torch.randn(2, 5, 3)
    regularizer = Regularizer(activation=2.0, temporal_activation=3.0)
    dropped = torch.nn.functional.dropout(hidden, 0.25)
    regularizer.outputs(hidden, dropped)
    expected = 2 * dropped.square().mean() + 3 * (hidden[:, 1:] - hidden[:, :-1]).square().mean()
    torch.testing.assert_close(regularizer.penalized(torch.zeros(())), expected)
    assert regularizer.penalized(torch.zeros(())) == 0  # each pass counts once


def test_one_hot_input_can_be_dropped_too() -> None:
    model = network(embedding_size=0, input_dropout=0.5, embedding_dropout=0.5)
    assert math.isfinite(float(loss_of(model).detach()))
