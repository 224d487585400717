"""Out of memory: said in one line, with the batch size that would fit by estimate."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from charlm.datamodule import CharDataModule
from charlm.errors import InputError, RunStopped
from charlm.module import CharLM
from charlm.network import CharRNN

BYTES_A_WEIGHT = 16  # itself, its gradient, and the optimizer's two means
SHARE = 0.9  # of a device's memory that a run can count on: its driver and the gaps between blocks take the rest
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def refuse_too_large(vocabulary_size: int, sizes: Mapping[str, Any]) -> None:
    """Refuse a network whose weights alone are more than this machine can hold.

    Args:
        vocabulary_size: V.
        sizes: the other arguments of `CharRNN`.

    Raises:
        InputError: it is.
    """
    has = _memory(torch.device("cpu"))
    try:
        with torch.device("meta"):  # sizes without weights
            needs = CharRNN(vocabulary_size, **sizes).size * BYTES_A_WEIGHT
    except RuntimeError:  # more than can be counted
        needs = 2**63
    if needs > has:
        raise InputError(
            f"a network of these sizes takes {needs / 1e9:,.0f} GB to train, and this machine has {has / 1e9:,.0f} GB; "
            "lower model.hidden_size or model.num_layers"
        )


@contextmanager
def within_memory(model: CharLM, data: CharDataModule, device: torch.device) -> Iterator[None]:
    """Around what may take too much memory.

    Args:
        model: what is trained.
        data: on what.
        device: where. The model itself may have been moved away from it by the time of the error.

    Raises:
        RunStopped: it did.
    """
    try:
        yield
    except (torch.cuda.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.cuda.OutOfMemoryError) and not any(sign in str(error) for sign in _SIGNS):
            raise
        batch_size, window = data.config.batch_size, data.config.window
        fits = batch_size_that_fits(model, data, device, _wanted(str(error), device))
        remedy = (
            f"by estimate data.batch_size={fits} fits"
            if fits
            else "by estimate not even one window fits: make data.window or the model smaller"
        )
        raise RunStopped(
            f"out of memory on {device} at data.batch_size={batch_size}, data.window={window}; {remedy}"
        ) from None


# How cuDNN and torch's CPU allocator say it, each in an error of the most general type.
_SIGNS = ("CUDNN_STATUS_ALLOC_FAILED", "DefaultCPUAllocator")


def batch_size_that_fits(model: CharLM, data: CharDataModule, device: torch.device, seen: int) -> int:
    """Return how many windows fit on a device beside the weights, by estimate; fewer than did not; or 0.

    Args:
        model: what is trained.
        data: with the batch size that was too large.
        device: where.
        seen: bytes that had been taken or asked for when memory ran out: more than that the batch needs.
    """
    batch_size = data.config.batch_size
    weights = model.network.size * BYTES_A_WEIGHT
    text = data.corpus.block.nbytes if data.resident_on is not None else 0
    free = SHARE * _memory(device) - weights - text
    window = max(window_bytes(model.network, data.config.window), (seen - weights - text) / batch_size)
    fits = min(int(free / window), batch_size // 2)
    return max(0, fits - fits % 8 if fits > 8 else fits)


def window_bytes(network: CharRNN, window: int) -> float:
    """Return about how many bytes a window's forward and backward pass keep, in fp32.

    A recurrent layer keeps gates, state and output of each character, and the gradients of these; the output layer
    scores, their softmax and the gradients of both.
    """
    rnn = network.rnn
    gates = {torch.nn.LSTM: 4, torch.nn.GRU: 3}.get(type(rnn), 1)
    recurrent = 2 * rnn.num_layers * (gates + 2) * rnn.hidden_size
    output = 4 * network.output.out_features + 2 * rnn.input_size
    return 4.0 * float(window * (recurrent + output))


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _wanted(message: str, device: torch.device) -> int:
    """Return how many bytes there were at most, with those that were asked for in vain."""
    asked = re.search(r"Tried to allocate ([\d.]+) (KiB|MiB|GiB)", message)
    more = int(float(asked[1]) * _UNITS[asked[2]]) if asked else 0
    return more + (torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0)
