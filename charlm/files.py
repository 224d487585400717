"""Files that are whole or not there, lines added whole, names and values, and lines of JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from charlm.errors import InputError, RunStopped, reason

LOCK = ".lock"  # held by the process that works in a folder
RESULT = "result.json"  # what a run came to
SWEEP_FILE = "sweep.json"  # what a sweep's folder holds, and no run's


def write_whole(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file in one go: whoever reads it finds the old content or the new, never half of one.

    That holds when the program is killed at any moment, and when the machine loses its power: the new content is on
    the disk before it takes the name.

    Raises:
        RunStopped: the disk is full, or the folder may not be written to. The old content stays.
    """
    beside = path.with_name(path.name + ".part")
    try:
        with _stopping(path), beside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        with _stopping(path):
            os.replace(beside, path)
            flush_folder(path.parent)
    except RunStopped:
        with suppress(OSError):
            beside.unlink()
        raise


def append_whole(path: Path, text: str) -> None:
    """Add lines to a file: all of them or none.

    Raises:
        RunStopped: the disk is full, or the file may not be written to.
    """
    with _stopping(path), path.open("ab", buffering=0) as file:
        size = file.tell()
        content = text.encode()
        try:
            while content:  # what is written short is tried again, which says why
                content = content[file.write(content) :]
        except OSError:
            file.truncate(size)
            raise


def flush_folder(folder: Path) -> None:
    """Have the names of a folder on the disk before going on."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


@contextmanager
def _stopping(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunStopped(f"cannot write {path}: {error.strerror}") from None


@contextmanager
def no_empty_folder_left(folder: Path) -> Iterator[None]:
    """Around work that makes a folder and may fail: what it made of the way there, and left empty, goes again."""
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in absent:
            with suppress(OSError):  # raised where it holds something, or was not made
                path.rmdir()
        raise


def read_names(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """Return the names and values in a file of a run's folder.

    Args:
        path: the file.
        parse: what its text is read by: `json.loads` or `yaml.safe_load`.

    Raises:
        InputError: it does not hold such.
    """
    try:
        content = parse(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no names and values")
        return content
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise unreadable(path, error) from None


def read_result(folder: Path) -> dict[str, Any]:
    """Return what result.json says that the run in `folder` came to; {} where it has not ended yet.

    Raises:
        InputError: it is damaged: among others, it says that the run completed, but not at which loss.
    """
    path = folder / RESULT
    if not path.exists():
        return {}
    result = read_names(path, json.loads)
    loss = result.get("val/loss")
    if result.get("status") == "completed" and not (isinstance(loss, int | float) and math.isfinite(loss)):
        raise unreadable(path, ValueError("it says completed, but no val/loss"))
    return result


def unreadable(path: Path, error: Exception) -> InputError:
    """Return what to raise for a file of a run's folder that does not hold what it should."""
    return InputError(
        f"{path} is damaged, or of no run of charlm's: {reason(error, 100)}; move the run's folder away, or choose "
        "another with hydra.run.dir (of a sweep: hydra.sweep.dir)"
    )


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as one JSON object a line.

    JSON has neither infinity nor NaN. The one, a temperature, becomes the text "inf"; the other, a figure that there is
    not, null.
    """
    plain = ({key: _plain(value) for key, value in row.items()} for row in rows)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in plain)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
