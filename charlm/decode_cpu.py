"""From character to character on a CPU: the network's own arithmetic, laid out for one character at a time.

`nn.LSTM` is made for long texts: called for each character, it spends its time on everything else. Here torch
multiplies and numpy does the rest, on the same memory, in place:

    input gates     of the first layer: the character's row of a table, which is a one-hot product done once for all
    hidden gates    the state times the weights
    sigmoid(x)      (tanh(x / 2) + 1) / 2, the half already in the weights: one tanh serves all gates

What a text is does not depend on what is drawn beside it, so the sums of a product's row must not either. Libraries sum
in another order for a single row, and for very many: one row therefore has a second beside it, and many are cut.
`rows_agree` tries, before a shape is used, that the numbers of rows which are left give the same sums to the last bit.

Weights that no core's cache holds are read from memory for each character, and that takes nearly all the time. In 8
bits they are a quarter: "int8" rounds each weight to one of 255 steps, which are as wide as the largest weight of its
gate asks for, and what it is multiplied with to bfloat16.

Legend: B samples, R rows of a product, V vocabulary, H hidden, G gates (4H in an LSTM, 3H in a GRU, H in a plain one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from charlm.draw import Drawer, prepared
from charlm.network import CharRNN
from charlm.vocabulary import FIRST_WRITTEN, Ids

Array = npt.NDArray[np.float32]

MOST_ROWS = 64  # that a product has


class Arithmetic(NamedTuple):
    """A way to multiply."""

    numbers_of_rows: tuple[int, ...]  # that a product may have
    # From a weight (width in, width out) to what writes the product with rows (R, width in) into (R, width out).
    multiplier: Callable[[Tensor], Callable[[Tensor, Tensor], object]]


def _float32(weight: Tensor) -> Callable[[Tensor, Tensor], object]:
    return lambda rows, out: torch.mm(rows, weight, out=out)


def _int8(weight: Tensor) -> Callable[[Tensor, Tensor], object]:
    step = (weight.abs().amax(dim=0) / 127).clamp(min=1e-30).bfloat16()  # (width out,)
    whole = (weight / step.float()).round().clamp(-127, 127).to(torch.int8).T  # (width out, width in)
    # Torch's product reads vectors, also beyond the end of a row that is no multiple of them.
    zeros = (0, -len(weight) % 64)
    whole = F.pad(whole, zeros).contiguous()
    return lambda rows, out: out.copy_(torch._weight_int8pack_mm(F.pad(rows.bfloat16(), zeros), whole, step))


ARITHMETICS = {
    "float32": Arithmetic((2, 4, 8, 16, 24, 32, 48, MOST_ROWS), _float32),
    "int8": Arithmetic((1, 2, 4, 8, 16, 24, 32, 48, MOST_ROWS), _int8),
}


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


def serves(network: CharRNN, arithmetic: str = "float32") -> bool:
    """Return whether a network is on a CPU, and every product there gives a row the same sums in every number of rows
    that there is of it.
    """
    rnn, output = network.rnn, network.output.weight
    if output.device.type != "cpu":
        return False
    sizes = {(rnn.hidden_size, rnn.weight_hh_l0.shape[0]), (rnn.hidden_size, len(output) - FIRST_WRITTEN)}
    return all(rows_agree(*size, torch.get_num_threads(), arithmetic) for size in sorted(sizes))


@cache
def rows_agree(width_in: int, width_out: int, threads: int, arithmetic: str = "float32") -> bool:
    """Return whether a product of these sizes gives a row the same sums to the last bit, whichever of the arithmetic's
    numbers of rows it is one of.
    """
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(MOST_ROWS, width_in, generator=draw)
    numbers, multiplier = ARITHMETICS[arithmetic]
    multiply = multiplier(torch.randn(width_in, width_out, generator=draw))

    def product(some: slice) -> Tensor:
        out = torch.empty(len(rows[some]), width_out)
        multiply(rows[some], out)
        return out

    whole = product(slice(None))
    return all(
        torch.equal(product(some), whole[some]) for number in numbers for some in (slice(number), slice(-number, None))
    )


class Product(NamedTuple):
    """What is done with rows: they are multiplied, and something is added."""

    size: torch.Size  # width in, width out
    multiply: Callable[[Tensor, Tensor], object]  # rows (R, width in) into (R, width out)
    bias: Tensor | None  # (width out,); None: another product's has it in it


class Weights:
    """A network's weights as the steps read them, the gates that are sigmoids side by side and halved."""

    def __init__(self, network: CharRNN, arithmetic: str = "float32") -> None:
        rnn = network.rnn
        self.numbers_of_rows, multiplier = ARITHMETICS[arithmetic]

        def product(weight: Tensor, bias: Tensor | None) -> Product:
            return Product(weight.shape, multiplier(weight), bias)

        self.hidden_size = rnn.hidden_size
        self.cell = _CELLS[type(rnn)]
        symbols = network.one_hot if network.embedding is None else network.embedding.weight.detach()  # (V, I)
        self.inputs: list[Product] = []  # of each layer but the first, for which there is the table
        self.hidden: list[Product] = []  # of each layer
        for layer in range(rnn.num_layers):
            w_ih, w_hh, b_ih, b_hh = (getattr(rnn, f"{name}_l{layer}").detach().float() for name in _NAMES)
            if not isinstance(rnn, nn.GRU):  # whose reset gate stands before one hidden bias
                b_ih, b_hh = b_ih + b_hh, None
            arranged = self.cell.arranged
            if layer:
                self.inputs.append(product(arranged(w_ih.T), arranged(b_ih)))
            else:
                self.table = (symbols.float() @ arranged(w_ih.T) + arranged(b_ih)).numpy()  # (V, G)
            self.hidden.append(product(arranged(w_hh.T), None if b_hh is None else arranged(b_hh)))
        output = network.output
        self.output = product(
            output.weight.detach()[FIRST_WRITTEN:].float().T.contiguous(), output.bias.detach()[FIRST_WRITTEN:].float()
        )


