"""What a loss in nats is in other units, and how sure it is."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

RESAMPLES = 1000  # of a text, to see how much its mean loss varies


def bits(nats: float) -> float:
    """Return nats as bits: nats per character are thus bits per character."""
    return nats / math.log(2)


def bootstrap_standard_error(nats: npt.NDArray[np.float64], characters: npt.NDArray[np.float64]) -> float:
    """Return the standard error of a mean loss per character, by resampling blocks of text.

    Neighbouring characters are not independent, so that blocks (here windows) are drawn with replacement, not
    characters (Künsch, "The jackknife and the bootstrap for general stationary observations", 1989).

    Args:
        nats: the loss summed over each block, shape (blocks,).
        characters: how many characters each block has, same shape.
    """
    blocks = len(nats)
    draw = np.random.default_rng(0)
    means = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        # How often each block is drawn says as much as the list of the draws, and is quicker to sum over.
        times = np.bincount(draw.integers(blocks, size=blocks), minlength=blocks)
        means[i] = (times @ nats) / (times @ characters)
    return float(means.std(ddof=1))
