"""The step that a run takes itself on a CPU is Lightning's step, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lives import Poison
from test_capture import Record, train

from charlm.manual import ManualCharLM, is_plain
from charlm.module import OPTIMIZERS, CharLM
from charlm.trainer import build_trainer


def alike(first: tuple[Record, L.Trainer, CharLM], second: tuple[Record, L.Trainer, CharLM]) -> bool:
    """Return whether two trainings had the same losses, rates and steps and came to the same weights."""
    weights = [model.state_dict() for _, _, model in (first, second)]
    records = [(record.losses, record.rates, record.steps) for record, _, _ in (first, second)]
    return records[0] == records[1] and all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("order", ["shuffled", "streams"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_manual_run_is_the_automatic_run(tmp_path: Path, cell: str, order: str, precision: str) -> None:
    given: dict[str, Any] = {
        "model": {"cell": cell, "num_layers": 2, "dropout": 0.2},
        "regularization": {"weight_dropout": 0.1, "activation": 2.0},
        "order": order,
        "precision": precision,
    }
    manual = train(tmp_path / "b", ManualCharLM, **given)
    assert alike(train(tmp_path / "a", CharLM, **given), manual)
    losses = manual[0].losses
    assert losses[-1] < losses[0] - 0.2  # and it is training


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_each_optimizer_takes_the_same_steps(tmp_path: Path, optimizer: str) -> None:
    automatic, manual = (
        train(tmp_path / build.__name__, build, optimizer=optimizer) for build in (CharLM, ManualCharLM)
    )
    assert alike(automatic, manual)


def test_gradients_are_clipped_as_lightning_would(tmp_path: Path) -> None:
    weights = []
    for number, (bound, algorithm) in enumerate([(0.05, "norm"), (0.002, "value"), (None, None)]):
        clipping = {"gradient_clip_val": bound, "gradient_clip_algorithm": algorithm}
        automatic, manual = (
            train(tmp_path / f"{build.__name__}-{number}", build, optimizer="sgd", clipping=clipping)
            for build in (CharLM, ManualCharLM)
        )
        assert alike(automatic, manual)
        weights.append(manual[2].network.output.weight)
    assert not any(torch.equal(weights[i], weights[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_a_step_that_is_not_finite_is_withheld_as_lightning_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    for build in (CharLM, ManualCharLM):
        with monkeypatch.context() as context:
            context.setattr(CharLM, "_score", CharLM._score)  # and back to what it is now
            Poison(5, 6)(tmp_path)
            runs.append(train(tmp_path / build.__name__, build))
    automatic, manual = ((record.losses, record.steps, float(model.withheld)) for record, _, model in runs)
    assert str(automatic) == str(manual)  # for no number is equal to itself
    assert manual[2] == 2
    assert torch.equal(runs[0][2].network.output.weight, runs[1][2].network.output.weight)


@pytest.mark.parametrize("order", ["shuffled", "streams"])
@pytest.mark.parametrize(("first", "second"), [(CharLM, ManualCharLM), (ManualCharLM, CharLM)])
def test_a_checkpoint_goes_on_by_either_step(
    tmp_path: Path, first: type[CharLM], second: type[CharLM], order: str
) -> None:
    whole, _, uninterrupted = train(tmp_path / "whole", ManualCharLM, order=order)
    train(tmp_path / "half", first, steps=15, order=order)
    rest, trainer, resumed = train(tmp_path / "rest", second, ckpt_path=tmp_path / "half" / "end.ckpt", order=order)
    later = Record()
    later.losses, later.rates, later.steps = whole.losses[15:], whole.rates[15:], whole.steps[15:]
    assert alike((later, trainer, uninterrupted), (rest, trainer, resumed))
    keys = [torch.load(tmp_path / name / "end.ckpt", weights_only=True).keys() for name in ("whole", "rest")]
    assert keys[0] == keys[1]


@pytest.mark.parametrize(
    ("arguments", "plain"),
    [
        ({}, True),
        ({"precision": "bf16-mixed"}, True),
        ({"profiler": "simple"}, True),
        ({"accumulate_grad_batches": 2}, False),
        ({"precision": "64-true"}, False),
        ({"devices": 2, "strategy": "ddp"}, False),
    ],
)
def test_steps_of_one_batch_on_one_cpu_are_plain(arguments: dict[str, Any], plain: bool) -> None:
    assert is_plain(build_trainer({"accelerator": "cpu", "devices": 1, **arguments})) is plain
