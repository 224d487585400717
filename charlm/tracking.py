"""Where a run's curves and samples go: metrics.csv in its folder, always, and Weights & Biases if chosen.

Weights & Biases never asks and never hangs: charlm decides whether it is online before it starts, and gives it limits.
"""

from __future__ import annotations

import csv
import io
import logging
import netrc
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import lightning as L
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from charlm.config import TrainConfig, WandbConfig
from charlm.files import SWEEP_FILE, append_whole
from charlm.metrics import bits
from charlm.results import read_results, table
from charlm.run import Run
from charlm.text_metrics import METRICS

log = logging.getLogger(__name__)

INIT_TIMEOUT = 15  # seconds to wait for the server at the start; then the run goes on offline
FINISH_TIMEOUT = 60  # seconds to wait for it at the end; the data are on disk by then
LONGEST_TAG = 64  # characters
SWEEP = "sweep"  # the kind of run that sums a sweep up
WANDB_HOSTS = ("api.forge.coreweave.com", "api.wandb.ai")  # where `wandb login` leaves credentials for, new and old


class MetricsFile(Logger):
    """metrics.csv: one row each time that something is measured, written at once.

    Lightning's CSVLogger deletes the file of a run that resumes; this one goes on with it.
    """

    COLUMNS = (
        *("step", "epoch", "train/loss", "train/bpc", "learning_rate", "characters_per_second"),
        *("val/loss", "val/bpc", "val/bpb"),
        *("test/loss", "test/loss_standard_error", "test/bpc", "test/bpc_standard_error", "test/bpb"),
        "test/loss_windowed",
    )

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: config.yaml lies beside."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        lines = io.StringIO()
        writer = csv.DictWriter(lines, self.COLUMNS)
        if not self.path.exists() or not self.path.stat().st_size:
            writer.writeheader()
        writer.writerow({"step": step, **metrics})
        append_whole(self.path, lines.getvalue())


def _at_no_risk(method: Callable[..., None]) -> Callable[..., None]:
    """Have a method of a tracker fail without the training: with a warning, and from there on nothing is tracked."""

    @rank_zero_only
    @wraps(method)
    def guarded(self: WandbTracker, *args: Any, **kwargs: Any) -> None:
        if self.lost:
            return
        try:
            method(self, *args, **kwargs)
        except Exception as error:  # whatever has become of W&B's service, which is a process of its own
            self.lost = True
            what = " ".join(f"{type(error).__name__} {error}".split())
            log.warning(f"W&B has failed, and the run goes on without it ({what[:200]})")

    return guarded


class WandbTracker(WandbLogger):
    """A Weights & Biases run with a growing table of samples."""

    SAMPLE_COLUMNS = ("step", "temperature", "prompt", "text", *METRICS)

    def __init__(self, **init: Any) -> None:
        super().__init__(**init)
        self._wandb_init.pop("anonymous", None)  # wandb warns of it, whatever its value
        self._samples: Any = None
        self.lost = False  # whether W&B has failed

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the run was told its whole configuration as it began."""

    @_at_no_risk
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add what was measured at a step."""
        super().log_metrics(metrics, step)

    @_at_no_risk
    def log_samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows to the table, those of `SAMPLE_COLUMNS`; what was measured becomes the run's summary too."""
        import wandb

        if self._samples is None:
            # Only an incremental table can be logged again without sending all of it.
            self._samples = wandb.Table(columns=list(self.SAMPLE_COLUMNS), log_mode="INCREMENTAL")
        for row in rows:
            self._samples.add_data(*(row.get(column) for column in self.SAMPLE_COLUMNS))
        self.experiment.log({"samples": self._samples, "trainer/global_step": rows[0]["step"]})
        self.experiment.summary.update(
            {f"text/{name}/{row['temperature']:g}": row[name] for row in rows for name in METRICS if name in row}
        )

    @_at_no_risk
    def record_end(self, run: Run, with_model: bool) -> None:
        """Put what a run came to into its summary, and where online, its best checkpoint beside it as an artifact."""
        import wandb

        end = run.result
        self.experiment.summary.update(
            {
                "result/val_bpc": bits(end["val/loss"]),
                "result/test_bpc": end.get("test/bpc"),
                "result/parameters": end["parameters"],
                "result/seconds": end["seconds"],
            }
        )
        best = run.best_checkpoint
        if with_model and best.exists() and self.online:
            artifact = wandb.Artifact(f"model-{self.experiment.id}", type="model", metadata=end)
            artifact.add_file(str(best))
            self.experiment.log_artifact(artifact, aliases=["best"])

    @property
    def online(self) -> bool:
        """Whether the run's data are sent."""
        return not self.experiment.settings.mode.startswith("off") and not self.experiment.disabled

    @rank_zero_only
    def close(self, exit_code: int) -> None:
        """End the run, as failed if `exit_code` is not 0, and say where it is."""
        run = self.experiment
        where = run.url if self.online else None
        folder = Path(run.dir).parent
        self.lost = False  # what it still can do, it shall
        self._finish(exit_code)
        if where and not self.lost:
            log.info(f"W&B: {where}")
        else:
            log.info(f"W&B: look at it with `wandb leet {folder.parent}`, send it with `wandb sync {folder}`")

    @_at_no_risk
    def _finish(self, exit_code: int) -> None:
        self.experiment.finish(exit_code=exit_code)


