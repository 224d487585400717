"""What a number of a training is made of: which precision is chosen where, and what 16 bits on a CPU change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from charlm import trainer
from charlm.checkpoint import open_checkpoint
from charlm.config import TrainConfig
from charlm.datamodule import CharDataModule
from charlm.network import CharRNN
from charlm.trainer import build_trainer, choose_precision
from train import train


@pytest.mark.parametrize(
    ("cell", "hidden_size", "accelerator", "cuda", "amx", "expected"),
    [
        ("lstm", 256, "auto", False, True, "bf16-mixed"),
        ("lstm", 64, "cpu", True, True, "bf16-mixed"),
        ("lstm", 32, "auto", False, True, "32-true"),
        ("lstm", 256, "auto", False, False, "32-true"),
        ("lstm", 256, "mps", False, True, "32-true"),
        ("gru", 256, "auto", False, True, "32-true"),
        ("rnn", 256, "auto", False, True, "32-true"),
        ("lstm", 256, "auto", True, True, "16-mixed"),
        ("gru", 128, "gpu", True, False, "16-mixed"),
        ("lstm", 64, "auto", True, True, "32-true"),
    ],
)
def test_precision_is_chosen_by_device_cell_and_size(
    cell: str,
    hidden_size: int,
    accelerator: str,
    cuda: bool,
    amx: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx}, raising=False)
    chosen = choose_precision({"precision": "auto", "accelerator": accelerator}, cell, hidden_size)
    assert chosen == {"precision": expected, "accelerator": accelerator}


def test_a_precision_that_is_asked_for_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "has_amx", lambda: True)
    assert choose_precision({"precision": "32-true"}, "lstm", 256) == {"precision": "32-true"}


def test_a_torch_that_cannot_tell_computes_in_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not trainer.has_amx()


@pytest.mark.parametrize("options", [{}, {"regularization": {"weight_dropout": 0.2}}], ids=["plain", "weight dropout"])
def test_gradients_of_16_bits_are_those_of_32_up_to_rounding_and_none_underflows(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    network = CharRNN(50, "lstm", 64, 2, **options)
    tokens = torch.randint(0, 50, (16, 41))

    def gradients(bfloat16: bool) -> list[torch.Tensor]:
        torch.manual_seed(2)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits, _ = network(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        return list(torch.autograd.grad(loss, list(network.parameters())))

    for exact, rounded in zip(gradients(False), gradients(True), strict=True):
        assert rounded.dtype == torch.float32
        assert torch.linalg.vector_norm(rounded - exact) < 0.02 * torch.linalg.vector_norm(exact)
        # Sums that happen to come to 0 are few; lost small numbers would be many.
        assert exact[rounded == 0].abs().sum() < 0.001 * exact.abs().sum()


@pytest.mark.parametrize("order", ["shuffled", "streams"])
def test_a_run_in_16_bits_says_so_and_its_losses_are_those_of_its_weights_in_32(
    order: str, composed: Callable[..., TrainConfig], tiny: list[str], tmp_path: Path
) -> None:
    config = composed(
        *tiny, "model.hidden_size=64", f"data.order={order}", "trainer.precision=bf16-mixed", "trainer.max_steps=60"
    )
    train(config, tmp_path / "run")
    told = json.loads((tmp_path / "run" / "result.json").read_text())
    assert told["precision"] == "bf16-mixed"
    data = CharDataModule(config.data, config.seed)
    data.setup()
    exact = build_trainer({"accelerator": "cpu", "devices": 1, "precision": "32-true"}, enable_checkpointing=False)
    exact.test(open_checkpoint(tmp_path / "run" / "checkpoints" / "best.ckpt"), data, verbose=False)
    for name in ("test/loss", "test/loss_windowed"):
        assert told[name] == pytest.approx(float(exact.callback_metrics[name]), abs=1e-3)
