"""A layer whose weights get their gradients outside of cuDNN is torch's layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from charlm import cudnn_layer
from charlm.capture import CapturedCharLM
from charlm.module import CharLM
from charlm.network import CELLS, CharRNN, parts
from charlm.vocabulary import UNKNOWN

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
cells = pytest.mark.parametrize("cell", CELLS)
Run = Callable[..., tuple[Tensor, ...]]


def torchs(cell: type[nn.RNNBase], inputs: Tensor, begin: Sequence[Tensor], *weights: Tensor) -> tuple[Tensor, ...]:
    hx = begin if cell is nn.LSTM else begin[0]
    run: Run = cudnn_layer.LAYERS[cell]
    return run(inputs, hx, list(weights), True, 1, 0.0, True, False, True)


def outcome(
    run: Run,
    cell: str,
    device: str,
    dtype: torch.dtype,
    autocast: torch.dtype | None = None,
    size: int = 24,
    rows: tuple[int, int] = (5, 17),
) -> list[Tensor]:
    """Return a layer's output, its state at the end, and the gradients of all that it was given."""
    torch.manual_seed(1)
    rnn = CELLS[cell](11, size, batch_first=True)
    begin = [torch.rand(1, rows[0], size) for _ in range(2 if cell == "lstm" else 1)]
    given = [torch.randn(*rows, 11), *begin, *(p.detach() for p in rnn.parameters())]
    given = [value.to(device, dtype).requires_grad_() for value in given]
    with torch.autocast(device, autocast or torch.float16, enabled=autocast is not None):
        output, *end = run(type(rnn), given[0], given[1 : 1 + len(begin)], *given[1 + len(begin) :])
    weighting = torch.randn(*rows, size, generator=torch.Generator().manual_seed(2)).to(device)
    ((output * weighting).sum() + sum((part**2).sum() for part in end)).backward()
    gradients = [value.grad for value in given if value.grad is not None]
    assert len(gradients) == len(given)
    return [value.detach().cpu().double() for value in (output, *end, *gradients)]


@cells
def test_it_gives_torchs_output_and_gradients(cell: str) -> None:
    mine, reference = (outcome(run, cell, "cpu", torch.float64) for run in (cudnn_layer.layer, torchs))
    for a, b in zip(mine, reference, strict=True):
        torch.testing.assert_close(a, b)


@cuda
@cells
@pytest.mark.parametrize(("size", "rows"), [(24, (5, 17)), (64, (512, 100)), (128, (128, 100))])
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk")
def test_on_cuda_it_is_not_far_further_from_them_than_cudnn(
    cell: str, size: int, rows: tuple[int, int], autocast: torch.dtype | None
) -> None:
    exact = outcome(torchs, cell, "cpu", torch.float64, size=size, rows=rows)
    given = cell, "cuda", torch.float32, autocast, size, rows
    mine, cudnns = (outcome(run, *given) for run in (cudnn_layer.layer, torchs))
    for a, b, c in zip(mine, cudnns, exact, strict=True):
        assert (a - c).abs().max() <= 2 * (b - c).abs().max() + 5e-4 * c.abs().max()


@cells
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("embedding_size", [0, 20])
@pytest.mark.parametrize("weight_dropout", [0.0, 0.3])
def test_a_network_that_is_recorded_trains_as_any_other(
    cell: str, layers: int, embedding_size: int, weight_dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cudnn_layer, "pays", lambda rnn, one_by_one: True)
    calls: list[str] = []
    plain = cudnn_layer.layer
    monkeypatch.setattr(cudnn_layer, "layer", lambda *given: calls.append("") or plain(*given))
    regularization = {"weight_dropout": weight_dropout}
    made = CharRNN(30, cell, 16, layers, embedding_size=embedding_size, regularization=regularization).double()
    ids = torch.randint(30, (4, 9), generator=torch.Generator().manual_seed(1))
    state = torch.rand(layers, 4, 16, dtype=torch.float64)

    def trained(recorded: bool) -> list[Tensor]:
        made.zero_grad()
        made.regularizer.recorded = recorded
        torch.manual_seed(3)
        logits, end = made(ids, (state, state) if cell == "lstm" else state)
        (logits.square().mean() + sum(part.square().sum() for part in parts(end))).backward()
        return [value.detach().clone() for value in (logits, *parts(end), *(p.grad for p in made.parameters()))]

    for a, b in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(a, b)
    assert len(calls) == layers


def test_captured_steps_are_recorded() -> None:
    model = {"cell": "gru", "hidden_size": 8, "num_layers": 1}
    optimizer = {"name": "adamw", "learning_rate": 1e-3, "weight_decay": 0.0, "schedule": "constant", "warmup_steps": 0}
    for kind, expected in ((CharLM, False), (CapturedCharLM, True)):
        assert kind([UNKNOWN, "a"], model, optimizer, 10).network.regularizer.recorded is expected


def test_it_is_for_cuda() -> None:
    assert not cudnn_layer.pays(nn.GRU(8, 16), one_by_one=True)
    if torch.cuda.is_available():
        for cell, size, layers, expected in (
            (nn.GRU, 256, 1, True), (nn.GRU, 264, 1, False), (nn.GRU, 128, 2, True), (nn.GRU, 256, 2, False),
            (nn.LSTM, 256, 1, True), (nn.LSTM, 512, 1, False), (nn.LSTM, 64, 2, False), (nn.RNN, 64, 1, True),
        ):  # fmt: skip
            assert cudnn_layer.pays(cell(8, size, layers, device="cuda"), one_by_one=False) is expected
        assert cudnn_layer.pays(nn.LSTM(8, 64, 2, device="cuda"), one_by_one=True)
