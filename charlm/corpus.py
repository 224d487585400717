"""A source's documents -> three splits -> one encoded token block.

    documents    "To be"  "or not"  "to be"          pieces of text, from a source
    block        T o   b e \n o r   n o t \n t o ...  one array of ids, the whole text
    segments     [---- train ----)[-- val --)[ test)  (start, stop) in the block; a split is a list of them

Splitting comes before windowing: no window of one split holds a character of another.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import zlib
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from charlm import torchtext_bridge
from charlm.cache import cache_folder, cached_block
from charlm.config import DataConfig
from charlm.encoding import Draft, by_first_appearance, count, encode, relabel, reorder
from charlm.errors import InputError
from charlm.sources import SPLITS, Source, find_source
from charlm.vocabulary import END, END_CODE, Ids, Vocabulary

Segment = tuple[int, int]  # (start, stop), in characters of the block

# From this size on a text is encoded into a file of the cache. What is smaller is encoded each time, in half a second.
CACHED_FROM = 2**26
_FORMAT = 2  # of the cache; to be raised where the same text and settings come to other ids

# What decides windows and batches, not the block.
_AFTER_ENCODING = ("path", "cache_dir", "max_expansion", "window", "stride", "order", "eval_lanes")


@dataclass(frozen=True)
class Corpus:
    """An encoded text, and where its splits lie in it."""

    vocabulary: Vocabulary
    block: Ids  # shape (characters,); memory-mapped where the text is large
    segments: dict[str, list[Segment]]  # of each split
    bytes_per_character: dict[str, float]  # of each split's text in UTF-8
    unknown: dict[str, int]  # characters of each split that training never saw
    crc32: int | None = None  # of the block's bytes, where it is known

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What is another one for any other text, in plain values: sizes, and a digest of the ids and the splits.

        The digest goes by a 32-bit sum of the block, which a mapped block is verified by anyway. Any change within four
        bytes makes another sum; of changes all over the text, one in four billion does not.
        """
        crc32 = zlib.crc32(self.block.data) if self.crc32 is None else self.crc32
        digest = hashlib.sha256(json.dumps([self.block.dtype.name, crc32, self.vocabulary.symbols]).encode())
        for split in SPLITS:
            digest.update(split.encode() + np.array(self.segments[split], dtype="<i8").tobytes())
        sizes = {f"{split}/characters": self.characters(split) for split in SPLITS}
        return {**sizes, "symbols": len(self.vocabulary), "digest": digest.hexdigest()[:16]}

    def characters(self, split: str) -> int:
        """Return how many characters a split has."""
        return sum(stop - start for start, stop in self.segments[split])


def load_corpus(config: DataConfig) -> Corpus:
    """Read the source that `config` names, split it, and encode it with the vocabulary of its training split.

    A large text is read once: its block is kept in the cache, and found there by what the text holds.

    Raises:
        InputError: the source is missing, holds no text, or is not text in the encoding named.
    """
    if config.vocabulary == "torchtext":
        torchtext_bridge.load("vocab", "data.vocabulary=torchtext")  # refused now, not behind a large text
    source = find_source(config)
    build = partial(_build, source)
    if source.likely_characters < CACHED_FROM:
        block, facts = build(None)
    else:
        block, facts = cached_block(cache_folder(config.cache_dir), _key(source), lambda file: build(file)[1])
    return Corpus(
        Vocabulary(facts["symbols"]),
        block,
        {split: [(a, b) for a, b in segments] for split, segments in facts["segments"].items()},
        facts["bytes_per_character"],
        facts["unknown"],
        facts.get("crc32"),
    )


