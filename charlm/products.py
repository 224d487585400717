"""Products on a CPU in which a row's sums do not depend, to the last bit, on the rows beside it.

    float32   Libraries sum in another order for a single row, some for three too, and for very many: few rows therefore
              have others beside them, and many are cut.
    int8      Weights that no core's cache holds are read from memory for each character, and that takes nearly all the
              time; in 8 bits they are a quarter. Each is rounded to a whole number of steps, at most 127, which are as
              wide as the largest of its column asks for. So is the state that they are multiplied with, in steps of
              1/127. Whole numbers come to the same sum in any order, and any number of rows may go the fastest way.

Each kind is tried before it is used, with the sizes that are used: a library may sum in other orders than those known
here, and processors without instructions for whole numbers of 8 bits cut their sums short.

Legend: R rows, K width in, N width out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

MOST_ROWS = 64  # that a product in float32 has
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

    @classmethod
    @abstractmethod
    def rows(cls, samples: int) -> int:
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
    """Of torch, which on Intel's processors sums two rows as it does many."""

    FEWEST_ROWS = 2

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self._weight = weight

    @classmethod
    def numbers_of_rows(cls) -> tuple[int, ...]:
        """Return how many rows there are, up to `MOST_ROWS`: not each number, but so that few are added."""
        return tuple(number for number in (2, 4, 8, 16, 24, 32, 48, MOST_ROWS) if number >= cls.FEWEST_ROWS)

    @classmethod
    def rows(cls, samples: int) -> int:
        rest = samples % MOST_ROWS
        return samples - rest + (next(number for number in cls.numbers_of_rows() if number >= rest) if rest else 0)

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
            for number in cls.numbers_of_rows()
            for some in (slice(number), slice(-number, None))
        )


class NumpyFloat32(Float32):
    """Of numpy: on AMD's processors a few times as fast as torch for few rows, and for up to some 500 units its sums
    agree from two rows on, if the columns fill its registers.
    """

    COLUMNS = 16

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        self._filled = F.pad(weight, (0, -weight.shape[1] % self.COLUMNS)).numpy()

    def into(self, out: Tensor, operand: Tensor) -> list[Work]:
        width = self.size[1]
        whole = width == self._filled.shape[1]
        filled = out.numpy() if whole else np.empty((len(out), self._filled.shape[1]), dtype=np.float32)
        parts = range(0, len(out), MOST_ROWS)
        work: list[Work] = [
            partial(np.dot, operand.numpy()[i : i + MOST_ROWS], self._filled, filled[i : i + MOST_ROWS]) for i in parts
        ]
        return work if whole else [*work, partial(np.copyto, out.numpy(), filled[:, :width])]


class WideFloat32(Float32):
    """Of torch, which on AMD's processors sums four rows as it does many, and fewer in another order."""

    FEWEST_ROWS = 4


class Int8(Product):
    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight)
        step = (torch.maximum(weight.amax(dim=0), -weight.amin(dim=0)) / LARGEST).clamp(min=1e-30)  # (N,)
        self._whole = (weight / step).round_().to(torch.int8).T.contiguous()  # (N, K)
        self._step = (step / LARGEST).numpy()  # of the sums

    @classmethod
    def rows(cls, samples: int) -> int:
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


# The kinds of product that an arithmetic may have, the best one first.
ARITHMETICS: dict[str, tuple[type[Product], ...]] = {
    "float32": (Float32, NumpyFloat32, WideFloat32),
    "int8": (Int8,),
}


def multiplied(product: Product, state: Tensor) -> Tensor:
    """Return the product of a state (R, K), shape (R, N)."""
    out = torch.empty(len(state), product.size[1])
    operand, renewed = product.operand(state)
    for work in (*renewed, *product.into(out, operand)):
        work()
    return out


@cache
def agree(width_in: int, width_out: int, threads: int, kind: type[Product]) -> bool:
    """Return whether products of these sizes, by so many threads, may be of this kind: see `Product.agrees`."""
    return kind.agrees(width_in, width_out)
