"""The saved W&B workspace for sweeps: `python -m charlm.dashboard --entity NAME`.

Curves grouped by cell, losses by size as the sweep's summary run drew them, what a lower loss costs, parallel
coordinates, and the samples with what they are worth.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from typing import Any

from charlm.errors import InputError, LibraryErrors, install

TEMPERATURES = ("0", "0.3", "0.8", "1", "1.3", "1.8")  # those of conf/train.yaml, and greedy


def build_workspace(entity: str, project: str, sweep: str | None = None) -> Any:
    """Return the workspace, which is saved with its method `save`.

    Args:
        entity: whose project it is.
        project: its name.
        sweep: the name of a sweep, to show its runs alone.
    """
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces.expr import And

    step, cell = "trainer/global_step", "model.cell"

    def curve(title: str, metric: str) -> Any:
        return wr.LinePlot(
            title=title,
            x=step,
            y=[metric],
            groupby=wr.Config(cell),
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
            title_x="optimizer steps",
        )

    def measure(title: str, name: str) -> Any:
        metrics = [f"text/{name}/{temperature}" for temperature in TEMPERATURES]
        return wr.BarPlot(title=title, metrics=metrics, orientation="v", groupby=wr.Config(cell))

    coordinates = (
        (wr.Config(cell), "cell"),
        (wr.Config("model.num_layers"), "layers"),
        (wr.Config("model.hidden_size"), "hidden units"),
        (wr.SummaryMetric("result/parameters"), "parameters"),
        (wr.SummaryMetric("result/seconds"), "seconds"),
        (wr.SummaryMetric("result/val_bpc"), "validation, bits per character"),
    )
    lowest = "Lowest validation loss, bits per character"
    loss = wr.SummaryMetric("result/val_bpc")
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"charlm: {sweep or 'all runs'}",
        sections=[
            ws.Section(
                name="Loss",
                panels=[
                    curve("Validation loss, bits per character", "val/bpc"),
                    curve("Training loss, bits per character", "train/bpc"),
                    wr.ScalarChart(title=lowest, metric=loss, groupby_aggfunc="min"),
                ],
                is_open=True,
            ),
            ws.Section(
                name="Loss by size",
                panels=[
                    wr.MediaBrowser(title="By cell, layers and hidden units", media_keys=["report_losses_by_size"]),
                    wr.ScatterPlot(
                        title="Bits per character against parameters",
                        x=wr.SummaryMetric("result/parameters"),
                        y=loss,
                        log_x=True,
                    ),
                    wr.ParallelCoordinatesPlot(
                        title="What makes the difference",
                        columns=[
                            wr.ParallelCoordinatesPlotColumn(metric, display_name=name, inverted=name.startswith("val"))
                            for metric, name in coordinates
                        ],
                    ),
                ],
                is_open=True,
            ),
            ws.Section(
                name="Samples",
                panels=[
                    wr.WeavePanelSummaryTable(table_name="samples"),
                    measure("In loops, share of characters, by temperature", "loop_rate"),
                    measure("Copied, share of characters, by temperature", "copied"),
                    measure("Real words, share of words, by temperature", "real_words"),
                ],
                is_open=True,
            ),
            ws.Section(
                name="Speed",
                panels=[
                    curve("Characters a second", "characters_per_second"),
                    curve("Learning rate", "learning_rate"),
                ],
            ),
        ],
        runset_settings=ws.RunsetSettings(
            filters=And(ws.Metric("Group") == sweep) if sweep else "",
            groupby=[ws.Config(cell)],
            order=[ws.Ordering(ws.Summary("result/val_bpc"), ascending=True)],
            pinned_columns=[f"config:{cell}.value", "config:model.hidden_size.value", "summary:result/val_bpc"],
        ),
    )


def main() -> None:
    """Save the workspace of a project."""
    from charlm.tracking import find_credentials

    parser = argparse.ArgumentParser(
        prog="python -m charlm.dashboard", description="Save a W&B workspace that shows charlm's runs."
    )
    parser.add_argument("--entity", required=True, help="the user or team whose project it is")
    parser.add_argument("--project", default="charlm", help="default: charlm")
    parser.add_argument("--sweep", help="the name of a sweep's folder, to show its runs alone")
    arguments = parser.parse_args()
    try:
        if not importlib.util.find_spec("wandb_workspaces"):
            raise InputError(f"wandb-workspaces is not installed: `{install('dashboard')}`")
        if not find_credentials():
            raise InputError("there are no credentials for W&B; `wandb login` once")
        with LibraryErrors("W&B does not save the workspace", "see to the connection, --entity and --project"):
            print(build_workspace(arguments.entity, arguments.project, arguments.sweep).save().url)
    except InputError as error:
        print(f"charlm.dashboard: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
