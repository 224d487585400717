"""What a text has in common with the text that a network was trained on: runs that stand there verbatim.

McCoy et al., "How much do language models copy from their training data?", 2023, ask the same of n-grams of words.

The training text is read once, a chunk at a time. All n-grams of a chunk are hashed together (Karp and Rabin,
"Efficient randomized pattern-matching algorithms", 1987); where a hash is one that is sought, the characters are
compared, so that a collision never counts. Sought are the n-grams of 30 characters, and of each sample those that are
one longer than its longest run so far.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from charlm.corpus import Segment
from charlm.vocabulary import Ids

Hashes = npt.NDArray[np.uint64]
Places = npt.NDArray[np.int64]

LENGTH = 30  # characters from which on a run counts as copied

_CHUNK = 2**16  # characters at a time: what is computed of them stays in the processor's cache
_MULTIPLIER = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64; the golden ratio's first 64 bits
_FILTER_BITS = 18  # a table of so many first bits of a hash, in the cache too, rules out nearly all that is not sought
_COMPARED = 2**22  # characters compared at a time


@dataclass(frozen=True)
class Copying:
    """What of a sample stands verbatim in the training text."""

    longest: int  # characters of the longest run
    share: float  # of the sample's characters, those in runs of at least `LENGTH`; NaN for an empty sample


def find_copying(samples: Sequence[Ids], block: Ids, segments: Sequence[Segment]) -> list[Copying]:
    """Return how much of each sample stands verbatim in a text. White space and rows of dashes count like all else.

    Args:
        samples: the ids of each, shape (characters,).
        block: the ids of the text, shape (characters,), of any integer type; may be memory-mapped.
        segments: where in the block to look; a run does not go from one into another.
    """
    if not samples:
        return []
    spans = list(pairwise(np.cumsum([0, *map(len, samples)]).tolist()))
    text = _Text(block, segments, longest=max(map(len, samples)))
    ids = np.concatenate(samples).astype(block.dtype)
    runs = _Sought(ids, spans, LENGTH, text)
    longer = [_Sought(ids, [span], 1, text) for span in spans]
    copied = np.zeros(len(ids), dtype=bool)
    for chunk in text.chunks():
        for position in runs.take(chunk)[0]:
            copied[position : position + LENGTH] = True
        for number, span in enumerate(spans):
            while True:
                positions, places = longer[number].take(chunk)
                if not len(positions):
                    break
                run = text.common(ids[positions[0] : span[1]], int(places[0]))
                longer[number] = _Sought(ids, [span], run + 1, text)
    return [
        Copying(sought.length - 1, float(copied[start:stop].mean()) if stop > start else math.nan)
        for (start, stop), sought in zip(spans, longer, strict=True)
    ]


class _Text:
    """A block of ids, its segments, and the powers by which n-grams are hashed.

    Args:
        longest: how long n-grams are at most.
    """

    def __init__(self, block: Ids, segments: Sequence[Segment], longest: int) -> None:
        self.block = block
        kept = sorted(segment for segment in segments if segment[0] < segment[1])
        self._starts = np.array([start for start, _ in kept], dtype=np.int64)
        self._stops = np.array([stop for _, stop in kept], dtype=np.int64)
        self._size = max(_CHUNK, longest)
        self._overlap = longest
        powers = np.full(self._size + longest, _MULTIPLIER, dtype=np.uint64)
        self.powers = np.cumprod(np.r_[np.uint64(1), powers])
        powers[:] = pow(_MULTIPLIER, -1, 2**64)
        self.inverses = np.cumprod(np.r_[np.uint64(1), powers])

    def chunks(self) -> Iterator[_Chunk]:
        """Yield all that is in the segments, adjacent ones together, each chunk with the beginning of the next."""
        starts = np.setdiff1d(self._starts, self._stops).tolist()
        stops = np.setdiff1d(self._stops, self._starts).tolist()
        for start, stop in zip(starts, stops, strict=True):
            for place in range(start, stop, self._size):
                ids = self.block[place : min(place + self._size + self._overlap, stop)]
                yield _Chunk(self, ids, place, self._size)

    def ends(self, places: Places) -> Places:
        """Return where the segment of each place ends."""
        return self._stops[np.searchsorted(self._starts, places, side="right") - 1]

    def common(self, ids: Ids, place: int) -> int:
        """Return how many ids are the same from the beginning of `ids` and from a place on."""
        there = self.block[place : min(place + len(ids), int(self.ends(np.array(place))))]
        different = np.flatnonzero(ids[: len(there)] != there)
        return int(different[0]) if len(different) else len(there)


class _Chunk:
    """A stretch of ids and the hashes of all its n-grams.

    The hash of c0 c1 ... is c0 + c1 m + c2 m^2 + ... modulo 2^64: a difference of prefix sums times a power of 1/m.
    """

    def __init__(self, text: _Text, ids: Ids, place: int, size: int) -> None:
        self.place = place  # of its first id in the block
        self._text = text
        self._size = size  # n-grams that begin behind belong to the next chunk
        self._sums = np.zeros(len(ids) + 1, dtype=np.uint64)
        np.cumsum(ids.astype(np.uint64) * text.powers[: len(ids)], out=self._sums[1:])

    def hashes(self, length: int) -> Hashes:
        """Return the hash of each n-gram of a length, by where it begins."""
        count = max(min(self._size, len(self._sums) - length), 0)
        hashes = self._sums[length : length + count] - self._sums[:count]
        hashes *= self._text.inverses[:count]
        return hashes


class _Sought:
    """The n-grams of a length in some spans of ids that have not been found in a text yet."""

    def __init__(self, ids: Ids, spans: Sequence[tuple[int, int]], length: int, text: _Text) -> None:
        self.length = length
        self._ids = ids
        self._text = text
        positions = [np.arange(start, stop - length + 1) for start, stop in spans]
        hashes = [_Chunk(text, ids[start:stop], 0, stop - start).hashes(length) for start, stop in spans]
        self._set(np.concatenate(positions), np.concatenate(hashes))

    def _set(self, positions: Places, hashes: Hashes) -> None:
        order = np.argsort(hashes, kind="stable")
        self._positions, self._hashes = positions[order], hashes[order]
        self._filter = np.zeros(2**_FILTER_BITS, dtype=bool)
        self._filter[_first_bits(hashes)] = True

    def take(self, chunk: _Chunk) -> tuple[Places, Places]:
        """Return the positions of n-grams that stand in the chunk, and a place of each; they are sought no longer."""
        found: list[tuple[Places, Places]] = [(np.empty(0, np.int64), np.empty(0, np.int64))]
        if len(self._hashes):
            hashes = chunk.hashes(self.length)
            candidates = np.flatnonzero(self._filter[_first_bits(hashes)])
            hashes, places = hashes[candidates], chunk.place + candidates
            whole = places + self.length <= self._text.ends(places)
            hashes, places = hashes[whole], places[whole]
            while len(places := places[known := self._known(hashes)]):
                hashes = hashes[known]
                # One place of each hash suffices, unless something else has the same hash.
                _, first = np.unique(hashes, return_index=True)
                found.append(self._take(hashes[first], places[first]))
                hashes, places = np.delete(hashes, first), np.delete(places, first)
        return np.concatenate([pair[0] for pair in found]), np.concatenate([pair[1] for pair in found])

    def _known(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        nearest = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        return self._hashes[nearest] == hashes if len(self._hashes) else np.zeros(len(hashes), dtype=bool)

    def _take(self, hashes: Hashes, places: Places) -> tuple[Places, Places]:
        """Take out the n-grams that are the same as those at places of the same hash."""
        begins = np.searchsorted(self._hashes, hashes)
        counts = np.searchsorted(self._hashes, hashes, side="right") - begins
        entries = np.arange(counts.sum()) + np.repeat(begins - np.cumsum(counts) + counts, counts)
        places = np.repeat(places, counts)
        same = self._same(self._positions[entries], places)
        taken = self._positions[entries[same]], places[same]
        if same.any():
            self._set(np.delete(self._positions, entries[same]), np.delete(self._hashes, entries[same]))
        return taken

    def _same(self, positions: Places, places: Places) -> npt.NDArray[np.bool_]:
        """Return whether the n-grams at positions of the samples are those at places of the text."""
        offsets = np.arange(self.length)
        step = max(_COMPARED // self.length, 1)
        parts = [
            self._ids[positions[i : i + step, None] + offsets] == self._text.block[places[i : i + step, None] + offsets]
            for i in range(0, len(positions), step)
        ]
        return np.concatenate([part.all(axis=1) for part in parts])


def _first_bits(hashes: Hashes) -> npt.NDArray[np.int64]:
    return (hashes >> np.uint64(64 - _FILTER_BITS)).view(np.int64)
