"""The captured step trains as the step run kernel by kernel, and Lightning sees the same run.

Where there is no CUDA device, what a graph would replay is run anew each step instead: everything around it is tested.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from charlm import capture, cudnn_layer
from charlm.averaging import WeightAverage
from charlm.callbacks import FinalValidation, TrainingLog
from charlm.capture import CapturedCharLM, captures
from charlm.config import TextConfig
from charlm.datamodule import CharDataModule
from charlm.errors import InputError
from charlm.manual import ManualCharLM
from charlm.module import OPTIMIZERS, CharLM
from charlm.resume import ExactResume
from charlm.run import Run
from charlm.trainer import build_trainer
from charlm.windows import Batch, Starts, gather

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
everywhere = pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=cuda)])

TEXT = "".join(f"{number} green bottles hanging on the wall\n" for number in range(400))
OPTIMIZER = {"name": "adamw", "learning_rate": 5e-3, "weight_decay": 0.1, "schedule": "cosine", "warmup_steps": 10}
SETTINGS = {
    "adam": {"betas": [0.9, 0.99]},
    "adamw": {"betas": [0.9, 0.99]},
    "rmsprop": {"alpha": 0.95, "learning_rate": 1e-3},
    "sgd": {"momentum": 0.9, "learning_rate": 0.5},
}


class Record(L.Callback):
    """The loss of every step, as the log would read it."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.steps: list[int] = []
        self.zero_gradients: list[float] = []  # their share

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.rates.append(float(trainer.optimizers[0].param_groups[0]["lr"]))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(pl_module.take_mean_loss()))
        self.steps.append(trainer.global_step)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        gradients = torch.cat([parameter.grad.flatten() for parameter in pl_module.parameters()])
        self.zero_gradients.append(float((gradients == 0).float().mean()))


