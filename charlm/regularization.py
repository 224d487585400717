"""What keeps a network from learning a small text by heart. Every part is off at 0, and acts in training alone.

    ids -> input -> [ layer -> hidden dropout -> layer -> ... ] -> output dropout -> linear
           |          |
           |          weight dropout: some of the recurrent matrix' weights
           input dropout: units of the input; embedding dropout: whole characters

Locked masks are drawn once for each row of a batch and hold for the whole window ("variational dropout": Gal and
Ghahramani, "A theoretically grounded application of dropout in recurrent neural networks", 2016), where
`model.dropout` draws anew for every character. The weights themselves stay in one nn.LSTM, nn.GRU or nn.RNN, which
evaluation and sampling run as it is; in training its layers are run one by one where something acts between them, or
where that is faster (charlm/cudnn_layer.py).

Legend: B batch, T window, I input, H hidden, L layers, V vocabulary.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from charlm import cudnn_layer
from charlm.cudnn_dropout import CudnnDropout

if TYPE_CHECKING:
    from charlm.network import State


class Regularizer(nn.Module):
    """The regularisers of a recurrent language model; it has no parameters.

    Args:
        input_dropout: share of the input's units that a locked mask sets to zero. Of one-hot input a unit is a
            character.
        hidden_dropout: the same between layers.
        output_dropout: the same before the output.
        embedding_dropout: share of the vocabulary's characters that a row of a batch does not see: their whole input is
            zero (Gal and Ghahramani, 2016).
        weight_dropout: share of each recurrent matrix' weights set to zero, one draw for the whole batch (DropConnect:
            Wan et al., "Regularization of neural networks using DropConnect", 2013; Merity et al., "Regularizing and
            optimizing LSTM language models", 2018).
        activation: the loss gains this times the mean square of the last layer's output behind its dropout ("AR":
            Merity et al., "Revisiting activation regularization for language RNNs", 2017).
        temporal_activation: and this times the mean square of its change from character to character ("TAR", the same).

    Attributes:
        recorded: whether training steps are recorded as CUDA graphs, in which many small kernels cost little.
    """

    def __init__(
        self,
        input_dropout: float = 0.0,
        hidden_dropout: float = 0.0,
        output_dropout: float = 0.0,
        embedding_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        activation: float = 0.0,
        temporal_activation: float = 0.0,
    ) -> None:
        super().__init__()
        self.input_dropout = input_dropout
        self.hidden_dropout = hidden_dropout
        self.output_dropout = output_dropout
        self.embedding_dropout = embedding_dropout
        self.weight_dropout = weight_dropout
        self.activation = activation
        self.temporal_activation = temporal_activation
        self.cudnn_dropout = CudnnDropout()
        self.recorded = False
        self._penalty: Tensor | None = None

    def inputs(self, ids: Tensor, inputs: Tensor, vocabulary_size: int) -> Tensor:
        """Return what the first layer reads, (B, T, I), of the characters `ids` (B, T) as `inputs` (B, T, I)."""
        if not self.training:
            return inputs
        if self.embedding_dropout:
            seen = _mask((len(ids), vocabulary_size), self.embedding_dropout, inputs)  # (B, V)
            inputs = inputs * seen.gather(1, ids)[:, :, None]
        return self._locked(inputs, self.input_dropout)

    def layers(self, rnn: nn.RNNBase, inputs: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Run the recurrent layers: all at once, or one by one with what acts in and between them.

        Args:
            rnn: of all layers, batch first.
            inputs: (B, T, I).
            state: None begins at zero.

        Returns:
            The last layer's output, (B, T, H), and the state behind the last character.
        """
        if not self.training or not self._one_by_one(rnn):
            if self.training and self.cudnn_dropout.draws(rnn):
                return self.cudnn_dropout.run(rnn, inputs, state)
            hidden, state = rnn(inputs, state)
            return hidden, state
        ends: list[tuple[Tensor, ...]] = []
        hidden = inputs
        for layer in range(rnn.num_layers):
            if layer:
                hidden = F.dropout(self._locked(hidden, self.hidden_dropout), rnn.dropout)
            hidden, *end = self._layer(rnn, layer, hidden, state)
            ends.append(tuple(end))
        parts = [torch.cat(part) for part in zip(*ends, strict=True)]  # (L, B, H) each
        return hidden, (parts[0], parts[1]) if len(parts) == 2 else parts[0]

    def begin(self, rnn: nn.RNNBase, state: Tensor | None = None) -> None:
        """Have a random state of cuDNN's if it is to draw; see `CudnnDropout.begin`."""
        if not self._one_by_one(rnn):
            self.cudnn_dropout.begin(rnn, state)

    def _one_by_one(self, rnn: nn.RNNBase) -> bool:
        """Return whether the layers are run one by one in training."""
        between = self.hidden_dropout and rnn.num_layers > 1
        return bool(between or self.weight_dropout or (self.recorded and cudnn_layer.pays(rnn, one_by_one=False)))

    def _layer(self, rnn: nn.RNNBase, layer: int, inputs: Tensor, state: State | None) -> tuple[Tensor, ...]:
        """Run one of the layers; return its output (B, T, H) and the parts of its state, (1, B, H) each."""
        names = (f"{name}_l{layer}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        of_input, recurrent, *biases = (getattr(rnn, name) for name in names)
        parts = state if isinstance(state, tuple) else (state,) * (2 if isinstance(rnn, nn.LSTM) else 1)
        begin = [
            inputs.new_zeros(1, len(inputs), rnn.hidden_size) if part is None else part[layer : layer + 1].contiguous()
            for part in parts
        ]
        weights = [of_input, F.dropout(recurrent, self.weight_dropout), *biases]
        if self.recorded and cudnn_layer.pays(rnn, one_by_one=True):
            return cudnn_layer.layer(type(rnn), inputs, begin, *weights)
        run, hx = cudnn_layer.LAYERS[type(rnn)], begin if isinstance(rnn, nn.LSTM) else begin[0]
        with warnings.catch_warnings():
            # cuDNN would rather have all weights in one piece. New ones each step are not, and copying them is cheap.
            warnings.filterwarnings("ignore", message="RNN module weights are not part of single contiguous chunk")
            # has_biases, num_layers, dropout, train, bidirectional, batch_first
            output: tuple[Tensor, ...] = run(inputs, hx, weights, True, 1, 0.0, True, False, True)
        return output

    def outputs(self, hidden: Tensor, dropped: Tensor) -> Tensor:
        """Return what the output layer reads of the last layer's output, given as it is and behind `model.dropout`.

        All are (B, T, H).
        """
        if not self.training:
            return dropped
        dropped = self._locked(dropped, self.output_dropout)
        penalties = []
        if self.activation:
            penalties.append(self.activation * dropped.float().square().mean())
        if self.temporal_activation:
            penalties.append(self.temporal_activation * hidden.float().diff(dim=1).square().mean())
        self._penalty = torch.stack(penalties).sum() if penalties else None
        return dropped

    def penalized(self, loss: Tensor) -> Tensor:
        """Return a training loss with what the network's last pass adds to it."""
        penalty, self._penalty = self._penalty, None
        return loss if penalty is None else loss + penalty

    def _locked(self, values: Tensor, dropout: float) -> Tensor:
        """Return values (B, T, ...) times a mask that is the same for all T."""
        return values * _mask((len(values), 1, values.shape[2]), dropout, values) if dropout else values


def _mask(shape: tuple[int, ...], dropout: float, like: Tensor) -> Tensor:
    """Draw zeros, and what keeps the mean at 1."""
    return torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(1 - dropout).div_(1 - dropout)
