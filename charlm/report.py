"""The report of a sweep, or of any folder with runs below it: `python -m charlm.report FOLDER`.

    sweep.csv       a row for each run         report.html     all on one page, which needs no network
    report_*.png    its figures

charlm/charts.py draws the figures; report.html, here, is the page's frame.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from charlm.console import heading, printable
from charlm.errors import InputError, RunStopped, install
from charlm.files import write_whole
from charlm.results import Result, read_results, table, varied

log = logging.getLogger(__name__)


def write_report(folder: Path, pictures: bool = True) -> None:
    """Write sweep.csv, report.html and pictures of its figures: what the runs below a folder came to so far.

    Runs may be in any state, and in the middle of a line. Each file is replaced in one go. Without the packages that
    draw, sweep.csv alone is written, and the log says so.

    Args:
        folder: the sweep's, or any with runs below it.
        pictures: whether to draw them; of a sweep they are wanted at its end.
    """
    results = read_results(folder)
    write_whole(folder / "sweep.csv", _csv(table(results)))
    if not can_draw():
        _say_what_is_missing()
        return
    from charlm.charts import draw_figures, picture

    figures = draw_figures(results)
    write_whole(folder / "report.html", _page(folder, results, figures))
    if not pictures:
        return
    import vl_convert

    from charlm.charts import CONFIG

    for name, charts in figures.items():
        drawn = vl_convert.vegalite_to_png(picture(charts), vl_version=_vegalite(), scale=1.5, config=CONFIG)
        write_whole(folder / f"report_{name}.png", drawn)


@cache
def _say_what_is_missing() -> None:
    log.warning(f"report.html is not written: `{install('report')}` installs what draws it")  # once, not after each job


def can_draw() -> bool:
    """Whether the packages that draw are installed."""
    return all(importlib.util.find_spec(name) for name in ("altair", "vl_convert", "jinja2"))


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _page(folder: Path, results: Sequence[Result], figures: dict[str, list[Any]]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from charlm.charts import CONFIG

    fitted = {"width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}
    charts = {
        f"{name}-{number}": {**chart.to_dict(), **fitted}
        for name, charts in figures.items()
        for number, chart in enumerate(charts)
    }
    # What is not text comes as JSON in which nothing can end a script; text that a model wrote, never as markup.
    frame = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    frame.policies["json.dumps_kwargs"] = {}  # in the order in which it stands
    return frame.get_template("report.html").render(
        name=folder.resolve().name,
        written=time.strftime("%Y-%m-%d %H:%M %Z"),
        counts=Counter(run.status for run in results).most_common(),
        best=next(iter(_by_loss(results)), None),
        results=results,
        settings=varied(results),
        figures={name: [f"{name}-{number}" for number in range(len(charts))] for name, charts in figures.items()},
        data={"config": CONFIG, "charts": charts, **_reader(results)},
        script=_script(),
    )


def _by_loss(results: Sequence[Result]) -> list[Result]:
    """Return the runs that have been validated, completed ones first, the lowest loss first."""
    validated = [run for run in results if run.val_bpc is not None]
    return sorted(validated, key=lambda run: (run.status != "completed", run.val_bpc))


def _reader(results: Sequence[Result]) -> dict[str, Any]:
    """Return the samples as the page's reader wants them, and the runs that it shows first: the best of each cell."""
    from charlm.charts import MEASURES

    written = [run for run in results if run.samples]
    temperatures = sorted({sample["temperature"] for run in written for sample in run.samples})
    best: dict[str, Result] = {}
    for run in _by_loss(written):
        best.setdefault(run.cell, run)
    return {
        "temperatures": [heading(temperature) for temperature in temperatures],
        "runs": [
            {
                "name": run.name,
                "title": f"{run.cell} {run.size}",
                "loss": run.val_bpc,
                "chosen": run in best.values(),
                "samples": [
                    {
                        "at": temperatures.index(sample["temperature"]),
                        "prompt": printable(str(sample["prompt"])),
                        "text": printable(sample["text"]),
                        "step": sample["step"],
                        "measures": {name: sample[name] for name in MEASURES if sample.get(name) is not None},
                    }
                    for sample in run.samples
                ],
            }
            for run in written
        ],
    }


@cache
def _script() -> str:
    """Return the script that draws charts: Vega, Vega-Lite and Vega-Embed in one."""
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=_vegalite()).replace(
        "</script", "<\\/script"
    )


def _vegalite() -> str:
    """Return the version of Vega-Lite that the charts are written for."""
    import altair

    return ".".join(altair.SCHEMA_VERSION.split(".")[:2])


class ReportWriter:
    """Writes a sweep's report anew while the sweep goes on, beside it, so that nothing waits.

    Args:
        folder: the sweep's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._thread: threading.Thread | None = None
        self._ended = 0
        self._again = 0.0  # time.monotonic()

    def update(self, ended: int) -> None:
        """Write it if more trainings have ended than when it was begun last; called as often as one likes.

        It takes processor time from the trainings, so that it is not written for more than a tenth of the time.
        """
        writing = self._thread is not None and self._thread.is_alive()
        if ended > self._ended and not writing and time.monotonic() >= self._again:
            self._ended = ended
            self._thread = threading.Thread(target=self._write, args=(False,), name="report", daemon=True)
            self._thread.start()

    def finish(self, pictures: bool) -> None:
        """Write it for the last time."""
        if self._thread is not None:
            self._thread.join()
        self._write(pictures)

    def _write(self, pictures: bool) -> None:
        begun = time.monotonic()
        try:
            write_report(self._folder, pictures)
        except Exception as error:  # it must not cost the sweep
            log.warning(f"the report is not written: {type(error).__name__}: {error}")
        now = time.monotonic()
        self._again = now + 9 * (now - begun)


def main() -> None:
    """Write the report of a folder anew."""
    parser = argparse.ArgumentParser(prog="python -m charlm.report", description="Write sweep.csv and report.html.")
    parser.add_argument("folder", type=Path, help="a sweep's folder, or any with runs below it")
    folder: Path = parser.parse_args().folder
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        if not folder.is_dir():
            raise InputError(f"there is no folder {folder}")
        if not read_results(folder):
            raise InputError(f"{folder} has no runs below it; a run's folder has a config.yaml")
        if not can_draw():
            raise InputError(f"report.html needs packages that are not installed: `{install('report')}`")
        write_report(folder)
    except (InputError, RunStopped) as error:
        print(f"charlm.report: error: {error}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, InputError) else 1) from None
    log.info(f"written: {folder / 'report.html'}, {folder / 'sweep.csv'}")


if __name__ == "__main__":
    main()
