"""From character to character on a CPU: the network's own arithmetic, laid out for one character at a time.

`nn.LSTM` is made for long texts: called for each character, it spends its time on everything else. Here torch
multiplies and numpy does the rest, on the same memory, in place:

    input gates     of the first layer: the character's row of a table, which is a one-hot product done once for all
    hidden gates    the state times the weights
    sigmoid(x)      (tanh(x / 2) + 1) / 2, the half already in the weights: one tanh serves all gates

What a text is does not depend on what is drawn beside it, so a product's sums must not either: charlm/products.py.

Legend: B samples, V vocabulary, H hidden, G gates (4H in an LSTM, 3H in a GRU, H in a plain one).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from charlm.draw import Drawer, prepared
from charlm.network import CharRNN
from charlm.products import ARITHMETICS, Product, Work, agree
from charlm.vocabulary import FIRST_WRITTEN, Ids

Array = npt.NDArray[np.float32]

# Bytes of float32 that a character reads. From here on 8 bits were at least 1.2 times as fast, for 1, 6 and 64 texts;
# below, for some networks slower (BENCHMARKS.md).
LARGE = 3_000_000


def decode(
    network: CharRNN,
    prompt: Sequence[int],
    temperatures: Sequence[float],
    uniforms: Array,
    top_k: int | None,
    top_p: float | None,
    arithmetic: str = "float32",
) -> Iterator[Ids]:
    """Yield the next ids, shape (B,), for each row of `uniforms`; see `charlm.generate.Sampler.stream`."""
    weights = Weights(network, arithmetic)
    alone = Steps(weights, 1)
    for i in prompt:
        alone.read([i])
    steps = Steps(weights, len(temperatures))
    steps.begin_as(alone)
    temperature, uniform_of_all = prepared(torch.tensor(temperatures, dtype=torch.float64), torch.from_numpy(uniforms))
    draw = Drawer(temperature.numpy(), steps.logits.shape[1], top_k, top_p)
    for uniform in uniform_of_all[:, :, None].numpy():
        ids = draw(steps.logits, uniform) + FIRST_WRITTEN
        yield ids
        steps.read(ids)


def product_of(network: CharRNN, arithmetic: str = "float32") -> type[Product] | None:
    """Return the kind of product that gives a row of this network the same sums in every number of rows there is of
    it; None where none does, or the network is not on a CPU.
    """
    if network.output.weight.device.type != "cpu":
        return None
    sizes, threads = sorted(set(_sizes(network))), torch.get_num_threads()
    return next((kind for kind in ARITHMETICS[arithmetic] if all(agree(*size, threads, kind) for size in sizes)), None)


def chosen(network: CharRNN, weights: str) -> str:
    """Return the arithmetic that `weights` comes to, however many texts are drawn.

    "auto" is "int8" for a large network on a CPU of a kind that has been measured, with AVX-512 and its instructions
    for 8 bits, which `product_of` sees by their sums; everywhere else it is "float32".
    """
    if weights != "auto":
        return weights
    fast = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return "int8" if fast and step_bytes(network) >= LARGE and product_of(network, "int8") else "float32"


def step_bytes(network: CharRNN) -> int:
    """Return how many bytes of weights a character reads in float32."""
    return 4 * sum(width_in * width_out for width_in, width_out in _sizes(network))


def _sizes(network: CharRNN) -> list[tuple[int, int]]:
    """Return the width in and out of each product that a character takes."""
    size, gates = network.rnn.hidden_size, network.rnn.weight_hh_l0.shape[0]
    layers = 2 * network.rnn.num_layers - 1  # hidden gates of each, input gates of each but the first
    return [*[(size, gates)] * layers, (size, len(network.output.weight) - FIRST_WRITTEN)]


class Linear(NamedTuple):
    """What is done with a state: it is multiplied, and something is added."""

    product: Product
    bias: Tensor | None  # (width out,); None: another's has it in it


class Weights:
    """A network's weights as the steps read them, the gates that are sigmoids side by side and halved."""

    def __init__(self, network: CharRNN, arithmetic: str = "float32") -> None:
        rnn = network.rnn
        kind = product_of(network, arithmetic)
        assert kind is not None
        self.product = kind

        def linear(weight: Tensor, bias: Tensor | None) -> Linear:
            return Linear(kind(weight), bias)

        self.hidden_size = rnn.hidden_size
        self.cell = _CELLS[type(rnn)]
        symbols = network.one_hot if network.embedding is None else network.embedding.weight.detach()  # (V, I)
        self.inputs: list[Linear] = []  # of each layer but the first, for which there is the table
        self.hidden: list[Linear] = []  # of each layer
        for layer in range(rnn.num_layers):
            w_ih, w_hh, b_ih, b_hh = (getattr(rnn, f"{name}_l{layer}").detach().float() for name in _NAMES)
            if not isinstance(rnn, nn.GRU):  # whose reset gate stands before one hidden bias
                b_ih, b_hh = b_ih + b_hh, None
            arranged = self.cell.arranged
            if layer:
                self.inputs.append(linear(arranged(w_ih.T), arranged(b_ih)))
            else:
                self.table = (symbols.float() @ arranged(w_ih.T) + arranged(b_ih)).numpy()  # (V, G)
            self.hidden.append(linear(arranged(w_hh.T), None if b_hh is None else arranged(b_hh)))
        output = network.output
        self.output = linear(
            output.weight.detach()[FIRST_WRITTEN:].float().T.contiguous(), output.bias.detach()[FIRST_WRITTEN:].float()
        )


