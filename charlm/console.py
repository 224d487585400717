"""Text for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

# Control characters could move the cursor, recolour or lock a terminal; of a corpus, they may come back in any sample.
# Newline and tab stay. Shown as Unicode's control pictures, those of the C1 range and the marks that turn the writing
# direction as escapes.
_SHOWN = (
    {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
    | {0x7F: 0x2421}
    | {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}
    | {code: f"\\u{code:04x}" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}
)

_MEASURES = {  # how each is called, and written
    "real_words": ("real words", ".0%"),
    "distinct_4grams": ("distinct 4-grams", ".0%"),
    "loop_rate": ("in loops", ".0%"),
    "entropy": ("entropy, bits", ".2f"),
    "longest_copy": ("longest copy", ",d"),
    "copied": ("copied", ".0%"),
}


def printable(text: str) -> str:
    """Return `text` with its control characters made visible."""
    return text.translate(_SHOWN)


def heading(temperature: float) -> str:
    """Return what to call a sample drawn at this temperature."""
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def shown(rows: Sequence[Mapping[str, Any]], source: str) -> str:
    """Return rows of samples.jsonl as the log shows them, and a table of what was measured of them."""
    texts = [
        f"--- {source}, {heading(row['temperature'])} ---\n{printable(row['prompt'] + row['text'])}" for row in rows
    ]
    measured = [row for row in rows if "entropy" in row]
    return "\n".join([*texts, measures_table(measured)] if measured else texts)


def measures_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of what was measured of samples, which is the same of each; see charlm/text_metrics.py."""
    measures = {name: measure for name, measure in _MEASURES.items() if name in rows[0]}
    lines = [" " * 15 + "".join(f"   {title}" for title, _ in measures.values())]
    for row in rows:
        figures = (
            (title, "-" if math.isnan(row[name]) else format(row[name], form))
            for name, (title, form) in measures.items()
        )
        lines.append(
            f"{heading(row['temperature']):<15}" + "".join(f"   {text:>{len(title)}}" for title, text in figures)
        )
    return "\n".join(lines)
