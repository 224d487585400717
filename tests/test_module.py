"""Loss, schedule, evaluation and what a checkpoint holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from charlm.config import TrainConfig
from charlm.generate import Sampler
from charlm.metrics import bits, bootstrap_standard_error
from charlm.module import CharLM, schedule
from charlm.network import sized
from charlm.vocabulary import UNKNOWN
from charlm.windows import Batch, LaneBatches, ShuffledBatches, Windows, evaluation_lanes

Composed = Callable[..., TrainConfig]


def model_of(config: TrainConfig, symbols: str, total_steps: int = 100) -> CharLM:
    torch.manual_seed(0)
    sizes = sized(config.model, len(symbols) + 1)
    return CharLM([UNKNOWN, *symbols], sizes, asdict(config.optimizer), total_steps)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_a_text_of_40_characters_can_be_learnt_by_heart(cell: str, composed: Composed) -> None:
    text = "how much wood would a woodchuck chuck; 7"
    assert len(text) == 40
    config = composed(f"model={cell}", "model.hidden_size=64", "model.dropout=0", "optimizer.weight_decay=0")
    model = model_of(config, "".join(sorted(set(text))))
    block = torch.from_numpy(model.vocabulary.encode(text))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    batches = ShuffledBatches(block, Windows([(0, 40)], 20), 20, seed=0)
    for _ in range(150):
        for batch in batches:
            loss = model.training_step(batch, 0)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    # From 4 characters on it is plain which of the places in the text this is.
    prompt = [int(i) for i in model.vocabulary.encode(text[:4])]
    assert Sampler(model.network, model.vocabulary).texts(prompt, 36, [0.0], [(0, 0)]) == [text[4:]]


@pytest.mark.parametrize("lanes", [1, 3])
def test_evaluation_is_the_mean_over_each_lane_read_in_one_go(lanes: int, composed: Composed) -> None:
    model = model_of(composed("model=gru", "model.hidden_size=8"), "abcdefg").eval()
    block = torch.from_numpy(np.random.default_rng(0).integers(1, 8, 100).astype(np.uint8))
    cut = evaluation_lanes([(0, 61), (61, 100)], lanes)
    model.on_validation_epoch_start()
    with torch.no_grad():
        for batch in LaneBatches(block, cut, 2, 7):
            model.validation_step(batch, 0)
        by_hand, count = 0.0, 0
        for start, stop in cut:
            logits, _ = model.network(block[None, start : stop - 1].long())
            by_hand += float(F.cross_entropy(logits[0], block[start + 1 : stop].long(), reduction="sum"))
            count += stop - start - 1
    nats = sum(float(scores.sum()) for scores in model._scores["nats"])
    characters = sum(int(lengths.sum()) for lengths in model._scores["characters"])
    assert characters == count
    assert nats == pytest.approx(by_hand, rel=1e-5)


def test_a_validation_leaves_the_carried_training_state_alone(composed: Composed) -> None:
    model = model_of(composed("model.hidden_size=8"), "abcdefg")
    block = torch.arange(1, 8, dtype=torch.uint8).repeat(10)
    model.training_step(Batch(block[:21].view(1, -1), fresh=True), 0)
    assert isinstance(model.carried, tuple)
    before = [part.clone() for part in model.carried]
    model.on_validation_epoch_start()
    for batch in LaneBatches(block, [(0, 70)], 1, 7):
        model.validation_step(batch, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.carried, strict=True))


def test_weight_decay_is_of_matrices_alone(composed: Composed) -> None:
    model = model_of(composed("optimizer.weight_decay=0.1"), "ab")
    groups = model.configure_optimizers()["optimizer"].param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {p.ndim for p in groups[0]["params"]} == {2}
    assert {p.ndim for p in groups[1]["params"]} == {1}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_the_rate_warms_up_and_falls_to_nothing_at_the_last_step() -> None:
    factor = schedule("cosine", 10, 110)
    assert [factor(step) for step in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert factor(60) == pytest.approx(0.5)
    assert factor(110) == pytest.approx(0.0)
    assert 0 < factor(109) < 0.001
    assert [schedule("constant", 2, 110)(step) for step in (0, 1, 2, 500)] == [0.5, 1.0, 1.0, 1.0]


def test_the_exponential_rate_falls_behind_each_epoch_from_a_number_on() -> None:
    factor = schedule("exponential", 2, 1000, steps_per_epoch=10, decay=0.5, decay_after=3)
    assert [factor(step) for step in (0, 2, 29, 30, 39, 40, 59)] == [0.5, 1.0, 1.0, 0.5, 0.5, 0.25, 0.125]
    assert [schedule("exponential", 0, 30, 10, 0.5, 0)(step) for step in (0, 9, 10, 20)] == [1.0, 1.0, 0.5, 0.25]


def test_one_bit_is_the_natural_logarithm_of_2() -> None:
    assert bits(math.log(2)) == pytest.approx(1.0)


def test_the_bootstrap_finds_the_standard_error_of_independent_blocks() -> None:
    draw = np.random.default_rng(0)
    characters = np.full(400, 100.0)
    nats = draw.normal(1.5, 0.2, 400) * characters
    assert bootstrap_standard_error(nats, characters) == pytest.approx(0.2 / math.sqrt(400), rel=0.15)
