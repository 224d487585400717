"""Text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
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


def printable(text: str) -> str:
    """Return `text` with its control characters made visible."""
    return text.translate(_SHOWN)


def heading(temperature: float) -> str:
    """Return what to call a sample drawn at this temperature."""
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def shown(row: Mapping[str, Any], source: str) -> str:
    """Return a row of samples.jsonl as the log shows it."""
    return f"--- {source}, {heading(row['temperature'])} ---\n{printable(row['prompt'] + row['text'])}"
