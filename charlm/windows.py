"""Fixed-size windows of a token block, and the three orders in which batches of them are read.

Legend: B batch, T window, N number of windows. Window i of a text is `T + 1` ids from `i * stride` on: the network
reads the first T and predicts the last T, each character from those before it.

    shuffled     all N windows of the training split in random order, each once an epoch; the state starts at zero
    streams      the training split as B lanes of contiguous text, read window after window; the state is carried

                    lane 0   [--- T ---][--- T ---][--- T ---]      batch k holds the k-th window of every lane
                    lane 1   [--- T ---][--- T ---][--- T ---]
                    ...         k = 0      k = 1      k = 2

    evaluation   the whole of a split in such lanes, to the last character: lanes may end unevenly, and `lengths` says
                 how many characters of each row count

A rank of several takes its own share of every batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from charlm.cache import advise
from charlm.corpus import Segment
from charlm.errors import InputError
from charlm.vocabulary import Ids

Int64 = npt.NDArray[np.int64]


class Permutation:
    """A random permutation of `range(size)` that is computed, not stored: `permutation(index)` takes no memory.

    A Feistel network is a bijection on numbers of 2k or 2k + 1 bits whatever its round function (Luby and Rackoff, "How
    to construct pseudorandom permutations", 1988). Values that fall outside of the range are sent through it again
    until they fall inside ("cycle walking": Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). The
    round function is a multiply-and-shift hash under keys drawn from the seed.
    """

    _ROUNDS = 6  # even, so that the halves of an odd number of bits end where they began
    _FEWEST_BITS = 8  # halves of fewer than 4 bits reach too few permutations to look random

    def __init__(self, size: int, seed: Sequence[int]) -> None:
        self.size = size
        bits = max(self._FEWEST_BITS, (size - 1).bit_length())
        self._widths = (bits // 2, bits - bits // 2)  # of the left half and the right half
        draw = np.random.Generator(np.random.Philox(np.random.SeedSequence(seed)))
        # Per round: an offset, and an odd multiplier, whose product is a bijection modulo 2**64.
        self._keys = draw.integers(2**64, size=(self._ROUNDS, 2), dtype=np.uint64) | np.array([0, 1], dtype=np.uint64)

    def __call__(self, index: Int64) -> Int64:
        """Return where the permutation sends each of `index`, same shape."""
        value: npt.NDArray[np.uint64] = self._scramble(index.astype(np.uint64))
        while (outside := np.flatnonzero(value >= self.size)).size:
            value.ravel()[outside] = self._scramble(value.ravel()[outside])
        return value.astype(np.int64)

    def _scramble(self, value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left_bits, right_bits = self._widths
        left, right = value >> np.uint64(right_bits), value & np.uint64(2**right_bits - 1)
        for offset, multiplier in self._keys:
            mixed = (right + offset) * multiplier
            mixed ^= mixed >> np.uint64(32)
            mixed *= multiplier
            left, right = right, left ^ (mixed >> np.uint64(64 - left_bits))
            left_bits, right_bits = right_bits, left_bits
        return (left << np.uint64(right_bits)) | right


class Windows:
    """The windows of a split, by number: segment after segment, every `stride` characters, none across a boundary.

    A segment of l characters has l - T windows at stride 1.
    """

    def __init__(self, segments: Sequence[Segment], window: int, stride: int = 1) -> None:
        bounds = np.array([(a, b) for a, b in segments if b - a > window], dtype=np.int64).reshape(-1, 2)
        self.window = window
        self.stride = stride
        self._segment_starts = bounds[:, 0]
        self._ends = np.cumsum((bounds[:, 1] - bounds[:, 0] - window - 1) // stride + 1)  # window numbers, by segment

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def starts(self, index: Int64) -> Int64:
        """Return where in the block the windows of these numbers begin, same shape."""
        segment = np.searchsorted(self._ends, index, side="right")
        first = np.concatenate([[0], self._ends])[segment]
        starts: Int64 = self._segment_starts[segment] + (index - first) * self.stride
        return starts


def gather(block: Tensor, starts: Tensor, window: int) -> Tensor:
    """Return the windows of `block` that begin at `starts`.

    Args:
        block: ids of a text, shape (characters,).
        starts: int64, shape (B,).
        window: T.

    Returns:
        Ids of the block's type, shape (B, T + 1).
    """
    return block.unfold(0, window + 1, 1).index_select(0, starts)


class Batch(NamedTuple):
    """What a step reads."""

    tokens: Tensor  # (B, T + 1) ids: T to read and, one further, T to predict
    fresh: bool  # whether the hidden state starts at zero here, or is carried over from the batch before
    lengths: Tensor | None = None  # (B,) how many of the T predictions of a row count; None: all


class Starts(NamedTuple):
    """Where a step finds its windows, for one that gathers them itself from a block on its device."""

    starts: Tensor  # (B,) places in the block, int64
    fresh: bool  # as in `Batch`


class Batches:
    """An epoch's batches, for Lightning to iterate; knows its place, so that a checkpoint can continue behind it.

    Args:
        starts_on: None gives the windows themselves (`Batch`); a device, only where they begin (`Starts`), on it.
        pinned: whether windows are laid where a CUDA device reads them by itself, so that nothing waits for the copy.
    """

    def __init__(self, starts_on: torch.device | None = None, pinned: bool = False) -> None:
        self.starts_on = starts_on
        self.pinned = pinned
        self.end: int | None = None  # batches after which an epoch ends; None: all
        self.repeats = False  # whether all epochs are the first
        self.epoch = 0
        self.position = 0  # batches of this epoch already given

    def __len__(self) -> int:
        raise NotImplementedError

    def batches(self, epoch: int, start: int) -> Iterator[Batch | Starts]:
        """Yield the batches of an epoch from number `start` on."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Batch | Starts]:
        # Lightning stops after the last batch without asking for more, so nothing behind the last `yield` would run:
        # the turn of the epoch is made at the next epoch's start.
        if self.position >= (len(self) if self.end is None else self.end):
            self.epoch, self.position = self.epoch + (not self.repeats), 0
        for batch in self.batches(self.epoch, self.position):
            self.position += 1
            if self.pinned and isinstance(batch, Batch):
                yield batch._replace(tokens=batch.tokens.pin_memory())
            else:
                yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the place in the text, as plain numbers."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where `state` was taken."""
        self.epoch, self.position = state["epoch"], state["position"]


class ShuffledBatches(Batches):
    """All windows of a split in random order, each once an epoch, in batches of equal size.

    The seed, the epoch and the batch's number alone say which windows come next. What is left over when N does not
    divide by the batch is left out: other windows each epoch, fewer than one batch of all ranks.
    """

    _AHEAD = 2**14  # windows whose order is computed at a time: enough to make the cost per batch small

    def __init__(
        self,
        block: Tensor,
        windows: Windows,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        starts_on: torch.device | None = None,
        pinned: bool = False,
        mapped: Ids | None = None,
    ) -> None:
        super().__init__(starts_on, pinned)
        self._block = block
        self._mapped = mapped if isinstance(mapped, np.memmap) else None
        self._windows = windows
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._world_size = world_size

    def __len__(self) -> int:
        return len(self._windows) // (self._batch_size * self._world_size)

    def starts(self, epoch: int, start: int) -> Iterator[Tensor]:
        """Yield where the windows of each batch begin in the block, shape (B,), from batch number `start` on."""
        permutation = Permutation(len(self._windows), (self._seed, epoch))
        whole_batch = self._batch_size * self._world_size
        ahead = max(1, self._AHEAD // self._batch_size)
        in_batch = self._rank * self._batch_size + np.arange(self._batch_size)
        for first in range(start, len(self), ahead):
            batch = np.arange(first, min(first + ahead, len(self)))
            index = permutation(batch[:, None] * whole_batch + in_batch)
            # Many batches' at once: one by one, the copies to a device would take longer than a small network's step.
            starts = torch.from_numpy(self._windows.starts(index))
            if self.starts_on and self.starts_on.type == "cuda":
                starts = starts.pin_memory()  # or the host would wait until the device had done all that lies before
            yield from starts.to(self.starts_on or "cpu", non_blocking=True)

    def batches(self, epoch: int, start: int) -> Iterator[Batch | Starts]:
        if self.starts_on:
            yield from (Starts(starts, fresh=True) for starts in self.starts(epoch, start))
            return
        for starts, following in pairwise(chain([None], self.starts(epoch, start), [None])):
            if following is not None:
                self._ask_for(following)
            if starts is not None:
                yield Batch(gather(self._block, starts, self._windows.window), fresh=True)

    def _ask_for(self, starts: Tensor) -> None:
        """Have the system read a batch's windows from disk, all at once, while the batch before it is used.

        Gathered without it, each would be waited for by itself.
        """
        if self._mapped is not None:
            for start in starts.tolist():
                advise(self._mapped, "WILLNEED", start, start + self._windows.window + 1)


class LaneBatches(Batches):
    """Lanes of contiguous text, read window after window, `lanes` of them at a time; the same every epoch."""

    def __init__(
        self,
        block: Tensor,
        lanes: Sequence[Segment],
        at_a_time: int,
        window: int,
        rank: int = 0,
        world_size: int = 1,
        starts_on: torch.device | None = None,
        pinned: bool = False,
    ) -> None:
        super().__init__(starts_on, pinned)
        self._block = block
        self._window = window
        share = math.ceil(at_a_time / world_size)
        longest_first = sorted(lanes, key=lambda lane: lane[0] - lane[1])
        self._groups: list[tuple[Tensor, Tensor]] = []  # starts and stops, (share,)
        self._chunks: list[tuple[int, int]] = []  # (group, characters of it already read), one for each batch
        for i in range(0, len(longest_first), at_a_time):
            group = longest_first[i : i + at_a_time]
            self._chunks += [(len(self._groups), t) for t in range(0, group[0][1] - group[0][0] - 1, window)]
            mine = group[rank::world_size]
            mine += [(0, 0)] * (share - len(mine))  # an empty lane, so that every rank's batches have one shape
            starts, stops = torch.tensor(mine).T
            self._groups.append((starts, stops))

    def __len__(self) -> int:
        return len(self._chunks)

    def batches(self, epoch: int, start: int) -> Iterator[Batch | Starts]:
        if self.starts_on:  # of training, whose lanes are whole windows
            first = [starts.to(self.starts_on) for starts, _ in self._groups]
            for group, t in self._chunks[start:]:
                yield Starts(first[group] + t, fresh=t == 0)
            return
        for group, t in self._chunks[start:]:
            starts, stops = self._groups[group]
            lengths = (stops - starts - 1 - t).clamp(0, self._window)  # (B,)
            columns = torch.arange(max(1, int(lengths.max())) + 1)  # (T + 1,)
            index = torch.minimum((starts + t)[:, None] + columns, (stops - 1).clamp_min(0)[:, None])  # (B, T + 1)
            yield Batch(self._block[index], fresh=t == 0, lengths=lengths)


def number_of_lanes(characters: int) -> int:
    """Return into how many lanes evaluation cuts a split of so many characters: 16 to 128, of 10,000 if there can be.

    More lanes read a large split faster on a GPU, but each begins with one character that is not scored and some that
    have little before them. The device has no say, so that figures compare across devices.
    """
    return min(max(characters // 10_000, 16), 128)


def evaluation_lanes(segments: Sequence[Segment], lanes: int) -> list[Segment]:
    """Cut segments into about `lanes` lanes of about equal length that cover every character.

    The first character of a lane has nothing before it to be predicted from; each other one is scored exactly once.
    """
    total = sum(stop - start for start, stop in segments)
    cut: list[Segment] = []
    for start, stop in segments:
        parts = max(1, min(round(lanes * (stop - start) / total), (stop - start) // 2))
        bounds = [start + (stop - start) * i // parts for i in range(parts + 1)]
        cut += [(a, b) for a, b in pairwise(bounds) if b - a > 1]
    return cut


def stream_lanes(segments: Sequence[Segment], lanes: int, window: int) -> list[Segment]:
    """Cut segments into exactly `lanes` lanes of one length, a whole number of windows and the character behind.

    Each segment gets lanes in proportion to its length, at least one. What is left over at the ends is left out.

    Raises:
        InputError: more segments than lanes, or lanes shorter than a window.
    """
    if len(segments) > lanes:
        raise InputError(
            f"data.order=streams reads {lanes} lanes side by side, but the training text lies in {len(segments)} "
            "pieces that must not be joined; set data.separator, or data.order=shuffled"
        )
    shares = [1] * len(segments)
    for _ in range(lanes - len(segments)):  # the next lane goes to the segment whose lanes are the longest
        longest = max(range(len(segments)), key=lambda i: (segments[i][1] - segments[i][0]) / shares[i])
        shares[longest] += 1
    # A lane of `length` characters is followed by one more, the last one's target.
    length = min((stop - start - 1) // share for (start, stop), share in zip(segments, shares, strict=True))
    length -= length % window
    if not length:
        shortest = min((stop - start - 1) // share for (start, stop), share in zip(segments, shares, strict=True))
        raise InputError(
            f"the training text makes {lanes} streams of {shortest} characters, shorter than data.window={window}; "
            "lower data.batch_size or data.window"
        )
    return [
        (start + i * length, start + (i + 1) * length + 1)
        for (start, _), share in zip(segments, shares, strict=True)
        for i in range(share)
    ]
