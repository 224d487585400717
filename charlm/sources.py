"""Where text comes from: files, tables, Python's own reference; each a stream of documents.

AG News, Hugging Face's datasets and torchtext's have modules of their own. A document may be larger than memory, so
that it comes in pieces:

    Piece("To be, or ", ends=False)  Piece("not to be", ends=True)      one document, a file of two chunks
    Piece("That is", ends=True, split="test")                           another, of which the source says its split
"""

from __future__ import annotations

import bz2
import codecs
import csv
import glob
import gzip
import hashlib
import io
import json
import math
import os
import sys
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from charlm.config import (
    AgNewsConfig,
    CsvConfig,
    DataConfig,
    HuggingFaceConfig,
    JsonlConfig,
    PythonDocsConfig,
    TextConfig,
    TorchtextConfig,
)
from charlm.errors import InputError, listed, shortened

_CHUNK = 2**17  # bytes read at a time: more leaves the cache of the processor, less costs calls
_COMPRESSED = (".gz", ".bz2", ".zst")
_EXPANSION = 16  # how much larger than its file a compressed text may well be
_HARMLESS = 2**26  # bytes that any compressed file may unpack to

Decoded = Iterator[tuple[str, int]]  # some text of a file, and how many of its bytes were read for it


SPLITS = ("train", "val", "test")


class Piece(NamedTuple):
    """Some text of a document."""

    text: str
    ends: bool = True  # whether the document ends behind it
    split: str | None = None  # the split that the source puts it in
    size: int = 0  # bytes read for it


class Source(ABC):
    """A source that was found, and is not read yet."""

    config: DataConfig

    @property
    @abstractmethod
    def size(self) -> int | None:
        """Bytes to read, where they are known: what the sizes of all pieces sum to."""

    @property
    @abstractmethod
    def likely_characters(self) -> int:
        """About how long the text is at most."""

    @abstractmethod
    def digest(self) -> str:
        """Return a hash that is another one for any other text."""

    @abstractmethod
    def pieces(self) -> Iterator[Piece]:
        """Read the documents.

        Raises:
            InputError: one cannot be read, is not in its encoding or not in its form.
        """


def find_source(config: DataConfig) -> Source:
    """Return the source that `config` names.

    Raises:
        InputError: there is no such source, or a library that it needs is not installed.
    """
    match config:
        case PythonDocsConfig():
            return PythonDocs(config)
        case AgNewsConfig():
            from charlm.ag_news import find_files

            return Files(config, find_files(config.path, config.cache_dir))
        case TextConfig():
            return Files(config, [(path, None) for path in _files(config.path)])
        case HuggingFaceConfig():
            from charlm.huggingface import HuggingFace

            return HuggingFace(config)
        case TorchtextConfig():
            from charlm.torchtext_bridge import Torchtext

            return Torchtext(config)
        case _:
            raise InputError(f"data={config.source} has no reader")


@dataclass(frozen=True)
class PythonDocs(Source):
    """The sections of Python's language reference that `help()` shows; every CPython ships them."""

    config: PythonDocsConfig
    size = None
    likely_characters = 2**19

    def digest(self) -> str:
        return hashlib.sha256("".join(self._sections()).encode()).hexdigest()

    def pieces(self) -> Iterator[Piece]:
        yield from map(Piece, self._sections())

    def _sections(self) -> list[str]:
        try:
            from pydoc_data.topics import topics
        except ImportError:
            raise InputError(
                f"this Python ({sys.executable}) comes without pydoc_data, the text of data=python_docs; use a full "
                "CPython, or your own text with data=text data.path=FILE"
            ) from None
        return [topics[name] for name in sorted(topics)]


