"""Documents -> one block of ids, in one pass over the text and in bounded memory.

What training never sees must become `<unk>`, but where training ends is known only once the whole text is. So ids are
first given out in the order in which characters appear, and changed to those of the vocabulary afterwards, in place.
A block is an array, or where it is too large, a memory-mapped file.
"""

from __future__ import annotations

import os
import shutil
from array import array
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from charlm.cache import advise
from charlm.sources import SPLITS, Piece
from charlm.vocabulary import END, END_CODE, Ids, code_points, looked_up, looked_up_characters

CHUNK = 2**22  # characters changed or counted at a time


@dataclass
class Draft:
    """A text in ids by first appearance."""

    block: Ids  # shape (characters,)
    alphabet: npt.NDArray[np.int64]  # code point of each id; id 0 is none's
    ends: npt.NDArray[np.int64]  # where each document ends, its separator included
    splits: npt.NDArray[np.int8]  # of each document, the place in `SPLITS` of the one that its source says; -1: none


def encode(pieces: Iterable[Piece], separator: str | None, file: Path | None, progress: Any) -> Draft:
    """Lay documents one behind the other: a text between them, `<eos>` behind each, or nothing.

    Documents without text are left out.

    Args:
        pieces: the documents.
        separator: a text, `<eos>`, or None.
        file: where to write the block; None keeps it in memory.
        progress: told the bytes read, by `update`.

    Raises:
        InputError: a lone surrogate in the text.
    """
    writer = _Writer(file)
    ends, splits = array("q"), array("b")  # there may be millions of documents
    begun = 0
    with closing(writer):
        for piece in pieces:
            writer.write(piece.text)
            if piece.ends and writer.length > begun:
                if separator == END:
                    writer.write_end()
                elif separator:
                    writer.write(separator)
                begun = writer.length
                ends.append(begun)
                splits.append(SPLITS.index(piece.split) if piece.split else -1)
            progress.update(piece.size)
    alphabet = np.zeros(1 + len(writer.codes), dtype=np.int64)
    alphabet[1:] = writer.codes
    return Draft(writer.block(), alphabet, np.array(ends, dtype=np.int64), np.array(splits, dtype=np.int8))


class _Writer:
    """Appends characters to a block, giving each its id as it first appears."""

    def __init__(self, file: Path | None) -> None:
        self.length = 0
        self.codes: list[int] = []
        self._ids: Ids = np.zeros(END_CODE + 1, dtype=np.uint8)
        self._parts: list[Ids] = []
        self._path = file
        self._file = file.open("wb") if file else None

    def write(self, text: str) -> None:
        ids = looked_up_characters(self._ids, text)
        if not ids.all():
            for code in np.unique(code_points(text)[ids == 0]):
                self._number(int(code))
            ids = looked_up_characters(self._ids, text)
        self._append(ids)

    def write_end(self) -> None:
        """Append the symbol that ends a document."""
        if not self._ids[END_CODE]:
            self._number(END_CODE)
        self._append(self._ids[END_CODE:])

    def _append(self, ids: Ids) -> None:
        self.length += len(ids)
        if self._file:
            self._file.write(ids.data)
        else:
            self._parts.append(ids.copy())

    def _number(self, code: int) -> None:
        """Give the next id to a code point."""
        self.codes.append(code)
        self._make_room()
        self._ids[code] = len(self.codes)

    def _make_room(self) -> None:
        """Take a wider type where one more symbol would not fit."""
        for limit, dtype in ((2**8, np.int16), (2**15, np.int32)):
            if len(self.codes) == limit:
                self._ids = self._ids.astype(dtype)
                self._widen_file(np.dtype(dtype))

    def _widen_file(self, dtype: np.dtype[Any]) -> None:
        if not self._file or not self._path or not self.length:
            return
        self._file.close()
        narrow = self._path.with_suffix(".narrow")
        os.replace(self._path, narrow)
        self._file = self._path.open("wb")
        old = np.uint8 if dtype == np.int16 else np.int16
        with narrow.open("rb") as file:
            while (part := np.fromfile(file, dtype=old, count=CHUNK)).size:
                part.astype(dtype).tofile(self._file)
        narrow.unlink()

    def close(self) -> None:
        if self._file:
            self._file.close()

    def block(self) -> Ids:
        """Return all that was written, in one type."""
        dtype = self._ids.dtype
        if not self._path:
            return np.concatenate([np.empty(0, dtype), *(part.astype(dtype, copy=False) for part in self._parts)])
        return np.memmap(self._path, dtype=dtype, mode="r+") if self.length else np.empty(0, dtype)


def reorder(draft: Draft, order: npt.NDArray[np.int64]) -> None:
    """Lay the documents of a draft in another order, in place."""
    starts = np.concatenate([[0], draft.ends[:-1]])
    ranges = zip(starts[order].tolist(), draft.ends[order].tolist(), strict=True)
    lengths = (draft.ends - starts)[order]
    if isinstance(draft.block, np.memmap):
        path = Path(str(draft.block.filename))
        beside = path.with_suffix(".ordered")
        with beside.open("wb") as file:
            for start, stop in ranges:
                for chunk in _chunks(draft.block, start, stop):
                    chunk.tofile(file)
        dtype = draft.block.dtype
        shutil.move(beside, path)
        draft.block = np.memmap(path, dtype=dtype, mode="r+")
    else:
        draft.block = np.concatenate([draft.block[start:stop] for start, stop in ranges])
    draft.splits = draft.splits[order]
    draft.ends = np.cumsum(lengths, dtype=np.int64)


def count(block: Ids, ranges: Iterable[tuple[int, int]], symbols: int) -> npt.NDArray[np.int64]:
    """Return how often each id occurs in some ranges of a block, shape (symbols,)."""
    counts = np.zeros(symbols, dtype=np.int64)
    for start, stop in ranges:
        for chunk in _chunks(block, start, stop):
            if block.dtype == np.uint8:
                # Two neighbours as one number: half as many to count.
                pairs = np.bincount(chunk[: len(chunk) // 2 * 2].view(np.uint16), minlength=2**16).reshape(2**8, 2**8)
                both = pairs.sum(axis=0) + pairs.sum(axis=1)
                if len(chunk) % 2:
                    both[chunk[-1]] += 1
                counts += both[:symbols]
            else:
                counts += np.bincount(chunk, minlength=symbols)
    return counts


def by_first_appearance(
    block: Ids, ranges: Iterable[tuple[int, int]], wanted: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int64]:
    """Return the ids that `wanted`, shape (symbols,), marks, in the order in which some ranges of a block show them."""
    missing = wanted.copy()
    order: list[int] = []
    for start, stop in ranges:
        for chunk in _chunks(block, start, stop):
            if not missing.any():
                break
            places = np.flatnonzero(missing[chunk])
            ids, first = np.unique(chunk[places], return_index=True)
            order += ids[first.argsort()].tolist()
            missing[ids] = False
    return np.array(order, dtype=np.int64)


def relabel(block: Ids, ids: npt.NDArray[Any]) -> None:
    """Change each id of a block to what `ids` has at its place, in the block itself."""
    table = ids.astype(block.dtype)
    for chunk in _chunks(block, 0, len(block)):
        chunk[:] = looked_up(table, chunk)


def _chunks(block: Ids, start: int, stop: int) -> Iterator[Ids]:
    for first in range(start, stop, CHUNK):
        yield block[first : min(first + CHUNK, stop)]
        if isinstance(block, np.memmap) and stop - start > CHUNK:
            # What was read or changed lies in the system's page cache, which takes it to disk; not in our memory too.
            advise(block, "DONTNEED", 0, len(block))
