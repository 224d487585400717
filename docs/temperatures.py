"""Print a table of what temperatures do, beside held-out text: `python docs/temperatures.py TEXT RUN [RUN ...]`.

TEXT is the text file that the runs learned from, or python_docs. Runs that differ in their seed alone are one table:
the mean of what their best checkpoints wrote at each temperature. Its last row is the mean of the test split's pieces
that are as long as the samples.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))

from charlm.config import PythonDocsConfig, TextConfig
from charlm.corpus import load_corpus
from charlm.text_metrics import TrainingText, distinct_4grams, loop_rate

COLUMNS = {  # name, by how much it is multiplied, form
    "real_words": ("real words", 100, "{:.1f} %"),
    "distinct_4grams": ("distinct 4-grams", 1, "{:.2f}"),
    "loop_rate": ("in loops", 100, "{:.1f} %"),
    "longest_copy": ("longest copy", 1, "{:.0f}"),
    "copied": ("copied", 100, "{:.1f} %"),
}


def held_out(text: str, data: Mapping[str, Any], length: int) -> list[dict[str, Any]]:
    """Return what is measured of each piece of the test split of so many characters."""
    corpus = load_corpus(PythonDocsConfig(**data) if text == "python_docs" else TextConfig(**{**data, "path": text}))
    (start, stop), *_ = corpus.segments["test"]
    symbols = [symbol if len(symbol) == 1 else "\0" for symbol in corpus.vocabulary.symbols]
    pieces = [
        "".join(symbols[i] for i in corpus.block[at : at + length]) for at in range(start, stop - length + 1, length)
    ]
    rows = TrainingText(corpus).measure(pieces)
    return [
        {**row, "distinct_4grams": distinct_4grams(piece), "loop_rate": loop_rate(piece)}
        for row, piece in zip(rows, pieces, strict=True)
    ]


def cells(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the means of some samples, as a table has them."""
    means = {key: statistics.mean(row[key] for row in rows) for key in COLUMNS}
    return " | ".join(form.format(factor * means[key]) for key, (_, factor, form) in COLUMNS.items())


def main(text: str, folders: Sequence[Path]) -> None:
    """Print the table."""
    by_temperature: dict[float, list[dict[str, Any]]] = {}
    for folder in folders:
        for line in (folder / "samples.jsonl").read_text(encoding="utf-8").split("\n"):
            row = json.loads(line) if line else {}
            if "real_words" in row:
                by_temperature.setdefault(row["temperature"], []).append(row)
    length = len(by_temperature[max(by_temperature)][0]["text"])
    data = yaml.safe_load((folders[0] / "config.yaml").read_text(encoding="utf-8"))["data"]
    print(f"| temperature | {' | '.join(name for name, *_ in COLUMNS.values())} |\n{'|---' * (len(COLUMNS) + 1)}|")
    for temperature, rows in sorted(by_temperature.items()):
        print(f"| {temperature:g} | {cells(rows)} |")
    pieces = held_out(text, data, length)
    print(f"| the test text, {len(pieces)} piece{'s' * (len(pieces) > 1)} | {cells(pieces)} |")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], [Path(folder) for folder in sys.argv[2:]])
