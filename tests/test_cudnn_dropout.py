"""cuDNN's dropout between layers is nn.LSTM's own, from a random state that can be kept and put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from charlm.cudnn_dropout import CudnnDropout
from charlm.network import CELLS, CharRNN, parts

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
every_cell = pytest.mark.parametrize("cell", list(CELLS))
B, T, INPUT, H, L = 6, 9, 5, 8, 3


def layers(cell: str, dropout: float, device: str) -> tuple[nn.RNNBase, Tensor]:
    """Return a network's layers, and an input of theirs, (B, T, I)."""
    torch.manual_seed(0)
    rnn: nn.RNNBase = CELLS[cell](INPUT, H, L, dropout=dropout, batch_first=True).to(device)
    return rnn, torch.randn(B, T, INPUT, device=device)


def kept(drawing: CudnnDropout) -> Tensor:
    assert drawing.state is not None
    return drawing.state.clone()


@every_cell
@pytest.mark.parametrize("carried", [False, True])
def test_the_call_means_to_cudnn_what_the_layers_are(cell: str, carried: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read by torch's own names of the arguments, and run by torch's own layers."""
    rnn, inputs = layers(cell, 0.4, "cpu")
    state = rnn.eval()(inputs)[1] if carried else None
    rnn.train()

    def stand_in(*given: Any) -> tuple[Tensor, ...]:
        names = [argument.name for argument in torch.ops.aten._cudnn_rnn.default._schema.arguments]
        call = dict(zip(names, given, strict=True))
        function: Any = {1: torch.rnn_tanh, 2: torch.lstm, 3: torch.gru}[call["mode"]]
        assert (call["cx"] is None) == (cell != "lstm")
        assert (call["weight_stride0"], call["hidden_size"], call["proj_size"], call["batch_sizes"]) == (4, H, 0, [])
        hx = (call["hx"], call["cx"]) if cell == "lstm" else call["hx"]
        how = (call["num_layers"], call["dropout"], call["train"], call["bidirectional"], call["batch_first"])
        output, hidden, *cells = function(call["input"], hx, call["weight"], True, *how)
        return output, hidden, *(cells or [hidden]), output, output

    monkeypatch.setattr(torch, "_cudnn_rnn", stand_in)
    monkeypatch.setattr(CudnnDropout, "draws", lambda self, rnn: True)
    drawing = CudnnDropout()
    drawing.state = torch.zeros(1, dtype=torch.uint8)
    torch.manual_seed(1)
    expected, expected_end = rnn(inputs, state)
    torch.manual_seed(1)
    found, end = drawing.run(rnn, inputs, state)
    assert torch.equal(found, expected)
    assert all(torch.equal(a, b) for a, b in zip(parts(end), parts(expected_end), strict=True))


def test_torch_takes_the_call() -> None:
    rnn = nn.LSTM(INPUT, H, L, batch_first=True, dropout=0.4, device="meta")
    drawing = CudnnDropout()
    output, (hidden, cell) = drawing.run(rnn, torch.empty(B, T, INPUT, device="meta"), None)
    assert output.shape == (B, T, H)
    assert hidden.shape == cell.shape == (L, B, H)


@every_cell
def test_where_cudnn_does_not_draw_there_is_no_state(cell: str) -> None:
    model = CharRNN(11, cell, H, L, dropout=0.4)
    model(torch.randint(11, (B, T)))
    assert model.regularizer.cudnn_dropout.state is None


@cuda
@every_cell
@pytest.mark.parametrize("autocast", [False, True])
def test_it_draws_what_the_layers_draw_from_the_same_seed(cell: str, autocast: bool) -> None:
    rnn, inputs = layers(cell, 0.4, "cuda")
    torch.cuda.manual_seed(5)
    seed = int(torch.empty((), dtype=torch.int64, device="cuda").random_())  # as torch seeds a state of its own
    drawing = CudnnDropout()
    drawing.state = torch._cudnn_init_dropout_state(0.4, True, seed, dtype=torch.uint8, device="cuda")
    torch.cuda.manual_seed(5)
    results = []
    for run in (lambda: rnn(inputs), lambda: drawing.run(rnn, inputs, None)):
        rnn.zero_grad()
        with torch.autocast("cuda", torch.float16, enabled=autocast):
            output, end = run()
        output.float().square().sum().backward()
        results.append((output, *parts(end), *(weight.grad.clone() for weight in rnn.parameters())))
    for found, expected in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected)


@cuda
@every_cell
def test_each_pass_draws_anew_and_a_state_put_back_draws_again(cell: str) -> None:
    rnn, inputs = layers(cell, 0.4, "cuda")
    drawing = CudnnDropout()
    drawing.run(rnn, inputs, None)
    before = kept(drawing).cpu()
    first, second = (drawing.run(rnn, inputs, None)[0] for _ in range(2))
    assert not torch.equal(first, second)
    again = CudnnDropout()  # as in the process of a run that resumes
    again.begin(rnn, before)
    assert torch.equal(again.run(rnn, inputs, None)[0], first)
    assert torch.equal(again.run(rnn, inputs, None)[0], second)


@cuda
@every_cell
def test_a_graph_draws_anew_each_time_it_is_replayed_and_goes_on_from_its_state(cell: str) -> None:
    rnn, inputs = layers(cell, 0.4, "cuda")
    drawing = CudnnDropout()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        drawing.run(rnn, inputs, None)
    torch.cuda.current_stream().wait_stream(stream)
    before = kept(drawing)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, _ = drawing.run(rnn, inputs, None)
    assert drawing.state is not None
    drawing.state.copy_(before)
    replayed = []
    for _ in range(3):
        graph.replay()
        replayed.append(output.clone())
    assert not torch.equal(replayed[0], replayed[1])
    drawing.state.copy_(before)
    for expected in replayed:
        assert torch.equal(drawing.run(rnn, inputs, None)[0], expected)


@cuda
def test_a_state_of_another_kind_of_device_is_not_used() -> None:
    rnn, inputs = layers("lstm", 0.4, "cuda")
    drawing = CudnnDropout()
    drawing.begin(rnn, torch.zeros(100, dtype=torch.uint8))
    assert len(kept(drawing)) > 100
    drawing.run(rnn, inputs, None)


@cuda
def test_weights_that_lie_apart_are_run_alike() -> None:
    rnn, inputs = layers("lstm", 0.4, "cuda")
    drawing = CudnnDropout()
    drawing.begin(rnn)
    before = kept(drawing)
    expected, _ = drawing.run(rnn, inputs, None)
    with torch.no_grad():
        for name, weight in rnn.named_parameters():
            setattr(rnn, name, nn.Parameter(weight.clone()))
    drawing.begin(rnn, before)
    with pytest.warns(UserWarning, match="not part of single contiguous chunk"):
        found, _ = drawing.run(rnn, inputs, None)
    torch.testing.assert_close(found, expected)