def wandb_mode(config: WandbConfig) -> tuple[str, str]:
    """Return the mode that W&B shall run in, and why: what was asked for, else WANDB_MODE, else by credentials."""
    if config.mode:
        return config.mode, f"logger.mode={config.mode}"
    if mode := os.environ.get("WANDB_MODE"):
        return {"dryrun": "offline", "run": "online"}.get(mode, mode), f"WANDB_MODE={mode}"
    if source := find_credentials():
        return "online", f"credentials in {source}"
    return "offline", "no credentials; `wandb login` once, and runs go online"


def find_credentials() -> str | None:
    """Return where credentials for W&B are, as wandb itself would look for them, but without asking anyone."""
    for variable in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if os.environ.get(variable):
            return variable
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        known = netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        return None
    base_url = os.environ.get("WANDB_BASE_URL")
    hosts = (urlsplit(base_url).hostname,) if base_url else WANDB_HOSTS
    return str(path) if any(host in known for host in hosts) else None


def open_wandb(
    config: WandbConfig, folder: Path, resolved: Mapping[str, Any], *, group: str | None, job: str, tags: Sequence[str]
) -> WandbTracker:
    """Start (or go on with) the W&B run of a run's or a sweep's folder, which keeps its id.

    Args:
        config: project, entity, further tags and mode.
        folder: the run's or the sweep's.
        resolved: the whole configuration as plain values.
        group: the sweep.
        job: the kind of run.
        tags: what it can be found by.
    """
    import wandb

    id_file = folder / "wandb_id.txt"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4))
    mode, why = wandb_mode(config)
    init: dict[str, Any] = {
        "project": config.project,
        "entity": config.entity,
        "group": config.group or group,
        "job_type": job,
        "tags": [tag[:LONGEST_TAG] for tag in dict.fromkeys([*config.tags, *tags])],
        "name": folder.name,
        "id": id_file.read_text().strip(),
        # One `wandb leet` shows all runs that lie side by side, and of a sweep that which sums it up too.
        "save_dir": config.dir or (folder if job == SWEEP else folder.parent),
        "config": dict(resolved),
        "settings": wandb.Settings(init_timeout=INIT_TIMEOUT, finish_timeout=FINISH_TIMEOUT, silent=True),
    }
    tracker = WandbTracker(mode=mode, **init)
    try:
        tracker.experiment  # noqa: B018 (starts the run)
    except (wandb.errors.CommError, wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
        mode, why = "offline", f"online failed: {' '.join(str(error).split())[:200]}"
        wandb.teardown()  # it would take the run for one that still goes on
        tracker = WandbTracker(mode=mode, **init)
        tracker.experiment  # noqa: B018
    log.info(f"W&B: {mode} ({why})")
    return tracker


@contextmanager
def tracked(trainer: L.Trainer, config: TrainConfig, run: Run) -> Iterator[None]:
    """Give a trainer its trackers, and end them with it: as failed where it fails."""
    trainer.loggers = [MetricsFile(run.metrics)]
    if not isinstance(config.logger, WandbConfig) or not trainer.is_global_zero:
        yield
        return
    size = config.model.hidden_size or config.model.parameters
    sweep = run.folder.parent.name if (run.folder.parent / SWEEP_FILE).exists() else None
    tags = [config.model.cell, f"{size}x{config.model.num_layers}", *([sweep] if sweep else [])]
    tracker = open_wandb(config.logger, run.folder, config.resolved, group=sweep, job="train", tags=tags)
    trainer.loggers.append(tracker)
    exit_code = 1
    try:
        yield
        tracker.record_end(run, config.logger.log_model)
        exit_code = 0
    finally:
        tracker.close(exit_code)


def record_sweep(folder: Path, config: TrainConfig) -> None:
    """Sum a sweep up in a W&B run of its own: the table of its runs and the figures of its report.

    It has failed where one of the sweep's runs did. Once more recorded, it goes on as the same run. Without W&B nothing
    is done.

    Args:
        folder: the sweep's, for which `charlm.report.write_report` has been called.
        config: of any job of the sweep, for what it says of W&B.
    """
    if not isinstance(config.logger, WandbConfig):
        return
    import wandb

    results = read_results(folder)
    shared = {name: value for name, value in config.resolved.items() if name != "model"}
    tracker = open_wandb(config.logger, folder, shared, group=folder.name, job=SWEEP, tags=[folder.name])
    rows = table(results)
    # As text, for a column of W&B's has one type, and a setting may be now a number and now nothing.
    shown = wandb.Table(columns=[*rows[0]] if rows else [], allow_mixed_types=True)
    for row in rows:
        shown.add_data(*(value if isinstance(value, int | float | str) else str(value) for value in row.values()))
    figures = {path.stem: wandb.Image(str(path)) for path in sorted(folder.glob("report_*.png"))}
    tracker.experiment.log({"runs": shown, **figures})
    tracker.experiment.summary.update(
        {
            **{status: sum(run.status == status for run in results) for status in {run.status for run in results}},
            "result/val_bpc": min((run.val_bpc for run in results if run.val_bpc is not None), default=None),
        }
    )
    tracker.close(exit_code=int(any(run.status == "failed" for run in results)))