class Steps:
    """The layers, which read one character of each of B texts at a time.

    Attributes:
        state: what they remember, arrays of shape (B, H).
        logits: the scores of the characters behind those read, from `FIRST_WRITTEN` on, shape (B, V - 1).
    """

    def __init__(self, weights: Weights, samples: int) -> None:
        kind = weights.product

        def rows(width: int) -> Tensor:
            return torch.zeros(kind.rows(samples), width)

        self._table = weights.table
        size, gates = weights.hidden_size, weights.table.shape[1]
        from_below, from_before, logits = rows(gates), rows(gates), rows(weights.output.product.size[1])
        self._x: Array = from_below.numpy()[:samples]
        self.logits: Array = logits.numpy()[:samples]
        self.state: list[Array] = []
        self._operands: list[Array] = []
        self._work: list[Work] = []  # of a step, in this order, behind the first layer's input gates
        operand: Tensor | None = None
        for layer, linear in enumerate(weights.hidden):
            if operand is not None:
                self._multiply(operand, weights.inputs[layer - 1], from_below)
            hidden = rows(size)
            operand, renewed = kind.operand(hidden)
            self._multiply(operand, linear, from_before)
            cell = weights.cell(self._x, from_before.numpy()[:samples], hidden.numpy()[:samples])
            self.state += cell.state
            self._operands.append(operand.numpy()[:samples])
            self._work += [cell, *renewed]
        assert operand is not None
        self._multiply(operand, weights.output, logits)

    def _multiply(self, operand: Tensor, linear: Linear, out: Tensor) -> None:
        self._work += linear.product.into(out, operand)
        if linear.bias is not None:
            self._work.append(partial(np.add, out.numpy(), linear.bias.numpy(), out.numpy()))

    def begin_as(self, other: Steps) -> None:
        """Continue from the one text that `other` has read."""
        mine = (*self.state, *self._operands, self.logits)
        for to, its in zip(mine, (*other.state, *other._operands, other.logits), strict=True):
            to[:] = its

    def read(self, ids: Sequence[int] | npt.NDArray[np.int64]) -> None:
        """Read ids, shape (B,)."""
        self._table.take(ids, 0, self._x, "clip")
        for work in self._work:
            work()


class _LSTM:
    @staticmethod
    def arranged(gates: Tensor) -> Tensor:
        """Return gates (..., G) in the order in which the cell reads them."""
        i, f, g, o = gates.chunk(4, dim=-1)
        return torch.cat([i / 2, f / 2, o / 2, g], dim=-1)

    def __init__(self, x: Array, y: Array, h: Array) -> None:
        size = h.shape[1]
        self.x, self.y, self.h, self.c, self.tanh_c = x, y, h, np.zeros_like(h), np.zeros_like(h)
        self.state = [self.h, self.c]
        self.sigmoids, self.i, self.f = x[:, : 3 * size], x[:, :size], x[:, size : 2 * size]
        self.o, self.g = x[:, 2 * size : 3 * size], x[:, 3 * size :]

    def __call__(self) -> None:
        x, c, i = self.x, self.c, self.i
        np.add(x, self.y, x)
        np.tanh(x, x)
        _half_and_half(self.sigmoids)
        np.multiply(c, self.f, c)
        np.multiply(i, self.g, i)
        np.add(c, i, c)
        np.tanh(c, self.tanh_c)
        np.multiply(self.o, self.tanh_c, self.h)


class _GRU:
    @staticmethod
    def arranged(gates: Tensor) -> Tensor:
        r, z, n = gates.chunk(3, dim=-1)
        return torch.cat([r / 2, z / 2, n], dim=-1)

    def __init__(self, x: Array, y: Array, h: Array) -> None:
        size = h.shape[1]
        self.h, self.state = h, [h]
        self.x_sigmoids, self.y_sigmoids = x[:, : 2 * size], y[:, : 2 * size]
        self.r, self.z, self.x_n, self.y_n = x[:, :size], x[:, size : 2 * size], x[:, 2 * size :], y[:, 2 * size :]

    def __call__(self) -> None:
        h, r, n = self.h, self.r, self.x_n
        np.add(self.x_sigmoids, self.y_sigmoids, self.x_sigmoids)
        np.tanh(self.x_sigmoids, self.x_sigmoids)
        _half_and_half(self.x_sigmoids)
        np.multiply(r, self.y_n, r)
        np.add(n, r, n)
        np.tanh(n, n)
        np.subtract(h, n, h)  # h <- n + z (h - n)
        np.multiply(h, self.z, h)
        np.add(h, n, h)


class _RNN:
    @staticmethod
    def arranged(gates: Tensor) -> Tensor:
        return gates.contiguous()

    def __init__(self, x: Array, y: Array, h: Array) -> None:
        self.x, self.y, self.h, self.state = x, y, h, [h]

    def __call__(self) -> None:
        np.add(self.x, self.y, self.x)
        np.tanh(self.x, self.h)


_HALF = np.float32(0.5)


def _half_and_half(tanh: Array) -> None:
    np.multiply(tanh, _HALF, tanh)
    np.add(tanh, _HALF, tanh)


_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
_CELLS: dict[type[nn.Module], type[_LSTM | _GRU | _RNN]] = {nn.LSTM: _LSTM, nn.GRU: _GRU, nn.RNN: _RNN}