@dataclass(frozen=True)
class Files(Source):
    """Files of one kind: text, tables or JSON lines."""

    config: TextConfig | AgNewsConfig
    files: Sequence[tuple[Path, str | None]]  # each with the split that it belongs to

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path, _ in self.files)

    @property
    def likely_characters(self) -> int:
        return sum(path.stat().st_size * (_EXPANSION if _is_compressed(path) else 1) for path, _ in self.files)

    def digest(self) -> str:
        whole = hashlib.sha256()
        for path, split in self.files:
            with _opened(path) as file:
                whole.update(hashlib.file_digest(file, "sha256").digest() + (split or "").encode())
            whole.update(path.suffix.encode() if _is_compressed(path) else b"")
        return whole.hexdigest()

    def pieces(self) -> Iterator[Piece]:
        for path, split in self.files:
            match self.config:
                case AgNewsConfig():
                    yield from _csv_rows(path, _decoded(path, "utf-8"), ",", [1, 2], False, split)
                case CsvConfig() as c:
                    decoded = _decoded(path, c.encoding, c.max_expansion)
                    yield from _csv_rows(path, decoded, c.delimiter, c.columns, c.header, split)
                case JsonlConfig() as c:
                    yield from _json_rows(path, _decoded(path, c.encoding, c.max_expansion), c.field, split)
                case TextConfig() as c:
                    for text, size in _decoded(path, c.encoding, c.max_expansion):
                        yield Piece(text, False, split, size)
                    yield Piece("", True, split)


def split_named(name: str) -> str | None:
    """Return the split that a source means by a name of its own, such as `validation` or `dev_matched`."""
    for split, beginnings in zip(SPLITS, (("train",), ("val", "dev"), ("test",)), strict=True):
        if name.startswith(beginnings):
            return split
    return None


# --- readers ------------------------------------------------------------------------------------------------------


def _csv_rows(
    path: Path, decoded: Decoded, delimiter: str, chosen: list[Any], header: bool, split: str | None
) -> Iterator[Piece]:
    """Yield one document a row: the chosen columns, joined by a space."""
    csv.field_size_limit(2**31 - 1)  # the default, 128 KB, is less than a long article
    lines = _Lines(decoded)
    rows = csv.reader(lines, delimiter=delimiter)
    try:
        names = next(rows, []) if header else []
        columns: list[int] = []
        for column in chosen:
            if isinstance(column, str) and column not in names:
                named = f"its header names {listed(names)}" if names else "it is read without a header line"
                raise InputError(f"{path} has no column {column!r}: {named}; set data.columns and data.header")
            columns.append(names.index(column) if isinstance(column, str) else column)
        for row in rows:
            if not row:
                continue
            if max(columns) >= len(row):
                raise InputError(
                    f"{path} line {rows.line_num} has {len(row)} columns, but data.columns={chosen} asks for "
                    f"column {max(columns)}, counted from 0; set data.columns and data.header"
                )
            yield Piece(" ".join(row[column] for column in columns), True, split, lines.take_size())
    except csv.Error as error:
        raise InputError(f"{path} line {rows.line_num} is not CSV: {error}; set data.delimiter") from None


def _json_rows(path: Path, decoded: Decoded, field: str, split: str | None) -> Iterator[Piece]:
    """Yield one document a line: a field of the JSON object that stands there."""
    lines = _Lines(decoded)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} line {number} is not JSON: {error}; data=jsonl reads one object a line") from None
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            has = f"its fields are {listed(list(row))}" if isinstance(row, dict) else "it is no JSON object"
            if isinstance(row, dict) and field in row:
                has = f"what stands there is {shortened(json.dumps(row[field]), 40)}"
            raise InputError(f"{path} line {number} has no text in the field {field!r}: {has}; set data.field")
        yield Piece(row[field], True, split, lines.take_size())


# --- files --------------------------------------------------------------------------------------------------------


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
                if path.exists():  # such as a pipe, which could not be read again
                    kind = "is neither a file nor a folder"
                raise InputError(f"data.path={pattern} {kind} (looked from {Path.cwd()})")
        found.update(dict.fromkeys(files))
    return list(found)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_compressed(path: Path) -> bool:
    return path.suffix in _COMPRESSED


