"""What charlm.decode_exact does between its products of matrices, in two kernels on CUDA, written in Triton.

A step of torch's own operations is nine kernels for a network of one layer, and each costs some two microseconds even
within a graph. Here an element of the state is made by one thread, from its gates to the unit that the next product
reads, and a text's character by one block, from its scores to the id (Tillet, Kung and Cox, "Triton: an intermediate
language and compiler for tiled neural network computations", 2019). Neither sees the other rows, so that what a text is
does not depend on what is drawn beside it.

Imported on CUDA alone: torch brings Triton there, which compiles the kernels on first use and keeps them in the folder
that TRITON_CACHE_DIR names, or ~/.triton/cache.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_CHOICE = 4096  # characters that one block draws from
_ELEMENTS = 128  # of the state, a block

# Whole numbers for which no kernel of its own is compiled.
_ANY = ("k", "first", "size", "choices")


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _tanh(x):
    return 1 - 2 / (1 + tl.exp(2 * x))  # exact to 2^-52 of 1; the state is rounded to 2^-24


@triton.jit
def _gate(gates, bias, index: tl.constexpr, element, size, inside):
    at = index * size + element
    return tl.load(gates + at, mask=inside, other=0.0) + tl.load(bias + at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=_ANY)
def _step(
    x, ids, k, first, y, bias_x, bias_y, carried, units, size, CELL: tl.constexpr, BY_ID: tl.constexpr,
    GATES: tl.constexpr, ELEMENTS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    element = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = element < size
    below = row
    if BY_ID:
        below = tl.load(ids + k * tl.num_programs(0) + row) + first
    x += below * GATES * size
    y += row * GATES * size
    mine = row * size + element
    if CELL == "lstm":
        i = _sigmoid(_gate(x, bias_x, 0, element, size, inside) + _gate(y, bias_y, 0, element, size, inside))
        f = _sigmoid(_gate(x, bias_x, 1, element, size, inside) + _gate(y, bias_y, 1, element, size, inside))
        g = _tanh(_gate(x, bias_x, 2, element, size, inside) + _gate(y, bias_y, 2, element, size, inside))
        o = _sigmoid(_gate(x, bias_x, 3, element, size, inside) + _gate(y, bias_y, 3, element, size, inside))
        c = f * tl.load(carried + mine, mask=inside, other=0.0) + i * g
        tl.store(carried + mine, c, mask=inside)
        h = o * _tanh(c)
    elif CELL == "gru":
        r = _sigmoid(_gate(x, bias_x, 0, element, size, inside) + _gate(y, bias_y, 0, element, size, inside))
        z = _sigmoid(_gate(x, bias_x, 1, element, size, inside) + _gate(y, bias_y, 1, element, size, inside))
        n = _tanh(_gate(x, bias_x, 2, element, size, inside) + r * _gate(y, bias_y, 2, element, size, inside))
        h = n + z * (tl.load(carried + mine, mask=inside, other=0.0) - n)
        tl.store(carried + mine, h, mask=inside)
    else:
        h = _tanh(_gate(x, bias_x, 0, element, size, inside) + _gate(y, bias_y, 0, element, size, inside))
    tl.store(units + mine, (h * 16777216.0).to(tl.int32).to(tl.float64), mask=inside)  # towards zero


@triton.jit(do_not_specialize=_ANY)
def _draw(logits, temperature, uniform, ids, k, choices, CHOICES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, CHOICES)
    inside = choice < choices
    scaled = tl.load(logits + row * choices + choice, mask=inside, other=0.0) / tl.load(temperature + row)
    scaled = tl.where(inside, scaled, float("-inf"))
    weights = tl.exp(scaled - tl.max(scaled, axis=0))
    cumulative = tl.cumsum(weights / tl.sum(weights, axis=0), axis=0)
    at = k * tl.num_programs(0) + row
    passed = (cumulative <= tl.load(uniform + at)) & inside
    tl.store(ids + at, tl.sum(passed.to(tl.int64), axis=0))


def step(
    cell: str,
    below: Tensor,
    characters: tuple[Tensor, int, int] | None,
    before: Tensor,
    biases: tuple[Tensor, Tensor],
    carried: Tensor,
    units: Tensor,
) -> None:
    """Take one step of a layer in place: `carried` and `units` become those of the next character.

    Args:
        cell: lstm, gru or rnn.
        below: the gates from below, (B, G), or, with `characters`, a table of them by character, (V, G).
        characters: None, or ids (K, B), which of the K is read, and what is added to each.
        before: the gates from before, (B, G).
        biases: of the gates from below and from before, (G,) each.
        carried: the cell state of an LSTM, the state of a GRU as it is, (B, H); a plain network has none.
        units: the state as a whole number of units of 2^-24, (B, H).
    """
    samples, size = units.shape
    ids, k, first = characters or (before, 0, 0)
    with torch.cuda.device_of(before):
        _step[(samples, triton.cdiv(size, _ELEMENTS))](
            below, ids, k, first, before, *biases, carried, units, size,
            CELL=cell, BY_ID=characters is not None, GATES=before.shape[1] // size, ELEMENTS=_ELEMENTS, num_warps=4,
        )  # fmt: skip


def draw(logits: Tensor, temperature: Tensor, uniform: Tensor, ids: Tensor, k: int) -> None:
    """Choose the next character of each of B texts, as `charlm.draw.draw` does.

    Args:
        logits: (B, V) with V at most `LARGEST_CHOICE`.
        temperature: (B,), prepared.
        uniform: (K, B), prepared.
        ids: (K, B), to be written.
        k: which of the K it is.
    """
    samples, choices = logits.shape
    width = triton.next_power_of_2(choices)
    with torch.cuda.device_of(logits):
        _draw[(samples,)](
            logits, temperature, uniform, ids, k, choices, CHOICES=width, num_warps=max(1, min(8, width // 256))
        )
