"""The network: characters in, the next character's scores out.

    ids (B, T) -> one-hot or embedding (B, T, I) -> recurrent layers (B, T, H) -> dropout -> linear -> logits (B, T, V)

In training, and where they are on, the regularisers of charlm/regularization.py act in between.

Legend: B batch, T window, V vocabulary, I input, H hidden, L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from charlm.config import ModelConfig
from charlm.errors import InputError
from charlm.regularization import Regularizer

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}

# One-hot input multiplies by V columns of which one counts: beyond this, an embedding is the cheaper input.
LARGEST_ONE_HOT = 256
DEFAULT_EMBEDDING = 128

# Up to this size an LSTM's upper layers begin with wider weights than torch's. In larger ones each step of the
# optimizer moves the sum of more inputs, and wide weights do harm: after 800 steps of 128 windows two layers of 632
# units come to 0.01 to 0.02 nats more with them, of 312 units to 0.01 to 0.02 less (RESULTS.md).
LARGEST_WIDENED = 384

# What a hidden size that is chosen by the number of parameters is a multiple of, and from which size on.
_MULTIPLE = 8
_MULTIPLES_FROM = 128

State = Tensor | tuple[Tensor, Tensor]  # (L, B, H), the LSTM's twice: hidden and cell


def parts(state: State | None) -> tuple[Tensor, ...]:
    """Return the tensors that a state is made of."""
    if state is None:
        return ()
    return state if isinstance(state, tuple) else (state,)


def detached(state: State) -> State:
    """Return a state cut off from how it came about."""
    return (state[0].detach(), state[1].detach()) if isinstance(state, tuple) else state.detach()


class CharRNN(nn.Module):
    """A recurrent language model of characters.

    Args:
        vocabulary_size: V.
        cell: "lstm", "gru" or "rnn" (tanh).
        hidden_size: H.
        num_layers: L.
        dropout: share of units set to zero between layers and before the output (Zaremba et al., "Recurrent
            neural network regularization", 2014).
        embedding_size: I; 0 is one-hot input, I = V; None is one-hot up to 256 symbols, else an embedding of 128.
        one_hot_scale: what a one-hot vector has in its one place. The weights behind it begin smaller by as much, so
            that at first the same comes of them; but a step of the optimizer then changes it by as much more.
        tied: the output shares the embedding's matrix, I = H (Press and Wolf, "Using the output embedding", 2017).
        output_gain: the output's weights begin normal with a standard deviation of this over sqrt(H) (He et al.,
            "Delving deep into rectifiers", 2015); None: as torch has it, and tied ones with a gain of 1.
        uniform_init: all weights begin uniform in plus or minus this, as char-rnn's with 0.08, whatever else is said;
            None: as torch has it, but wider for one-hot input and between a small LSTM's layers.
        regularization: the arguments of `Regularizer`; none by default.

    Raises:
        InputError: `tied` with an `embedding_size` other than `hidden_size`.
    """

    def __init__(
        self,
        vocabulary_size: int,
        cell: str,
        hidden_size: int,
        num_layers: int = 1,
        dropout: float = 0.0,
        embedding_size: int | None = None,
        one_hot_scale: float = 1.0,
        tied: bool = False,
        output_gain: float | None = None,
        uniform_init: float | None = None,
        regularization: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        if embedding_size is None and tied:
            embedding_size = hidden_size
        elif embedding_size is None:
            embedding_size = 0 if vocabulary_size <= LARGEST_ONE_HOT else DEFAULT_EMBEDDING
        if tied and embedding_size != hidden_size:
            raise InputError(f"tied weights need embedding_size={embedding_size} to be hidden_size={hidden_size}")

        self.embedding = nn.Embedding(vocabulary_size, embedding_size) if embedding_size else None
        self.one_hot: Tensor
        one_hot = None if embedding_size else one_hot_scale * torch.eye(vocabulary_size)  # (V, V)
        self.register_buffer("one_hot", one_hot, persistent=False)
        self.rnn = CELLS[cell](
            input_size=embedding_size or vocabulary_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            dropout=dropout if num_layers > 1 else 0.0,
            batch_first=True,
        )
        self.regularizer = Regularizer(**(regularization or {}))
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden_size, vocabulary_size)
        if tied and self.embedding is not None:
            self.output.weight = self.embedding.weight
            output_gain = output_gain or 1.0  # at an embedding's usual scale the first logits would be large
        if output_gain is not None:
            nn.init.normal_(self.output.weight, std=output_gain * hidden_size**-0.5)
        if uniform_init is None:
            self._widen_one_hot(one_hot_scale)
            self._widen_upper_layers()
        else:
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -uniform_init, uniform_init)
        self._open_forget_gates()

    def _widen_one_hot(self, scale: float) -> None:
        if self.embedding is None:
            # torch draws from +-1/sqrt(H), meant for sums over many inputs. Of a one-hot input one column counts, so
            # its spread is that of the sum. LSTM 192, batch 64, 250 steps on python_docs: val 1.34 nats with 2, 1.46
            # with 1. A step of Adam changes every weight by about as much: what the state says by that for each of its
            # units, what a character says by one column's alone. So a wide network learns it slowly unless it is scaled
            # (Yang and Hu, "Feature learning in infinite-width neural networks", 2021, give input weights a rate that
            # grows with the width). LSTM 256, 1,200 steps: val 1.131 nats with a scale of 8, 1.164 with 1 (RESULTS.md).
            nn.init.normal_(self.rnn.weight_ih_l0, std=2.0 / scale)

    def _widen_upper_layers(self) -> None:
        hidden_size = self.rnn.hidden_size
        if isinstance(self.rnn, nn.LSTM) and hidden_size <= LARGEST_WIDENED:
            # What an LSTM begins by putting out is small, a half-open gate times a half-full cell, and torch's
            # +-1/sqrt(H) makes little more than nothing of it in the next layer. LSTM 128x3, batch 32, 400 steps on
            # python_docs: val 1.45 nats with 3, 1.64 with torch's; 128x2: 1.43 and 1.45. GRUs gain nothing.
            for layer in range(1, self.rnn.num_layers):
                nn.init.normal_(getattr(self.rnn, f"weight_ih_l{layer}"), std=3.0 * hidden_size**-0.5)

    def _open_forget_gates(self) -> None:
        hidden_size = self.rnn.hidden_size
        if isinstance(self.rnn, nn.LSTM):
            # A forget gate that begins open carries gradients far (Jozefowicz et al., "An empirical exploration of
            # recurrent network architectures", 2015). Gate order: i, f, g, o.
            for layer in range(self.rnn.num_layers):
                getattr(self.rnn, f"bias_ih_l{layer}").data[hidden_size : 2 * hidden_size] = 1.0
                getattr(self.rnn, f"bias_hh_l{layer}").data[hidden_size : 2 * hidden_size] = 0.0

    @property
    def size(self) -> int:
        """How many parameters the network has."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Score the next character after each one.

        Args:
            ids: int32 or int64, shape (B, T).
            state: what the layers remember from before; None begins at zero.

        Returns:
            Logits, shape (B, T, V), and the state behind the last character.
        """
        # One-hot vectors are rows of the identity, scaled.
        inputs = self.embedding(ids) if self.embedding is not None else F.embedding(ids, self.one_hot)  # (B, T, I)
        inputs = self.regularizer.inputs(ids, inputs, self.output.out_features)
        hidden, state = self.regularizer.layers(self.rnn, inputs, state)  # (B, T, H)
        hidden = self.regularizer.outputs(hidden, self.dropout(hidden))
        return self.output(hidden), state  # (B, T, V)


def sized(model: ModelConfig, vocabulary_size: int) -> dict[str, Any]:
    """Return the arguments of `CharRNN` that settings stand for.

    Args:
        model: the settings. Where they give `parameters`, H is the one whose network comes closest to that number; from
            128 on a multiple of 8, as the tensor cores of GPUs want it.
        vocabulary_size: V.

    Raises:
        InputError: even one hidden unit has more than twice as many parameters.
    """
    arguments = asdict(model)
    wanted = arguments.pop("parameters")
    if wanted is None:
        return arguments

    def count(hidden_size: int) -> int:
        with torch.device("meta"):  # sizes without weights
            return CharRNN(vocabulary_size, **{**arguments, "hidden_size": hidden_size}).size

    if count(1) > 2 * wanted:
        raise InputError(f"model.parameters={wanted} is too few: with one hidden unit the network has {count(1):,}")
    above = 1  # the least H, by doubling and halving, that has more than wanted
    while count(above) <= wanted:
        above *= 2
    below = above // 2
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if count(middle) <= wanted else (below, middle)
    step = _MULTIPLE if above > _MULTIPLES_FROM else 1
    candidates = {max(1, below // step * step), -(-above // step) * step}
    return {**arguments, "hidden_size": min(candidates, key=lambda size: abs(count(size) - wanted))}