def _opened(path: Path) -> BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def _unpacked(path: Path, file: BufferedReader) -> Iterator[bytes]:
    if path.suffix == ".zst":
        yield from _zstandard(file)
        return
    unpacked: BinaryIO = file
    if path.suffix == ".gz":
        unpacked = cast(BinaryIO, gzip.GzipFile(fileobj=file))
    elif path.suffix == ".bz2":
        unpacked = cast(BinaryIO, bz2.BZ2File(file))
    while chunk := unpacked.read(_CHUNK):
        yield chunk


def _zstandard(file: BufferedReader) -> Iterator[bytes]:
    """Unpack frame after frame. The library's own reader takes a frame that is cut off for one that has ended."""
    import zstandard

    frame = None
    while packed := file.read(2**12):  # a few bytes may unpack to many: taken in small parts
        while packed:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            try:
                chunk = frame.decompress(packed)
            except zstandard.ZstdError as error:
                raise zlib.error(str(error)) from None  # what gzip raises
            if chunk:
                yield chunk
            packed = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("it ends within a frame")


def _chunks(path: Path, max_expansion: float) -> Iterator[tuple[bytes, int]]:
    """Yield what a file holds, unpacked, and how many bytes of the file were read for it."""
    with _opened(path) as file:
        read = unpacked = 0
        most = max(_HARMLESS, max_expansion * os.fstat(file.fileno()).st_size) if _is_compressed(path) else math.inf
        try:
            for chunk in _unpacked(path, file):
                unpacked += len(chunk)
                if unpacked > most:
                    raise InputError(
                        f"{path} unpacks to more than {max_expansion:g} times its size, as a file made to fill a disk "
                        "would; if it is what you want, set data.max_expansion higher"
                    )
                position = file.tell()
                yield chunk, position - read
                read = position
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{path} cannot be unpacked: {error}; it is cut off or damaged") from None
        except OSError as error:  # bzip2 says its faults so too
            raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def _decoded(path: Path, encoding: str, max_expansion: float = math.inf) -> Decoded:
    """Yield the text of a file as it stands: newlines and a byte order mark are characters like others.

    Beside each text stand the bytes of the file that were read for it.
    """
    try:
        io.TextIOWrapper(io.BytesIO(), encoding=encoding)  # which, unlike codecs, refuses base64 and its like
        decoder = codecs.getincrementaldecoder(encoding)()
    except LookupError:
        raise InputError(f"data.encoding={encoding} is no encoding that Python knows; utf-8 is the usual one") from None
    offset = 0  # in the unpacked file, of the chunk
    pending = 0  # bytes of a character that the chunks before it began
    try:
        for chunk, size in _chunks(path, max_expansion):
            yield decoder.decode(chunk), size
            offset += len(chunk)
            pending = len(decoder.getstate()[0])
        yield decoder.decode(b"", final=True), 0
    except UnicodeDecodeError as error:
        if offset == 0 and error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise InputError(f"{path} is not {encoding}; it begins as UTF-16 does: data.encoding=utf-16") from None
        raise InputError(
            f"{path} is not {encoding}: byte 0x{error.object[error.start]:02x} at offset "
            f"{offset - pending + error.start}; name its encoding with data.encoding=NAME (latin-1 reads any bytes, "
            "one character each)"
        ) from None
    except UnicodeError as error:  # such as UTF-16 without its mark
        raise InputError(f"{path} is not {encoding}: {error}") from None


class _Lines:
    """The lines of a file, their ends kept, and how many bytes were read since someone last asked."""

    def __init__(self, decoded: Decoded) -> None:
        self._decoded = decoded
        self._size = 0

    def __iter__(self) -> Iterator[str]:
        rest: list[str] = []  # of a line that may go over many chunks
        for text, size in self._decoded:
            self._size += size
            first, *more = text.split("\n")
            rest.append(first)
            for line in more:
                yield "".join(rest) + "\n"
                rest = [line]
        if last := "".join(rest):
            yield last

    def take_size(self) -> int:
        size, self._size = self._size, 0
        return size
