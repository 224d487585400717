"""Write the tables of RESULTS.md from the runs below one or more folders: `python docs/results.py RUNS [RUNS ...]`.

The text around the tables stays; a table stands between two lines, and is written anew:

    <!-- table: grid ends 0.85 0.05 0.1 tinyshakespeare.txt -->
    <!-- end -->

The first word says which runs it is of: `grid` (those of `experiment=grid/...`), another experiment's name, `default`.
What follows are the split, its fractions and the text, by the name of its file or of its source; python_docs with the
version of the Python that it came with, whose text it is. Runs that differ in their seed alone are one row: the mean,
and the spread from the lowest to the highest.
"""

from __future__ import annotations

import json
import re
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from charlm.results import Result, read_results

PAGE = Path(__file__).parent.parent / "RESULTS.md"
TABLE = re.compile(r"(<!-- table: (?P<name>[^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)
COLUMNS = ("network", "parameters", "test, nats", "test, bits", "windowed", "seeds", "seconds", "device", "command")
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"
ALONE = ("seed", "sampling.", "logger.", "evaluation.", "data.cache_dir", "data.path")  # what makes no other row


def experiment(run: Result) -> str:
    """Return the experiment that a run was told, as its command names it; a grid's by the grid's name."""
    given = [word.partition("=")[2] for word in run.end.get("command", []) if word.startswith("experiment=")]
    return given[-1].partition("/")[0] if given else "default"


def place(run: Result) -> str:
    """Return a run's split, fractions and text, as a table's name has them."""
    text = Path(str(run.config.get("data.path") or run.config["data.source"])).name
    if text == "python_docs":
        text += "-" + ".".join(run.end["versions"]["python"].split(".")[:2])
    return " ".join([run.config["data.split"], *(f"{share:g}" for share in run.config["data.fractions"]), text])


def rows(runs: Sequence[Result]) -> list[str]:
    """Return a table's rows, the smallest networks first."""
    kinds: dict[str, list[Result]] = {}
    for run in runs:
        told = {name: value for name, value in run.config.items() if not name.startswith(ALONE)}
        kinds.setdefault(json.dumps(told, sort_keys=True, default=str), []).append(run)
    ordered = sorted(kinds.values(), key=lambda seeds: (_key(seeds[0]), seeds[0].end["parameters"]))
    return [row(sorted(seeds, key=lambda run: int(run.config["seed"]))) for seeds in ordered]


def _key(run: Result) -> tuple[int, str, int]:
    asked = run.config.get("model.parameters")
    return int(asked or run.end["parameters"]), run.cell, run.num_layers


def row(seeds: Sequence[Result]) -> str:
    """Return the row of runs that differ in their seed alone."""
    first = seeds[0]

    def mean(name: str) -> float:
        return statistics.mean(float(run.end[name]) for run in seeds if name in run.end)

    losses = [float(run.end["test/loss"]) for run in seeds]
    spread = f" ({min(losses):.4f} to {max(losses):.4f})" if len(seeds) > 1 else ""
    dynamic = (
        f"; {mean('test/loss_dynamic'):.4f} dynamic" if any("test/loss_dynamic" in run.end for run in seeds) else ""
    )
    cells = [
        f"{first.cell} {first.size}",
        f"{first.end['parameters']:,}",
        f"{mean('test/loss'):.4f} ± {mean('test/loss_standard_error'):.4f}{spread}{dynamic}",
        f"{mean('test/bpc'):.3f}",
        f"{mean('test/loss_windowed'):.4f}",
        str(len(seeds)),
        f"{mean('seconds'):.0f}",
        str(first.end.get("device", "")),
        f"`{command(first)}`",
    ]
    return f"| {' | '.join(cells)} |"


def command(run: Result) -> str:
    """Return what makes a run again, but for where it is kept and where its text lies."""
    words = [word for word in run.end["command"] if not word.startswith(("hydra.", "logger", "data.cache_dir"))]
    words = [re.sub(r"^data\.path=.*?([^/]*?)\"?$", r"data.path=\1", word) for word in words]
    return " ".join(["python", *map(shlex.quote, words)]).replace("|", "\\|")


def baselines(runs: Sequence[Result]) -> str:
    """Return a line on what compressors and an n-gram model come to on the same test text, where a run asked them."""
    for run in runs:
        if "baseline/ngram_loss" in run.end:
            return (
                "The same test text: {baseline/ngram_order:.0f}-gram {baseline/ngram_loss:.4f} nats = "
                "{baseline/ngram_bpc:.3f} bits; xz {baseline/xz_bpc:.2f} bits, given the training text "
                "{baseline/xz_given_train_bpc:.2f}; bzip2 {baseline/bzip2_bpc:.2f}.\n\n"
            ).format(**run.end)
    return ""


def main(folders: Sequence[Path]) -> None:
    """Write every table of which there are runs; the others stay as they are."""
    runs = [run for folder in folders for run in read_results(folder) if run.end.get("test/loss") is not None]

    def written(match: re.Match[str]) -> str:
        name, _, where = match["name"].partition(" ")
        here = [run for run in runs if place(run) == where]
        mine = [run for run in here if experiment(run) == name]
        if not mine:
            return match[0]
        return f"{match[1]}\n{baselines(here)}{HEAD}\n" + "\n".join(rows(mine)) + f"\n\n{match[3]}"

    PAGE.write_text(TABLE.sub(written, PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    tables = {f"{experiment(run)} {place(run)}" for run in runs}
    print(f"{len(runs)} runs; tables that they could fill: " + "; ".join(sorted(tables)))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main([Path(folder) for folder in sys.argv[1:]])
