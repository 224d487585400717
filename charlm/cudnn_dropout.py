"""Dropout between the layers of one call of cuDNN, drawn from a random state that a checkpoint keeps.

    nn.LSTM         cuDNN runs all layers at once, and draws from a state inside torch, which shows it to no one
    CudnnDropout    the same call, given a state of our own

Layers run one by one, with torch's dropout in between, would need neither. But cuDNN overlaps the layers of one call:
without, the captured training of an LSTM 512x2 at batch 128 falls from 3.8 to 2.4 million characters a second (H100).
Small GRUs gain more by being run so (charlm/cudnn_layer.py).

Legend: B batch, T window, I input, H hidden, L layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from charlm.network import State

_MODES: dict[type[nn.RNNBase], int] = {nn.RNN: 1, nn.LSTM: 2, nn.GRU: 3}  # cuDNN's cudnnRNNMode_t


class CudnnDropout:
    """Runs the layers of a network in training as torch runs them on a CUDA device.

    Attributes:
        state: cuDNN's random state, some megabytes on the device: it alone says what is dropped next, and each pass
            advances it in its place. None before the first pass, and where cuDNN draws nothing.
    """

    def __init__(self) -> None:
        self.state: Tensor | None = None

    def draws(self, rnn: nn.RNNBase) -> bool:
        """Return whether it is cuDNN that would draw what is dropped between the layers of `rnn`."""
        weight = _weights(rnn)[0]
        between = rnn.num_layers > 1 and rnn.dropout > 0
        return between and weight.is_cuda and bool(torch.backends.cudnn.is_acceptable(weight))  # type: ignore[no-untyped-call]

    def begin(self, rnn: nn.RNNBase, state: Tensor | None = None) -> None:
        """Have a random state on the device of `rnn`, if one is needed: `state`, or one that torch's generator chooses.

        Args:
            rnn: whose layers are to be run.
            state: what `state` was, in another process. That of another model of device does not fit, and is not used.
        """
        device = _weights(rnn)[0].device
        if not self.draws(rnn) or (state is None and self.state is not None and self.state.device == device):
            return
        seed = int(torch.randint(2**62, ()))
        fresh = torch._cudnn_init_dropout_state(rnn.dropout, True, seed, dtype=torch.uint8, device=device)
        self.state = fresh if state is None or state.shape != fresh.shape else state.to(device)

    def run(self, rnn: nn.RNNBase, inputs: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Do what `rnn(inputs, state)` does in training; see `Regularizer.layers`."""
        self.begin(rnn)
        begin = state if state is not None else inputs.new_zeros(rnn.num_layers, len(inputs), rnn.hidden_size)
        hidden, cell = begin if isinstance(begin, tuple) else (begin, begin if isinstance(rnn, nn.LSTM) else None)
        weights = _weights(rnn)
        output, hidden, cell, *_ = torch._cudnn_rnn(
            inputs,
            weights,
            4,  # of which so many are a layer's
            _in_one_piece(weights),
            hidden,
            cell,
            _MODES[type(rnn)],
            rnn.hidden_size,
            0,  # no projection
            rnn.num_layers,
            True,  # batch first
            rnn.dropout,
            True,  # in training
            False,  # not in both directions
            [],  # all rows are of one length
            self.state,
        )
        return output, (hidden, cell) if isinstance(rnn, nn.LSTM) else hidden


def _weights(rnn: nn.RNNBase) -> list[Tensor]:
    return cast(list[Tensor], rnn._flat_weights)


def _in_one_piece(weights: list[Tensor]) -> Tensor | None:
    """Return the memory in which nn.LSTM lays its weights out as cuDNN wants them.

    None where they lie elsewhere; cuDNN then copies them.
    """
    piece = weights[0].untyped_storage()
    if any(weight.untyped_storage().data_ptr() != piece.data_ptr() for weight in weights):
        return None
    size = piece.nbytes() // weights[0].element_size()
    return torch.empty(0, dtype=weights[0].dtype, device=weights[0].device).set_(piece, 0, (size,), (1,))
