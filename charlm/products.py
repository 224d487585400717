"""Products on a CPU in which a row's sums do not depend, to the last bit, on the rows beside it.

    float32   Libraries sum in another order for a single row, some for three too, and for very many: few rows therefore
              have others beside them, and many are cut.
    int8      Weights that no core's cache holds are read from memory for each character, and that takes nearly all the
              time; in 8 bits they are a quarter. Each is rounded to a whole number of steps, at most 127, which are as
              wide as the largest of its column asks for. So is the state that they are multiplied with, in steps of
              1/127. Whole numbers come to the same sum in any order, and any number of rows may go the fastest way.

Both are tried before they are used, with the sizes that are used: a library may sum in other orders than those known
here, and processors without instructions for whole numbers of 8 bits cut their sums short.

Legend: R rows, K width in, N width out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor

MOST_ROWS = 64  # that a product in float32 has
NUMBERS_OF_ROWS = (2, 4, 8, 16, 24, 32, 48, MOST_ROWS)  # so that what is added is little
LARGEST = 127  # whole number of 8 bits that has a negative one

Work = Callable[[], object]


class Product(ABC):
    """A weight to multiply with.

    Args:
        weight: float32, shape (K, N).

    Attributes:
        size: K, N.
    """

    @abstractmethod
    def __init__(self, weight: Tensor) -> None:
        self.size = weight.shape

    @staticmethod
    @abstractmethod
    def rows(samples: int) -> int:
        """Return how many rows there have to be, at least so many."""

    @staticmethod
    @abstractmethod
    def operand(state: Tensor) -> tuple[Tensor, list[Work]]:
        """Return what is multiplied in the place of a state (R, K) between -1 and 1, and what keeps it up to date."""

    @abstractmethod
    def into(self, out: Tensor, operand: Tensor) -> list[Work]:
        """Return what writes the product of an operand (R, K) into `out`, float32, shape (R, N)."""

    @classmethod
    @abstractmethod
    def agrees(cls, width_in: int, width_out: int) -> bool:
        """Return whether all numbers of rows give a row of these sizes the same sums."""


class Float32(Product):
    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self._weight = weight

    @staticmethod
    def rows(samples: int) -> int:
        rest = samples % MOST_ROWS
        return samples - rest + (next(number for number in numbers_of_rows() if number >= rest) if rest else 0)

    @staticmethod
    def operand(state: Tensor) -> tuple[Tensor, list[Work]]:
        return state, []

    def into(self, out: Tensor, operand: Tensor) -> list[Work]:
        parts = zip(torch.split(operand, MOST_ROWS), torch.split(out, MOST_ROWS), strict=True)
        return [partial(torch.mm, part, self._weight, out=part_out) for part, part_out in parts]

    @classmethod
    def agrees(cls, width_in: int, width_out: int) -> bool:
        draw = torch.Generator().manual_seed(0)
        state = torch.randn(MOST_ROWS, width_in, generator=draw)
        product = cls(torch.randn(width_in, width_out, generator=draw))
        whole = multiplied(product, state)
        return all(
            torch.equal(multiplied(product, state[some]), whole[some])
            for number in numbers_of_rows()
            for some in (slice(number), slice(-number, None))
        )


class Int8(Product):
    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        step = (torch.maximum(weight.amax(dim=0), -weight.amin(dim=0)) / LARGEST).clamp(min=1e-30)  # (N,)
        self._whole = (weight / step).round_().to(torch.int8).T.contiguous()  # (N, K)
        self._step = (step / LARGEST).numpy()  # of the sums

    @staticmethod
    def rows(samples: int) -> int:
        return samples

    @staticmethod
    def operand(state: Tensor) -> tuple[Tensor, list[Work]]:
        whole, steps = torch.zeros(state.shape, dtype=torch.int8), np.zeros(state.shape, dtype=np.float32)
        return whole, [
            partial(np.multiply, state.numpy(), np.float32(LARGEST), steps),
            partial(np.rint, steps, steps),
            partial(np.copyto, whole.numpy(), steps, "unsafe"),
        ]

    def into(self, out: Tensor, operand: Tensor) -> list[Work]:
        sums, floats = torch.empty(out.shape, dtype=torch.int32), out.numpy()
        if len(operand) == 1:  # as a column behind the weights, which then are read in the order in which they lie
            multiply = partial(torch._int_mm, self._whole, operand.T, out=sums.T)
        else:
            multiply = partial(torch._int_mm, operand, self._whole.T, out=sums)
        return [
            multiply,
            partial(np.copyto, floats, sums.numpy(), "unsafe"),
            partial(np.multiply, floats, self._step, floats),
        ]

    @classmethod
    def agrees(cls, width_in: int, width_out: int) -> bool:
        draw = torch.Generator().manual_seed(0)
        state = 2 * torch.rand(MOST_ROWS, width_in, generator=draw) - 1  # large numbers, as a cut sum has
        product = cls(2 * torch.rand(width_in, width_out, generator=draw) - 1)
        exact = (state * LARGEST).round().double() @ product._whole.T.double()  # float64 holds whole numbers to 2^53
        expected = exact.float() * torch.from_numpy(product._step)
        try:
            return all(torch.equal(multiplied(product, state[:n]), expected[:n]) for n in (1, 2, 16, MOST_ROWS))
        except (AttributeError, RuntimeError):  # this torch has no such product
            return False


@cache
def numbers_of_rows() -> tuple[int, ...]:
    """Return how many rows a product in float32 has: those that there are, from the fewest on whose sums are those of
    many. With MKL these are 2 on Intel's processors and 4 on AMD's, which it gives another kernel for 3 and less.
    """
    draw = torch.Generator().manual_seed(0)
    state, weight = torch.randn(MOST_ROWS, 64, generator=draw), torch.randn(64, 256, generator=draw)
    whole = state @ weight
    fewest = next(number for number in NUMBERS_OF_ROWS if torch.equal(state[:number] @ weight, whole[:number]))
    return NUMBERS_OF_ROWS[NUMBERS_OF_ROWS.index(fewest) :]


ARITHMETICS: dict[str, type[Product]] = {"float32": Float32, "int8": Int8}


def multiplied(product: Product, state: Tensor) -> Tensor:
    """Return the product of a state (R, K), shape (R, N)."""
    out = torch.empty(len(state), product.size[1])
    operand, renewed = product.operand(state)
    for work in (*renewed, *product.into(out, operand)):
        work()
    return out


@cache
def agree(width_in: int, width_out: int, threads: int, arithmetic: str) -> bool:
    """Return whether products of these sizes, by so many threads, may be used: see `Product.agrees`."""
    return ARITHMETICS[arithmetic].agrees(width_in, width_out)
