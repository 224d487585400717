"""A recurrent layer on CUDA, with the gradients of its weights taken out of cuDNN's hands.

cuDNN sums up bias gradients slowly, a GRU's above all: 272 of the 670 microseconds that a captured step of 64 units
takes (batch 128, H100), where its recurrence takes 55 forwards and 86 backwards. A layer can be had without:

    inputs -> input gates (ours) -> cuDNN, which multiplies them by the identity, and whose weights are constants
                  |                     |
    the gradient of the gates   <-------+   is all that it gives back; the weights' follow from it in a few products

That is more kernels in less time, which pays where a CUDA graph starts them.

Legend: B batch, T window, I input, H hidden, G gates (4H in an LSTM, 3H in a GRU, H else).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LAYERS: dict[type[nn.RNNBase], Any] = {nn.LSTM: torch.lstm, nn.GRU: torch.gru, nn.RNN: torch.rnn_tanh}

# Hidden units up to which layers that come one by one train faster so, at a batch of 128 or more and with
# trainer.precision=auto (BENCHMARKS.md). Of several it must be a small GRU's that make up for coming one by one, for
# cuDNN overlaps the layers of one call.
LARGEST, LARGEST_OF_SEVERAL = 256, 128


def pays(rnn: nn.RNNBase, one_by_one: bool) -> bool:
    """Return whether the layers of `rnn` train faster so in a CUDA graph.

    Args:
        rnn: on its device.
        one_by_one: whether they come one by one in any case.
    """
    if rnn.num_layers == 1 or one_by_one:
        small = rnn.hidden_size <= LARGEST
    else:
        small = isinstance(rnn, nn.GRU) and rnn.hidden_size <= LARGEST_OF_SEVERAL
    return small and bool(torch.backends.cudnn.is_acceptable(rnn.weight_hh_l0))  # type: ignore[no-untyped-call]


def layer(cell: type[nn.RNNBase], inputs: Tensor, begin: Sequence[Tensor], *weights: Tensor) -> tuple[Tensor, ...]:
    """Run a layer as torch does.

    Args:
        cell: nn.LSTM, nn.GRU or nn.RNN.
        inputs: (B, T, I).
        begin: the state before, (1, B, H), an LSTM's with its cell state.
        weights: (G, I) and (G, H), and the biases beside them, (G,) each.

    Returns:
        The output, (B, T, H), and the parts of the state behind the last character, (1, B, H) each.
    """
    states_before: list[Tensor] = []
    inputs = inputs.transpose(0, 1).contiguous()
    gates: Tensor = _InputGates.apply(cell is nn.GRU, inputs, *weights, states_before)  # type: ignore[no-untyped-call]
    begin = [part.to(gates.dtype) for part in begin]
    _, recurrent, _, bias = (weight.detach().to(gates.dtype) for weight in weights)
    identity, no_bias = _neutral(gates.shape[2], gates.dtype, gates.device)
    constants = [identity, recurrent, no_bias, bias]
    with warnings.catch_warnings(), torch.autocast(gates.device.type, enabled=False):
        # cuDNN would rather have all weights in one piece; copying them is cheap.
        warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
        # has_biases, num_layers, dropout, train, bidirectional, batch_first
        hx = begin if cell is nn.LSTM else begin[0]
        output, *end = LAYERS[cell](gates, hx, constants, True, 1, 0.0, True, False, False)
    states_before.append(torch.cat([begin[0].detach(), output.detach()[:-1]]))
    return output.transpose(0, 1), *end


class _InputGates(torch.autograd.Function):
    """The gates' part that comes of the inputs. Its gradient, which is theirs, makes those of all weights."""

    @staticmethod
    def forward(
        ctx: Any, gru: bool, inputs: Tensor, of_input: Tensor, recurrent: Tensor, input_bias: Tensor, bias: Tensor,
        states_before: list[Tensor],
    ) -> Tensor:  # fmt: skip
        """Return (T, B, G) of inputs (T, B, I). Before the backward pass `states_before` is to get those, (T, B, H)."""
        # Under autocast torch has cuDNN's layers run in fp16, whatever type is asked for.
        fp16 = torch.autocast(inputs.device.type, torch.float16, enabled=torch.is_autocast_enabled())
        with _rounded_as_by_cudnn(), fp16:
            gates = F.linear(inputs, of_input, input_bias)
        ctx.gru, ctx.states_before = gru, states_before
        ctx.save_for_backward(inputs, of_input, recurrent, bias, gates)
        return gates

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, of_input, recurrent, bias, gates = ctx.saved_tensors
        (before,), size = ctx.states_before, recurrent.shape[1]
        of_state = gradient  # of the gates' part that comes of the state
        with _rounded_as_by_cudnn():
            if ctx.gru:
                # n = tanh(x_n + r * (U_n h + b_n)), r = sigmoid(x_r + U_r h + b_r); given is that of x_r, x_z and x_n.
                reset = F.linear(before, *(part[:size].to(gates.dtype) for part in (recurrent, bias)))
                of_state = gradient.clone()
                of_state[..., 2 * size :] *= reset.add_(gates[..., :size]).sigmoid_()
            rows = gradient.flatten(0, 1)
            to_inputs = (rows @ of_input.to(gates.dtype)).view_as(inputs) if ctx.needs_input_grad[1] else None
            to_of_input = rows.T @ inputs.flatten(0, 1).to(gates.dtype)
            to_recurrent = of_state.flatten(0, 1).T @ before.flatten(0, 1)
        to_input_bias = to_bias = _summed(gradient, bias.dtype)
        if ctx.gru:
            to_bias = torch.cat([to_bias[: 2 * size], _summed(of_state[..., 2 * size :], bias.dtype)])
        return None, to_inputs, to_of_input, to_recurrent, to_input_bias, to_bias, None


def _summed(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the sum of (T, B, G) over T and B, in two passes: one over both keeps few of the device's units busy."""
    return values.sum(dim=0, dtype=dtype).sum(dim=0)


@cache
def _neutral(size: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return weights and a bias that change nothing, but for the bits that cuDNN rounds off where it uses TF32."""
    return torch.eye(size, dtype=dtype, device=device), torch.zeros(size, dtype=dtype, device=device)


@contextmanager
def _rounded_as_by_cudnn() -> Iterator[None]:
    """Multiply float32 in TF32 where cuDNN would, as torch has it do by default; its own products keep all bits."""
    cudnn, matmul = getattr(torch.backends.cudnn, "rnn", None), torch.backends.cuda.matmul
    if getattr(cudnn, "fp32_precision", None) != "tf32":  # or this torch cannot tell
        yield
        return
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before