@pytest.fixture(autouse=True)
def without_cuda_replays_run_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the graph where none is available."""
    recorded = CapturedCharLM._record
    if not torch.cuda.is_available() and torch.__version__ < (2, 4):  # whose fused optimizers are for CUDA alone
        for name, flags in capture._FLAGS.items():
            monkeypatch.setitem(capture._FLAGS, name, {**flags, "fused": False})

    def record(self: CapturedCharLM, optimizer: torch.optim.Optimizer) -> Any:
        if self.device.type == "cuda":
            return recorded(self, optimizer)
        for group in optimizer.param_groups:
            group["capturable"] = False  # torch refuses it on a CPU
        with torch.random.fork_rng([]):
            self._warm_up(optimizer)

        def replay() -> None:
            optimizer.zero_grad(set_to_none=True)
            self._step(optimizer)

        return replay

    monkeypatch.setattr(CapturedCharLM, "_record", record)


def data_of(folder: Path, **changes: Any) -> CharDataModule:
    if not (folder / "text.txt").exists():
        (folder / "text.txt").write_text(TEXT)
    config = TextConfig(
        **{"source": "text", "split": "contiguous", "split_seed": 0, "fractions": [0.8, 0.1, 0.1], "separator": "\n"},
        vocabulary="code_points",
        max_expansion=100.0,
        **{"window": 20, "stride": 1, "order": "shuffled", "batch_size": 16, "eval_lanes": 4, "encoding": "utf-8"},
        path=str(folder / "text.txt"),
    )
    data = CharDataModule(replace(config, **changes), seed=1)
    data.setup()
    return data


def train(
    folder: Path,
    build: type[CharLM],
    device: str = "cpu",
    steps: int = 30,
    total_steps: int = 30,
    ckpt_path: Path | None = None,
    model: dict[str, Any] | None = None,
    optimizer: str = "adamw",
    precision: str = "32-true",
    regularization: dict[str, float] | None = None,
    loss_scale: float | None = None,
    devices: int = 1,
    clipping: dict[str, Any] | None = None,
    **data_changes: Any,
) -> tuple[Record, L.Trainer, CharLM]:
    """Train a small model and return what was recorded of it."""
    folder.mkdir(exist_ok=True, parents=True)
    L.seed_everything(7, verbose=False)
    data = data_of(folder, **data_changes)
    record = Record()
    trainer = build_trainer(
        {"accelerator": device, "devices": devices, "max_steps": steps, "max_epochs": -1, "gradient_clip_val": 0.5}
        | {
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "precision": precision,
        }
        | (clipping or {}),
        callbacks=[record, FinalValidation(), ExactResume(Run(folder / "run", {}))],
        default_root_dir=folder,
        enable_checkpointing=False,
    )
    if loss_scale is not None:
        trainer.precision_plugin.scaler = torch.amp.GradScaler("cuda", init_scale=loss_scale)
    sizes = {"cell": "lstm", "hidden_size": 16, "num_layers": 1, "dropout": 0.0} | (model or {})
    made = build(
        data.corpus.vocabulary.symbols,
        sizes,
        {**OPTIMIZER, "name": optimizer} | SETTINGS[optimizer],
        total_steps,
        regularization=regularization,
    )
    if isinstance(made, ManualCharLM):
        made.take_over(trainer, data)
    trainer.fit(made, data, ckpt_path=ckpt_path, weights_only=True)
    trainer.save_checkpoint(folder / "end.ckpt")
    return record, trainer, made


def close(first: CharLM, second: CharLM, tolerance: float) -> bool:
    return all(
        torch.allclose(a.cpu(), b.cpu(), rtol=0, atol=tolerance)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@everywhere
@pytest.mark.parametrize("order", ["shuffled", "streams"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_a_captured_run_is_the_eager_run(tmp_path: Path, cell: str, order: str, device: str) -> None:
    model = {"cell": cell, "num_layers": 2}
    eager, plain, first = train(tmp_path / "a", CharLM, device, model=model, order=order)
    captured, trainer, second = train(tmp_path / "b", CapturedCharLM, device, model=model, order=order)
    assert captured.losses == pytest.approx(eager.losses, abs=1e-3)
    assert captured.losses[-1] < captured.losses[0] - 0.3  # and it is training
    assert captured.rates == eager.rates
    assert captured.steps == eager.steps == list(range(1, 31))
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(
        float(plain.callback_metrics["val/loss"]), abs=1e-3
    )
    assert close(first, second, 2e-3)


@everywhere
def test_captured_ranks_take_the_steps_of_eager_ranks(tmp_path: Path, device: str) -> None:
    if device == "gpu" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    (tmp_path / "text.txt").write_text(TEXT)
    script = Path(__file__).parent / "captured_ranks.py"
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    done = subprocess.run(
        [sys.executable, *ranks, str(script), str(tmp_path), device],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(script.parent.parent), *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    mine, other = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    for order in ("shuffled", "streams"):
        eager, captured = mine[f"CharLM {order}"], mine[f"CapturedCharLM {order}"]
        assert captured["losses"] == pytest.approx(eager["losses"], abs=1e-3)
        assert captured["losses"][-1] < captured["losses"][0] - 0.2
        assert captured["losses"] != other[f"CapturedCharLM {order}"]["losses"]  # of windows of its own
        assert captured["weights"] == pytest.approx(eager["weights"], abs=2e-3)
        assert captured["weights"] == other[f"CapturedCharLM {order}"]["weights"]


@everywhere
@pytest.mark.parametrize("order", ["shuffled", "streams"])
def test_a_text_too_large_for_the_device_is_trained_on_alike(
    tmp_path: Path, order: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resident, _, first = train(tmp_path / "a", CapturedCharLM, device, order=order)
    monkeypatch.setattr(capture, "_fits", lambda data, device: False)
    given, trainer, second = train(tmp_path / "b", CapturedCharLM, device, order=order)
    assert trainer.datamodule.resident_on is None  # type: ignore[attr-defined]
    assert given.losses == pytest.approx(resident.losses, abs=1e-3)
    assert close(first, second, 2e-3)


@everywhere
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_each_optimizer_takes_the_same_steps_captured(tmp_path: Path, optimizer: str, device: str) -> None:
    if not set(capture._FLAGS[optimizer]) <= inspect.signature(OPTIMIZERS[optimizer]).parameters.keys():
        pytest.skip(f"torch {torch.__version__} cannot capture {optimizer}")
    eager, _, _ = train(tmp_path / "a", CharLM, device, optimizer=optimizer)
    captured, _, _ = train(tmp_path / "b", CapturedCharLM, device, optimizer=optimizer)
    assert captured.losses == pytest.approx(eager.losses, abs=1e-3)


@everywhere
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_a_captured_run_is_regularized_as_the_eager_run(tmp_path: Path, cell: str, device: str) -> None:
    # So few weights are dropped that none is: what is left is not random, and the layers run one by one.
    regularization = {"weight_dropout": 1e-12, "activation": 2.0, "temporal_activation": 1.0}
    given = {"model": {"cell": cell, "num_layers": 2}, "regularization": regularization, "order": "streams"}
    eager, _, first = train(tmp_path / "a", CharLM, device, **given)
    captured, _, second = train(tmp_path / "b", CapturedCharLM, device, **given)
    assert captured.losses == pytest.approx(eager.losses, abs=1e-3)
    assert close(first, second, 2e-3)


@everywhere
@pytest.mark.parametrize("order", ["shuffled", "streams"])
@pytest.mark.parametrize(("first", "second"), [(CharLM, CapturedCharLM), (CapturedCharLM, CharLM)])
def test_a_checkpoint_goes_on_with_or_without_capture(
    tmp_path: Path, first: type[CharLM], second: type[CharLM], order: str, device: str
) -> None:
    whole, _, uninterrupted = train(tmp_path / "whole", CharLM, device, order=order)
    train(tmp_path / "half", first, device, steps=15, order=order)
    rest, _, resumed = train(tmp_path / "rest", second, device, ckpt_path=tmp_path / "half" / "end.ckpt", order=order)
    assert rest.steps == list(range(16, 31))
    assert rest.rates == whole.rates[15:]
    assert rest.losses == pytest.approx(whole.losses[15:], abs=1e-3)
    assert close(uninterrupted, resumed, 2e-3)


def test_a_captured_run_has_a_plain_checkpoint(tmp_path: Path) -> None:
    train(tmp_path / "a", CharLM)
    train(tmp_path / "b", CapturedCharLM)
    plain, captured = (torch.load(tmp_path / name / "end.ckpt", weights_only=True) for name in "ab")
    assert captured.keys() == plain.keys()
    assert captured["hyper_parameters"] == plain["hyper_parameters"]
    group = captured["optimizer_states"][0]["param_groups"][0]
    assert type(group["lr"]) is float
    assert not group["fused"]
    assert not group["capturable"]
    model = CharLM(**captured["hyper_parameters"])
    model.load_state_dict(captured["state_dict"])


@pytest.mark.parametrize("order", ["shuffled", "streams"])
def test_starts_name_the_windows_that_batches_hold(tmp_path: Path, order: str) -> None:
    data = data_of(tmp_path, order=order)
    told, read = data._train_batches(0, 1), data._train_batches(0, 1)
    told.starts_on = torch.device("cpu")
    for _ in range(2):  # epochs
        for starts, batch in zip(told, read, strict=True):
            assert isinstance(starts, Starts)
            assert isinstance(batch, Batch)
            assert starts.fresh == batch.fresh
            assert torch.equal(gather(data._block, starts.starts, 20), batch.tokens)
        assert told.state_dict() == read.state_dict()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"accelerator": "cpu"}, "CUDA device"),
        pytest.param({"accelerator": "gpu", "accumulate_grad_batches": 2}, "accumulate_grad_batches=2", marks=cuda),
        pytest.param({"accelerator": "gpu", "precision": "16-true"}, "16-true", marks=cuda),
        pytest.param({"accelerator": "gpu", "detect_anomaly": True}, "detect_anomaly", marks=cuda),
    ],
)
def test_where_capture_cannot_be_it_is_refused_or_left(tmp_path: Path, arguments: dict[str, Any], why: str) -> None:
    trainer = build_trainer({"devices": 1, **arguments})
    assert not captures("auto", trainer, "adamw")
    assert not captures(False, trainer, "adamw")
    with pytest.raises(InputError, match=why):
        captures(True, trainer, "adamw")


@cuda
def test_on_one_cuda_device_capture_is_the_default(tmp_path: Path) -> None:
    trainer = build_trainer({"accelerator": "gpu", "devices": 1})
    assert captures("auto", trainer, "adamw")
    assert not captures(False, trainer, "adamw")


@cuda
def test_two_hundred_captured_steps_stay_with_the_eager_ones(tmp_path: Path) -> None:
    model = {"hidden_size": 64}
    eager, _, _ = train(tmp_path / "a", CharLM, "gpu", 200, 200, model=model)
    captured, _, _ = train(tmp_path / "b", CapturedCharLM, "gpu", 200, 200, model=model)
    assert captured.losses == pytest.approx(eager.losses, abs=1e-3)


@cuda
@pytest.mark.parametrize(
    "name", ["dropout", *(f"{part}_dropout" for part in ("input", "hidden", "output", "embedding", "weight"))]
)
def test_each_replay_draws_another_dropout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # One window in the whole text, and a rate too small to change a weight: what differs is what was dropped.
    model = {"dropout": 0.5 if name == "dropout" else 0.0, "num_layers": 2}
    regularization = {} if name == "dropout" else {name: 0.5}
    monkeypatch.setitem(OPTIMIZER, "learning_rate", 1e-30)
    size = {"window": 1000, "stride": 10**9, "batch_size": 1}
    record, _, _ = train(tmp_path, CapturedCharLM, "gpu", 8, model=model, regularization=regularization, **size)
    assert len(set(record.losses)) == 8


@cuda
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_a_captured_run_drops_what_the_eager_run_drops(
    tmp_path: Path, cell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Layers that come one by one have other random numbers.
    monkeypatch.setattr(cudnn_layer, "pays", lambda rnn, one_by_one: False)
    model = {"cell": cell, "num_layers": 3, "dropout": 0.3}
    eager, _, _ = train(tmp_path / "a", CharLM, "gpu", model=model)
    captured, _, _ = train(tmp_path / "b", CapturedCharLM, "gpu", model=model)
    assert captured.losses == pytest.approx(eager.losses, abs=1e-3)


@cuda
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("order", ["shuffled", "streams"])
def test_between_two_readings_of_the_loss_the_host_never_waits(tmp_path: Path, order: str) -> None:
    class Watch(L.Callback):
        """Has torch refuse, from the second step on, what waits for the device."""

        watched = 0

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            torch.cuda.set_sync_debug_mode("default" if trainer.global_step % 10 == 9 else "error")
            self.watched += trainer.global_step % 10 != 9

    data = data_of(tmp_path, order=order)
    watch = Watch()
    trainer = build_trainer(
        {"accelerator": "gpu", "devices": 1, "max_steps": 29, "max_epochs": -1, "gradient_clip_val": 0.5}
        | {"enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 0},
        callbacks=[TrainingLog(10), WeightAverage(0.99), watch],
        enable_checkpointing=False,
    )
    sizes = {"cell": "lstm", "hidden_size": 16, "num_layers": 2, "dropout": 0.5}
    model = CapturedCharLM(data.corpus.vocabulary.symbols, sizes, OPTIMIZER | SETTINGS["adamw"], 29)
    model.take_over(trainer, data)
    try:
        trainer.fit(model, data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert watch.watched == 26


@cuda
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
def test_sixteen_bits_lose_no_gradient(tmp_path: Path, cell: str) -> None:
    model = {"cell": cell, "hidden_size": 128, "num_layers": 2}
    changes = {"window": 100, "batch_size": 64}
    full, _, _ = train(tmp_path / "a", CharLM, "gpu", 200, 200, model=model, **changes)
    half, _, _ = train(tmp_path / "b", CharLM, "gpu", 200, 200, model=model, precision="16-mixed", **changes)
    captured, _, _ = train(
        tmp_path / "c", CapturedCharLM, "gpu", 200, 200, model=model, precision="16-mixed", **changes
    )
    assert half.losses[-1] == pytest.approx(full.losses[-1], abs=0.05)
    assert captured.losses[-1] == pytest.approx(full.losses[-1], abs=0.05)
    # Most of the input's columns are of characters that a batch lacks: their gradient is 0 in either precision.
    assert len(half.zero_gradients) == 200
    assert max(half.zero_gradients[-50:]) < max(full.zero_gradients[-50:]) + 0.01


@cuda
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # the first steps are left out, as is meant
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_a_step_whose_gradients_overflow_is_left_out_captured_or_not(tmp_path: Path, optimizer: str) -> None:
    settings = {"optimizer": optimizer, "precision": "16-mixed", "loss_scale": 2.0**32}
    eager, plain, first = train(tmp_path / "a", CharLM, "gpu", **settings)
    captured, trainer, second = train(tmp_path / "b", CapturedCharLM, "gpu", **settings)
    scales = [run.precision_plugin.scaler.get_scale() for run in (plain, trainer)]
    assert scales[0] == scales[1] < 2.0**32  # it has been halved, once for each step left out
    assert captured.losses == pytest.approx(eager.losses, abs=1e-2)
    assert close(first, second, 1e-2)
