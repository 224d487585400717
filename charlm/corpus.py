"""Where text comes from: a source's documents -> three splits -> one encoded token block.

    documents    "To be"  "or not"  "to be"          strings, from files, a table, Python's own reference
    block        T o   b e \n o r   n o t \n t o ...  one array of ids, the whole text
    segments     [---- train ----)[-- val --)[ test)  (start, stop) in the block; a split is a list of them

Splitting comes before windowing: no window of one split holds a character of another.
"""

from __future__ import annotations

import csv
import glob
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from charlm.config import CsvConfig, DataConfig, PythonDocsConfig, TextConfig
from charlm.errors import InputError
from charlm.vocabulary import END, END_CODE, CodePoints, Ids, Vocabulary, code_points

SPLITS = ("train", "val", "test")

Segment = tuple[int, int]  # (start, stop), in characters of the block


@dataclass(frozen=True)
class Corpus:
    """An encoded text, and where its splits lie in it."""

    vocabulary: Vocabulary
    block: Ids  # shape (characters,)
    segments: dict[str, list[Segment]]  # of each split
    bytes_per_character: dict[str, float]  # of each split's text in UTF-8
    unknown: dict[str, int]  # characters of each split that training never saw

    def characters(self, split: str) -> int:
        """Return how many characters a split has."""
        return sum(stop - start for start, stop in self.segments[split])


def load_corpus(config: DataConfig) -> Corpus:
    """Read the source that `config` names, split it, and encode it with the vocabulary of its training split.

    Raises:
        InputError: the source is missing, holds no text, or is not text in the encoding named.
    """
    documents = [code_points(text) for text in _documents(config) if text]
    if not documents:
        raise InputError(f"data={config.source} holds no text{f' in {config.path}' if hasattr(config, 'path') else ''}")
    if config.split == "documents":
        documents = _shuffled(documents, config.split_seed)
    codes, ends = _join(documents, config.separator)
    cuts = _cuts(len(codes), config.fractions)
    if config.split == "documents":
        cuts = [0, *(int(ends[np.abs(ends - cut).argmin()]) for cut in cuts[1:-1]), len(codes)]
    segments = {
        split: _segments(start, stop, ends if config.separator is None else None)
        for split, start, stop in zip(SPLITS, cuts[:-1], cuts[1:], strict=True)
    }
    vocabulary = Vocabulary.of(codes[start:stop] for start, stop in segments["train"])
    block = vocabulary.encode_codes(codes)
    bytes_per_character, unknown = {}, {}
    for split, start, stop in zip(SPLITS, cuts[:-1], cuts[1:], strict=True):
        bytes_per_character[split] = _utf8_bytes(codes[start:stop]) / max(stop - start, 1)
        unknown[split] = int((block[start:stop] == vocabulary.unknown_id).sum())
    return Corpus(vocabulary, block, segments, bytes_per_character, unknown)


# --- sources: each yields its documents ---------------------------------------------------------------------------


def _documents(config: DataConfig) -> Iterator[str]:
    match config:
        case PythonDocsConfig():
            return _python_docs()
        case CsvConfig():
            return _csv_rows(config)
        case TextConfig():
            return (_read(path, config.encoding) for path in _files(config.path))
    raise InputError(f"data={config.source} has no reader")


