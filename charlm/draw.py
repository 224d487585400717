"""From scores to a character: temperature, top-k, top-p, and one random number.

Temperature divides the logits before the softmax; 0 takes the largest, infinity makes all equally likely. Top-k (Fan et
al., "Hierarchical neural story generation", 2018) keeps the k likeliest; top-p (Holtzman et al., "The curious case of
neural text degeneration", 2020) the fewest whose probabilities at this temperature sum to p. The character is where the
random number falls in the cumulative distribution.

Twice: `draw` for a GPU, where each operation is a kernel, and `Drawer` for a CPU, where numpy's small calls take a
fifth of the time of torch's. They choose alike. `prepared` makes of temperatures and random numbers what both take.

Legend: B samples side by side, V characters to choose from.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# So cold, nothing but the largest is left; dividing by it does not overflow.
COLDEST = 1e-30
# Random numbers have 24 bits: the next ones to 1 could be rounded up to it, behind the last character.
LARGEST_UNIFORM = 1 - 2**-24


def prepared(temperature: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Return temperature and random numbers, any shape that fits, with greedy as a case like all others.

    At the coldest temperature all probability is with the largest; of several as large, 0 falls upon the first.
    """
    exact = torch.float32 if uniform.device.type == "mps" else torch.float64  # MPS has no float64
    uniform = torch.where(temperature == 0, 0.0, uniform.to(exact))
    return temperature.to(exact).clamp(min=COLDEST), uniform.clamp(max=LARGEST_UNIFORM)


def draw(
    logits: Tensor,
    scaled: Tensor,
    uniform: Tensor,
    top_k: int | None = None,
    top_p: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Choose the next character of each sample, in as few kernels as can be. Nothing in it waits for the device.

    Args:
        logits: finite, shape (B, V).
        scaled: the logits over the temperature, prepared, same shape.
        uniform: random numbers, prepared, shape (B,); the choice is the inverse of the cumulative distribution there.
        top_k: None keeps all.
        top_p: None keeps all.
        out: where the ids go, if it is given.

    Returns:
        Ids, shape (B,).
    """
    if top_k is not None and top_k < logits.shape[1]:
        scaled = scaled.masked_fill(logits < logits.topk(top_k, dim=1).values[:, -1:], -torch.inf)
    probabilities = scaled.softmax(dim=1)  # (B, V)
    target = uniform[:, None]
    if top_p is not None:
        ordered, order = probabilities.sort(dim=1, descending=True, stable=True)
        surplus = ordered.cumsum(dim=1) - ordered >= top_p  # where those before already suffice
        probabilities = probabilities.masked_fill(surplus.gather(1, order.argsort(dim=1)), 0.0)
        target = target * probabilities.sum(dim=1, keepdim=True)
    cumulative = probabilities.cumsum(dim=1)
    place = None if out is None else out[:, None]
    # Never one of probability 0: all sum to 1 but for rounding, which is less than the target stays below 1.
    ids: Tensor = torch.searchsorted(cumulative, target, right=True, out=place)
    return ids.squeeze(1)


class Drawer:
    """Does what `draw` does, on numpy arrays of one shape, in place.

    Args:
        temperature: of each sample, prepared, shape (B,).
        choices: V.
        top_k: None keeps all.
        top_p: None keeps all.
    """

    def __init__(
        self,
        temperature: npt.NDArray[np.float64],
        choices: int,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> None:
        self._temperature = temperature[:, None]
        self._top_k = top_k if top_k is not None and top_k < choices else None
        self._top_p = top_p
        samples = len(temperature)
        self._largest = np.empty((samples, 1), dtype=np.float32)
        self._weights = np.empty((samples, choices))
        self._cumulative = np.empty((samples, choices))
        self._passed = np.empty((samples, choices), dtype=bool)

    def __call__(self, logits: npt.NDArray[np.float32], uniform: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """Choose the next character of each sample.

        Args:
            logits: finite, shape (B, V).
            uniform: random numbers, prepared, shape (B, 1).

        Returns:
            Ids, shape (B,).
        """
        weights, cumulative = self._weights, self._cumulative
        np.maximum.reduce(logits, axis=1, keepdims=True, out=self._largest)
        np.subtract(logits, self._largest, weights)
        np.divide(weights, self._temperature, weights)
        np.exp(weights, weights)  # at most 1
        if self._top_k is not None:
            weights[logits < np.partition(logits, -self._top_k, axis=1)[:, -self._top_k, None]] = 0
        if self._top_p is not None:
            order = np.argsort(-weights, axis=1, kind="stable")
            ordered = np.take_along_axis(weights, order, axis=1)
            before = ordered.cumsum(axis=1)
            surplus = before - ordered >= self._top_p * before[:, -1:]  # where those before already suffice
            np.put_along_axis(weights, order, np.where(surplus, 0, ordered), axis=1)
        np.add.accumulate(weights, axis=1, out=cumulative)
        target = uniform * cumulative[:, -1:]
        ids: npt.NDArray[np.int64]
        if len(target) == 1:
            ids = cumulative[0].searchsorted(target[0], "right")
        else:
            ids = np.add.reduce(np.less_equal(cumulative, target, self._passed), axis=1)
        return ids
