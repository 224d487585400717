"""Files that are whole or not there, and lines of JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

LOCK = ".lock"  # held by the process that works in a folder


def write_whole(path: Path, text: str) -> None:
    """Write a file in one go: whoever reads it finds the old text or the new, never half of one."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


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
