"""From character to character on a CPU: the network's own arithmetic, laid out for one character at a time.

`nn.LSTM` is made for long texts: called for each character, it spends its time on everything else. Here torch
multiplies and numpy does the rest, on the same memory, in place:

    input gates     of the first layer: the character's row of a table, which is a one-hot product done once for all
    hidden gates    the state times the weights
    sigmoid(x)      (tanh(x / 2) + 1) / 2, the half already in the weights: one tanh serves all gates

What a text is does not depend on what is drawn beside it, so the sums of a product's row must not either. Libraries sum
in another order for a single row, and for very many: one row therefore has a second beside it, and many are cut.
`rows_agree` tries, before a shape is used, that the numbers of rows which are left give the same sums to the last bit.

Legend: B samples, R rows of a product, V vocabulary, H hidden, G gates (4H in an LSTM, 3H in a GRU, H in a plain one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from charlm.draw import Drawer, prepared
from charlm.network import CharRNN
from charlm.vocabulary import FIRST_WRITTEN, Ids

Array = npt.NDArray[np.float32]

NUMBERS_OF_ROWS = (2, 4, 8, 16, 24, 32, 48, 64)  # that a product has


def decode(
    network: CharRNN,
    prompt: Sequence[int],
    temperatures: Sequence[float],
    uniforms: Array,
    top_k: int | None,
    top_p: float | None,
) -> Iterator[Ids]:
    """Yield the next ids, shape (B,), for each row of `uniforms`; see `charlm.generate.Sampler.stream`."""
    weights = Weights(network)
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


def serves(network: CharRNN) -> bool:
    """Return whether a network is on a CPU, and every product there gives a row the same sums in every number of rows
    that there is of it.
    """
    rnn, output = network.rnn, network.output.weight
    if output.device.type != "cpu":
        return False
    sizes = {(rnn.hidden_size, rnn.weight_hh_l0.shape[0]), (rnn.hidden_size, len(output) - FIRST_WRITTEN)}
    return all(rows_agree(*size, torch.get_num_threads()) for size in sorted(sizes))


@cache
def rows_agree(width_in: int, width_out: int, threads: int) -> bool:
    """Return whether a product of these sizes gives a row the same sums to the last bit, whichever of
    `NUMBERS_OF_ROWS` it is one of.
    """
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(NUMBERS_OF_ROWS[-1], width_in, generator=draw)
    weight = torch.randn(width_in, width_out, generator=draw)
    whole = torch.mm(rows, weight)
    return all(
        torch.equal(torch.mm(rows[some], weight), whole[some])
        for number in NUMBERS_OF_ROWS
        for some in (slice(number), slice(-number, None))
    )


class Product(NamedTuple):
    """What rows are multiplied with, and what is added."""

    weight: Tensor  # (width in, width out)
    bias: Tensor | None  # (width out,); None: another product's has it in it


class Weights:
    """A network's weights as the steps read them, the gates that are sigmoids side by side and halved."""

    def __init__(self, network: CharRNN) -> None:
        rnn = network.rnn
        self.hidden_size = rnn.hidden_size
        self.cell = _CELLS[type(rnn)]
        self.inputs: list[Product] = []  # of each layer
        self.hidden: list[Product] = []
        for layer in range(rnn.num_layers):
            w_ih, w_hh, b_ih, b_hh = (getattr(rnn, f"{name}_l{layer}").detach().float() for name in _NAMES)
            if not isinstance(rnn, nn.GRU):  # whose reset gate stands before one hidden bias
                b_ih, b_hh = b_ih + b_hh, None
            arranged = self.cell.arranged
            self.inputs.append(Product(arranged(w_ih.T), arranged(b_ih)))
            self.hidden.append(Product(arranged(w_hh.T), None if b_hh is None else arranged(b_hh)))
        output = network.output
        self.output = Product(
            output.weight.detach()[FIRST_WRITTEN:].float().T.contiguous(), output.bias.detach()[FIRST_WRITTEN:].float()
        )
        symbols = network.one_hot if network.embedding is None else network.embedding.weight.detach()  # (V, I)
        weight, bias = self.inputs[0]
        assert bias is not None
        self.table = (symbols.float() @ weight + bias).numpy()  # (V, G)


class Steps:
    """The layers, which read one character of each of B texts at a time.

    Attributes:
        state: what they remember, arrays of shape (B, H).
        logits: the scores of the characters behind those read, from `FIRST_WRITTEN` on, shape (B, V - 1).
    """

    def __init__(self, weights: Weights, samples: int) -> None:
        def rows(width: int) -> Tensor:
            largest = NUMBERS_OF_ROWS[-1]
            rest = next(number for number in NUMBERS_OF_ROWS if number >= samples % largest)
            return torch.zeros(samples - samples % largest + (rest if samples % largest else 0), width)

        self._table = weights.table
        size, gates = weights.hidden_size, weights.table.shape[1]
        from_below, from_before, logits = rows(gates), rows(gates), rows(weights.output.weight.shape[1])
        self._x: Array = from_below.numpy()[:samples]
        self.logits: Array = logits.numpy()[:samples]
        self.state: list[Array] = []
        self._work: list[Callable[[], object]] = []  # of a step, in this order, behind the first layer's input gates
        hidden: Tensor | None = None
        for layer, product in enumerate(weights.hidden):
            if hidden is not None:
                self._multiply(hidden, weights.inputs[layer], from_below)
            hidden = rows(size)
            self._multiply(hidden, product, from_before)
            cell = weights.cell(self._x, from_before.numpy()[:samples], hidden.numpy()[:samples])
            self.state += cell.state
            self._work.append(cell)
        assert hidden is not None
        self._multiply(hidden, weights.output, logits)

    def _multiply(self, rows: Tensor, product: Product, out: Tensor) -> None:
        most = NUMBERS_OF_ROWS[-1]
        for part, part_out in zip(torch.split(rows, most), torch.split(out, most), strict=True):
            self._work.append(partial(torch.mm, part, product.weight, out=part_out))
        if product.bias is not None:
            self._work.append(partial(np.add, out.numpy(), product.bias.numpy(), out.numpy()))

    def begin_as(self, other: Steps) -> None:
        """Continue from the one text that `other` has read."""
        for mine, its in zip((*self.state, self.logits), (*other.state, other.logits), strict=True):
            mine[:] = its

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
