"""A copy that learns while it reads: what it scores, and what it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from charlm.config import EvaluationConfig, TrainConfig
from charlm.corpus import Corpus, load_corpus
from charlm.dynamic import dynamic_loss
from charlm.network import CharRNN

CPU = torch.device("cpu")


@pytest.fixture
def config(composed: Callable[..., TrainConfig], text_file: Path) -> TrainConfig:
    return composed("data=text", f"data.path={text_file}", "evaluation.dynamic=sgd")


@pytest.fixture
def corpus(config: TrainConfig) -> Corpus:
    return load_corpus(config.data)


def network(corpus: Corpus, cell: str = "lstm", **options: float) -> CharRNN:
    torch.manual_seed(0)
    regularization = {"hidden_dropout": 0.5, "activation": 2.0}
    return CharRNN(len(corpus.vocabulary), cell, 16, 2, dropout=0.5, regularization=regularization, **options)


def static_loss(model: CharRNN, corpus: Corpus) -> float:
    ((start, stop),) = corpus.segments["test"]
    tokens = torch.from_numpy(corpus.block[start:stop])[None].long()
    with torch.no_grad():
        logits, _ = model.eval()(tokens[:, :-1])
    return float(F.cross_entropy(logits[0], tokens[0, 1:]))


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("rule", ["sgd", "rms"])
def test_at_a_rate_of_next_to_nothing_it_is_the_static_loss(
    cell: str, rule: str, corpus: Corpus, config: TrainConfig
) -> None:
    model = network(corpus, cell)
    still = replace(config.evaluation, dynamic=rule, dynamic_learning_rate=1e-30)
    assert dynamic_loss(model, corpus, still, CPU) == pytest.approx(static_loss(model, corpus), abs=1e-5)


@pytest.mark.parametrize(("rule", "rate"), [("sgd", 0.3), ("rms", 3e-3)])
def test_it_learns_from_what_it_reads_and_leaves_the_model_alone(
    rule: str, rate: float, corpus: Corpus, config: TrainConfig
) -> None:
    model = network(corpus)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learning = replace(config.evaluation, dynamic=rule, dynamic_learning_rate=rate, dynamic_decay=0.0)
    assert dynamic_loss(model, corpus, learning, CPU) < static_loss(model, corpus) - 0.3
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    assert model.regularizer.hidden_dropout == 0.5


@pytest.mark.parametrize(("rule", "rate"), [("sgd", 0.3), ("rms", 3e-3)])
def test_how_one_hot_vectors_are_scaled_changes_nothing(
    rule: str, rate: float, corpus: Corpus, config: TrainConfig
) -> None:
    learning = replace(config.evaluation, dynamic=rule, dynamic_learning_rate=rate)
    losses = [dynamic_loss(network(corpus, one_hot_scale=scale), corpus, learning, CPU) for scale in (1.0, 8.0)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_decay_holds_the_weights_back(corpus: Corpus, config: TrainConfig) -> None:
    def loss(decay: float) -> float:
        told: EvaluationConfig = replace(config.evaluation, dynamic_learning_rate=0.3, dynamic_decay=decay)
        return dynamic_loss(network(corpus), corpus, told, CPU)

    assert loss(0.0) < loss(0.3) < static_loss(network(corpus), corpus)


def test_a_piece_may_be_longer_than_the_text(corpus: Corpus, config: TrainConfig) -> None:
    longer = replace(config.evaluation, dynamic="rms", dynamic_learning_rate=1e-30, dynamic_window=10**9)
    assert dynamic_loss(network(corpus), corpus, longer, CPU) == pytest.approx(static_loss(network(corpus), corpus))


def test_a_character_is_scored_before_it_is_learnt_from(corpus: Corpus, config: TrainConfig) -> None:
    """What comes behind a piece changes nothing of its loss: with one piece in all, learning is too late."""
    ((start, stop),) = corpus.segments["test"]
    whole = replace(config.evaluation, dynamic_learning_rate=10.0, dynamic_window=stop - start)
    assert dynamic_loss(network(corpus), corpus, whole, CPU) == pytest.approx(static_loss(network(corpus), corpus))