def _python_docs() -> Iterator[str]:
    """Yield the sections of Python's language reference that `help()` shows; every CPython ships them."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise InputError(
            f"this Python ({sys.executable}) comes without pydoc_data, the text of data=python_docs; use a full "
            "CPython, or your own text with data=text data.path=FILE"
        ) from None
    for name in sorted(topics):
        yield topics[name]


def _csv_rows(config: CsvConfig) -> Iterator[str]:
    """Yield one document a row: the chosen columns, joined by a space."""
    csv.field_size_limit(2**31 - 1)  # the default, 128 KB, is less than a long article
    for path in _files(config.path):
        rows = csv.reader(io.StringIO(_read(path, config.encoding), newline=""), delimiter=config.delimiter)
        header = next(rows, []) if config.header else []
        columns: list[int] = []
        for column in config.columns:
            if isinstance(column, str) and column not in header:
                named = f"its header names {', '.join(header)}" if header else "it is read without a header line"
                raise InputError(f"{path} has no column {column!r}: {named}; set data.columns and data.header")
            columns.append(header.index(column) if isinstance(column, str) else column)
        for row in rows:
            if not row:
                continue
            if max(columns) >= len(row):
                raise InputError(
                    f"{path} line {rows.line_num} has {len(row)} columns, but data.columns={config.columns} asks for "
                    f"column {max(columns)}, counted from 0"
                )
            yield " ".join(row[column] for column in columns)


def _files(patterns: str | list[str]) -> list[Path]:
    """Return the files that paths, folders and glob patterns name: each once, folders in sorted order.

    Raises:
        InputError: a pattern that names no file.
    """
    found: dict[Path, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        path = Path(pattern).expanduser()
        if path.is_file():
            files = [path]
        elif path.is_dir():
            files = [f for f in sorted(path.rglob("*")) if f.is_file() and not _hidden(f.relative_to(path))]
            if not files:
                raise InputError(f"data.path={pattern} is a folder without a file to read")
        else:
            files = [Path(f) for f in sorted(glob.glob(str(path), recursive=True)) if Path(f).is_file()]
            if not files:
                kind = "matches no file" if glob.has_magic(str(path)) else "does not exist"
                raise InputError(f"data.path={pattern} {kind} (looked from {Path.cwd()})")
        found.update(dict.fromkeys(files))
    return list(found)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read(path: Path, encoding: str) -> str:
    """Return the text of a file as it stands: newlines and a byte order mark are characters like others."""
    try:
        return path.read_bytes().decode(encoding)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except LookupError:
        raise InputError(f"data.encoding={encoding} is no encoding that Python knows; utf-8 is the usual one") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not {encoding}: byte 0x{error.object[error.start]:02x} at offset {error.start}; name its "
            "encoding with data.encoding=NAME (latin-1 reads any bytes, one character each)"
        ) from None


# --- splits -------------------------------------------------------------------------------------------------------


def _shuffled(documents: list[CodePoints], seed: int) -> list[CodePoints]:
    return [documents[i] for i in np.random.default_rng(seed).permutation(len(documents))]


def _join(documents: list[CodePoints], separator: str | None) -> tuple[CodePoints, np.ndarray]:
    """Lay documents one behind the other: a text between them, `<eos>` behind each, or nothing.

    Returns:
        The code points of all, and where each document ends in them (its separator included).
    """
    behind = np.array([END_CODE], dtype=np.uint32) if separator == END else code_points(separator or "")
    parts = [np.concatenate([document, behind]) for document in documents]
    if separator != END:
        parts[-1] = documents[-1]
    return np.concatenate(parts), np.cumsum([len(part) for part in parts])


def _cuts(length: int, fractions: list[float]) -> list[int]:
    """Return where splits of these fractions begin and end: four positions, from 0 to `length`."""
    return [0, *(round(length * sum(fractions[: i + 1])) for i in range(2)), length]


def _segments(start: int, stop: int, ends: np.ndarray | None) -> list[Segment]:
    """Return one segment from `start` to `stop`, or where `ends` is given, one for each document in it."""
    inner = [] if ends is None else [int(end) for end in ends if start < end < stop]
    bounds = [start, *inner, stop]
    return [(a, b) for a, b in pairwise(bounds) if a < b]


def _utf8_bytes(codes: CodePoints) -> int:
    """Return the length of a text in UTF-8; `<eos>` takes none (RFC 3629, section 3)."""
    text = codes[codes != END_CODE]
    return len(text) + sum(int((text >= limit).sum()) for limit in (0x80, 0x800, 0x10000))
