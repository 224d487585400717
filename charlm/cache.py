"""The encoded block of a large text on disk, built once and memory-mapped by all that read it.

    CACHE/blocks/KEY/block.bin      ids, one behind the other
                     corpus.json    type, length, sum, vocabulary, splits
    CACHE/blocks/KEY.lock           held by the one that builds
    CACHE/blocks/KEY.building/      what it has so far

KEY is a hash of the text and of all that decides how it is encoded: another text or setting is another block. A folder
appears under its name once all that it holds is on disk.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from platformdirs import user_cache_dir

from charlm.errors import InputError
from charlm.vocabulary import Ids

log = logging.getLogger(__name__)

_BLOCK, _FACTS = "block.bin", "corpus.json"


def cache_folder(given: str | None) -> Path:
    """Return where charlm keeps what can be made or fetched again: `given`, or the user's own cache folder."""
    return Path(given).expanduser() if given else Path(user_cache_dir("charlm"))


def cached_block(folder: Path, key: str, build: Callable[[Path], dict[str, Any]]) -> tuple[Ids, dict[str, Any]]:
    """Return the block of this key and the facts about it; build both where they are not there or not whole.

    Whoever comes while another builds waits, then reads what the other built.

    Args:
        folder: the cache.
        key: names the block.
        build: writes the block to the path given and returns the facts, plain values with its `dtype` and `length`.

    Raises:
        InputError: the folder cannot be written, or the disk is full.
    """
    place = folder / "blocks" / key
    building = place.with_name(f"{key}.building")
    with _writable(folder):
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(place.with_name(f"{key}.lock"))
        lock.acquire()
    try:
        if (found := _opened(place)) is None:
            if place.exists():
                log.warning(f"{place} is not whole; it is built again")
            for stale in (place, building):
                shutil.rmtree(stale, ignore_errors=True)
            try:
                with _writable(folder):
                    building.mkdir()
                    facts = build(building / _BLOCK)
                    facts["crc32"] = _crc32(building / _BLOCK)
                    (building / _FACTS).write_text(json.dumps(facts), encoding="utf-8")
                    for file in building.iterdir():
                        _to_disk(file)
                    os.replace(building, place)
            finally:
                shutil.rmtree(building, ignore_errors=True)
            found = _opened(place)
            assert found is not None
        return found
    finally:
        lock.release()


def advise(mapped: np.memmap[Any, Any], advice: str, start: int, stop: int) -> None:
    """Tell the system how a part of a mapped block will be used, where it can be told.

    Args:
        mapped: the block.
        advice: "WILLNEED" has it read at once, without waiting; "DONTNEED" takes it out of this process's memory.
        start: the first element of the part.
        stop: the one behind its last.
    """
    if code := getattr(mmap, f"MADV_{advice}", None):  # not on Windows
        first = start * mapped.itemsize // mmap.PAGESIZE * mmap.PAGESIZE
        mapped._mmap.madvise(code, first, stop * mapped.itemsize - first)  # type: ignore[attr-defined]


def _opened(place: Path) -> tuple[Ids, dict[str, Any]] | None:
    """Return what lies there, or nothing where a part is missing, cut short, changed or not readable."""
    try:
        facts = json.loads((place / _FACTS).read_text(encoding="utf-8"))
        dtype, length = np.dtype(facts["dtype"]), facts["length"]
        if (place / _BLOCK).stat().st_size != length * dtype.itemsize:
            return None
        if _crc32(place / _BLOCK) != facts["crc32"]:
            return None
        # Copy on write: torch asks for memory that it may write to, and the file stays as it is.
        return np.memmap(place / _BLOCK, dtype=dtype, mode="c", shape=(length,)), facts
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _crc32(path: Path) -> int:
    """Return a sum that a damaged disk or an interrupted copy changes. It takes half the time of hashing the text."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(2**17):
            value = zlib.crc32(chunk, value)
    return value


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}; set data.cache_dir=FOLDER") from None


def _to_disk(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