class Steps:
    """The layers, which read one character of each of B texts at a time.

    Attributes:
        state: what they remember, arrays of shape (B, H).
        logits: the scores of the characters behind those read, from `FIRST_WRITTEN` on, shape (B, V - 1).
    """

    def __init__(self, weights: Weights, samples: int) -> None:
        def rows(width: int) -> Tensor:
            rest = samples % MOST_ROWS
            whole = next(number for number in weights.numbers_of_rows if number >= rest) if rest else 0
            return torch.zeros(samples - rest + whole, width)

        self._table = weights.table
        size, gates = weights.hidden_size, weights.table.shape[1]
        from_below, from_before, logits = rows(gates), rows(gates), rows(weights.output.size[1])
        self._x: Array = from_below.numpy()[:samples]
        self.logits: Array = logits.numpy()[:samples]
        self.state: list[Array] = []
        self._work: list[Callable[[], object]] = []  # of a step, in this order, behind the first layer's input gates
        hidden: Tensor | None = None
        for layer, product in enumerate(weights.hidden):
            if hidden is not None:
                self._multiply(hidden, weights.inputs[layer - 1], from_below)
            hidden = rows(size)
            self._multiply(hidden, product, from_before)
            cell = weights.cell(self._x, from_before.numpy()[:samples], hidden.numpy()[:samples])
            self.state += cell.state
            self._work.append(cell)
        assert hidden is not None
        self._multiply(hidden, weights.output, logits)

    def _multiply(self, rows: Tensor, product: Product, out: Tensor) -> None:
        for part, part_out in zip(torch.split(rows, MOST_ROWS), torch.split(out, MOST_ROWS), strict=True):
            self._work.append(partial(product.multiply, part, part_out))
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