def _key(source: Source) -> str:
    """Return what tells a block from every other: a hash of the text and of the settings that it is encoded by."""
    settings = {name: value for name, value in asdict(source.config).items() if name not in _AFTER_ENCODING}
    if source.config.split != "stream_tail":
        del settings["batch_size"]  # there it is the number of rows
    text = json.dumps([_FORMAT, settings, source.digest()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _build(source: Source, file: Path | None) -> tuple[Ids, dict[str, Any]]:
    """Read, split and encode; return the block and, in plain values, all else that a corpus is."""
    config = source.config
    shown = sys.stderr.isatty() and source.likely_characters >= CACHED_FROM
    with tqdm(total=source.size, unit="B", unit_scale=True, desc="encoding", disable=not shown) as progress:
        draft = encode(source.pieces(), config.separator, file, progress)
    if not len(draft.block):
        raise InputError(f"data={config.source} holds no text{f' in {config.path}' if hasattr(config, 'path') else ''}")
    segments = _split(draft, config)
    counts = {split: count(draft.block, _merged(segments[split]), len(draft.alphabet)) for split in SPLITS}
    vocabulary = _vocabulary(draft, segments["train"], counts["train"], config)
    ids = vocabulary.encode_codes(draft.alphabet)
    relabel(draft.block, ids)
    if file:
        os.truncate(file, draft.block.nbytes)  # the separator that stood behind the last document
    width = _utf8_width(draft.alphabet)
    characters = {split: max(int(counts[split].sum()), 1) for split in SPLITS}
    return draft.block, {
        "dtype": draft.block.dtype.name,
        "length": len(draft.block),
        "symbols": vocabulary.symbols,
        "segments": segments,
        "bytes_per_character": {split: int(counts[split] @ width) / characters[split] for split in SPLITS},
        "unknown": {split: int(counts[split][ids == vocabulary.unknown_id].sum()) for split in SPLITS},
    }


def _vocabulary(draft: Draft, train: list[Segment], counts: npt.NDArray[np.int64], config: DataConfig) -> Vocabulary:
    """Return the vocabulary of the training split, whose ids have these `counts`."""
    if config.vocabulary == "code_points":
        return Vocabulary.of(draft.alphabet[counts > 0])
    order = by_first_appearance(draft.block, _merged(train), counts > 0)
    characters = [END if code == END_CODE else chr(code) for code in draft.alphabet[order]]
    return Vocabulary(torchtext_bridge.symbols_of(dict(zip(characters, counts[order].tolist(), strict=True))))


# --- splits -------------------------------------------------------------------------------------------------------


def _split(draft: Draft, config: DataConfig) -> dict[str, list[Segment]]:
    """Return the segments of each split, once the documents lie in the order that the split wants.

    Raises:
        InputError: `source`, where the source has no splits of its own.
    """
    if config.split == "documents":
        reorder(draft, np.random.default_rng(config.split_seed).permutation(len(draft.ends)))
    elif config.split == "source":
        _lay_by_split(draft, config)
    # A separator stands between documents; `<eos>` behind the last one too, and `null` is nothing.
    text_end = len(draft.block) - (0 if config.separator in (None, END) else len(config.separator or ""))
    ends = draft.ends
    ends[-1] = text_end
    draft.block = draft.block[:text_end]
    order = ("val", "train", "test") if config.split == "ends" else SPLITS
    if config.split == "stream_tail":
        rows = [text_end * row // config.batch_size for row in range(config.batch_size + 1)]
        cuts = [[start + cut for cut in _cuts(stop - start, config.fractions)] for start, stop in pairwise(rows)]
    else:
        bounds = _cuts(text_end, [config.fractions[SPLITS.index(split)] for split in order])
        if config.split == "documents":
            bounds = [0, *(int(ends[np.abs(ends - cut).argmin()]) for cut in bounds[1:-1]), text_end]
        elif config.split == "source":
            counted = np.bincount(draft.splits, minlength=len(SPLITS))
            bounds = [0, *(int(ends[n - 1]) if n else 0 for n in np.cumsum(counted))]
        cuts = [bounds]
    segments: dict[str, list[Segment]] = {split: [] for split in SPLITS}
    for row in cuts:
        for split, (start, stop) in zip(order, pairwise(row), strict=True):
            segments[split] += _segments(start, stop, ends if config.separator is None else None)
    return segments


def _lay_by_split(draft: Draft, config: DataConfig) -> None:
    """Lay documents in the order of the source's own splits; a val or test that it lacks is drawn from its train.

    Raises:
        InputError: a source without splits, or one whose training split is missing.
    """
    splits = draft.splits
    if (splits < 0).any() or not (splits == 0).any():
        lacks = "splits" if (splits < 0).any() else "training split"
        raise InputError(
            f"data.split=source: data={config.source} has no {lacks} of its own; choose contiguous, ends, "
            "documents or stream_tail"
        )
    lacking = [split for split in (1, 2) if not (splits == split).any()]
    train = np.random.default_rng(config.split_seed).permutation(np.flatnonzero(splits == 0))
    whole = config.fractions[0] + sum(config.fractions[split] for split in lacking)
    sizes = [round(len(train) * config.fractions[split] / whole) for split in lacking]
    for split, drawn in zip(lacking, np.split(train, np.cumsum(sizes, dtype=int)), strict=False):  # the rest is train
        splits[drawn] = split
    reorder(draft, np.argsort(splits, kind="stable"))


def _cuts(length: int, fractions: list[float]) -> list[int]:
    """Return where splits of these fractions begin and end: four positions, from 0 to `length`."""
    return [0, *(round(length * sum(fractions[: i + 1])) for i in range(2)), length]


def _segments(start: int, stop: int, ends: npt.NDArray[np.int64] | None) -> list[Segment]:
    """Return one segment from `start` to `stop`, or where `ends` is given, one for each document in it."""
    inner = [] if ends is None else ends[np.searchsorted(ends, start, "right") : np.searchsorted(ends, stop)].tolist()
    bounds = [start, *inner, stop]
    return [(a, b) for a, b in pairwise(bounds) if a < b]


def _merged(segments: list[Segment]) -> list[Segment]:
    """Return the same characters in as few segments as can be."""
    merged: list[Segment] = []
    for start, stop in segments:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged


def _utf8_width(codes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return how many bytes each code point takes in UTF-8; `<eos>` takes none (RFC 3629, section 3)."""
    width = 1 + sum((codes >= limit).astype(np.int64) for limit in (0x80, 0x800, 0x10000))
    return np.where(codes == END_CODE, 0, width)
