"""The report of a sweep, or of any folder with runs below it: `python -m charlm.report FOLDER`.

sweep.csv       a row for each run          report.html      all of it on one page, which needs nothing else
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

from charlm.files import write_whole
from charlm.results import read_results, table


def write_report(folder: Path) -> None:
    """Write sweep.csv and report.html into a folder: what the runs below it came to, in whatever state they are.

    Each file is replaced in one go.
    """
    results = read_results(folder)
    rows = table(results)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [])
    writer.writeheader()
    writer.writerows(rows)
    write_whole(folder / "sweep.csv", text.getvalue())
