"""Weights & Biases: what reaches a server, here one of our own on loopback, and what happens when it goes away."""

from __future__ import annotations

import gzip
import json
import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import wandb
from lightning.pytorch.loggers import WandbLogger

from charlm import dashboard, tracking
from charlm.config import TrainConfig
from charlm.dashboard import build_workspace
from charlm.files import SWEEP_FILE
from charlm.report import can_draw, write_report
from charlm.text_metrics import METRICS
from charlm.tracking import MetricsFile, record_sweep
from train import train

ROOT = Path(__file__).parent.parent
Composed = Callable[..., TrainConfig]


class Server(ThreadingHTTPServer):
    """As much of W&B's server as a run needs: it knows the user, takes runs, their streams of files and artifacts.

    Args:
        streams: requests with data after which it no longer answers; None: it goes on.
        hangs: whether it then keeps the callers waiting, or hangs up.
    """

    daemon_threads = True

    def __init__(self, streams: int | None = None, hangs: bool = False) -> None:
        self.runs: list[dict[str, Any]] = []  # the variables of each UpsertBucket
        self.artifacts: list[dict[str, Any]] = []
        self.views: list[dict[str, Any]] = []
        self.files: dict[str, list[str]] = {}  # lines by file
        self.ended: list[int] = []  # exit codes
        self._streams = streams
        self._hangs = hangs
        self._count = 0
        self.over = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def dead(self) -> bool:
        return self._streams is not None and self._count > self._streams

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path.endswith("/file_stream"):
            self._count += 1
            if self.dead:
                return {}
            for name, part in body.get("files", {}).items():
                self.files.setdefault(name, []).extend(part["content"])
            if body.get("complete"):
                self.ended.append(body["exitcode"])
            return {}
        variables = body.get("variables", {})
        operation = re.search(r"(?:query|mutation)\s+(\w+)", body.get("query", ""))
        match operation and operation[1]:
            case "UpsertBucket":
                self.runs.append(variables)
                project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "someone"}}
                bucket = {"id": "b", "name": variables["name"], "displayName": variables["displayName"]}
                bucket |= {"config": "{}", "project": project, "historyLineCount": 0}
                return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
            case "CreateArtifact":
                self.artifacts.append(variables.get("input", variables))
                artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"id": "s", "latestArtifact": None}}
                return {"data": {"createArtifact": {"artifact": artifact}}}
            case "CreateRunFiles":
                files = [{"name": name, "uploadUrl": f"{self.url}/{name}"} for name in variables["files"]]
                return {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
            case "ArtifactType":
                return {"data": {"project": {"artifact": None}}}
            case "UpsertView2":
                self.views.append(variables)
                return {"data": {"upsertView": {"view": {"id": "v", "name": "nw-view"}, "inserted": True}}}
            case "Viewer":
                viewer = {"id": "u", "entity": "someone", "username": "someone", "flags": "{}", "teams": {"edges": []}}
                return {"data": {"viewer": viewer}}
        return {"data": {}}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.do_POST()

    def do_PUT(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        content = self._content()
        if self.headers.get("Content-Encoding") == "gzip":
            content = gzip.decompress(content)
        try:
            body = json.loads(content or b"{}")
        except ValueError:
            body = {}
        answer = json.dumps(self.server.answer(self.path, body)).encode()
        if self.server.dead:
            if self.server._hangs:
                self.server.over.wait()
            self.connection.close()
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def _content(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        return b"".join(parts)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    """Return a function that starts a server, which W&B then finds."""
    servers = []

    def start(*arguments: Any) -> Server:
        wandb.teardown()  # it keeps the server that it was told first
        server = Server(*arguments)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        return server

    yield start
    wandb.teardown()
    for server in servers:
        server.over.set()
        server.shutdown()
        server.server_close()


def inspected(run: Path, *options: str) -> list[dict[str, Any]]:
    """Return what `wandb leet` reads in a run's data."""
    program = str(Path(sys.executable).with_name("wandb"))
    line = [program, "leet", "inspect", *options, "--json", str(run)]
    output = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    return [json.loads(output)] if options else [json.loads(line) for line in output.splitlines()]


def test_a_run_its_history_its_summary_and_its_best_checkpoint_reach_the_server(
    serve: Callable[..., Server], composed: Composed, tiny: list[str], tmp_path: Path
) -> None:
    server = serve()
    folder = sweep_folder(tmp_path) / "gru"
    train(composed(*tiny, "logger=wandb", "model=gru", "logger.tags=[mine]"), folder)
    result = json.loads((folder / "result.json").read_text())

    told = server.runs[0]
    assert (told["groupName"], told["jobType"], told["displayName"]) == ("a-sweep", "train", "gru")
    assert told["tags"] == ["mine", "gru", "16x1", "a-sweep"]
    assert json.loads(told["config"])["model"]["value"]["hidden_size"] == 16
    history = [json.loads(line) for line in server.files["wandb-history.jsonl"]]
    assert min(row["val/loss"] for row in history if "val/loss" in row) == pytest.approx(result["val/loss"])
    summary = json.loads(server.files["wandb-summary.json"][-1])
    assert summary["result/parameters"] == result["parameters"]
    assert summary["text/copied/0.5"] == 0
    assert server.ended == [0]
    sent = {artifact["artifactCollectionName"]: artifact for artifact in server.artifacts}
    best = sent[f"model-{(folder / 'wandb_id.txt').read_text()}"]
    assert json.loads(best["metadata"])["val/loss"] == result["val/loss"]
    assert {alias["alias"] for alias in best["aliases"]} == {"latest", "best"}


def test_no_checkpoint_is_sent_where_it_is_not_wanted(
    serve: Callable[..., Server], composed: Composed, tiny: list[str], tmp_path: Path
) -> None:
    server = serve()
    train(composed(*tiny, "logger=wandb", "logger.log_model=false"), tmp_path / "run")
    assert not [a for a in server.artifacts if a["artifactTypeName"] == "model"]
    assert server.ended == [0]


@pytest.mark.timeout(100)  # well below what waiting for the server without a limit takes
@pytest.mark.parametrize("hangs", [False, True])
def test_a_server_that_dies_does_not_keep_a_run_from_its_end_and_the_data_are_on_disk(
    hangs: bool,
    serve: Callable[..., Server],
    composed: Composed,
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tracking, "FINISH_TIMEOUT", 2)
    server = serve(1, hangs)
    folder = tmp_path / "run"
    train(composed(*tiny, "logger=wandb"), folder)
    assert server.dead
    assert not server.ended
    result = json.loads((folder / "result.json").read_text())
    assert result["status"] == "completed"
    (data,) = (tmp_path / "wandb").glob("run-*")
    (run,) = inspected(data, "--summary")
    assert run["summary"]["result/parameters"] == result["parameters"]
    assert float(run["summary"]["test/loss"]) == pytest.approx(result["test/loss"], rel=1e-6)


def test_a_run_goes_on_where_wandb_itself_fails(
    composed: Composed,
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*args: Any) -> None:
        raise ConnectionResetError("its service is gone")

    monkeypatch.setattr(WandbLogger, "log_metrics", fail)
    train(composed(*tiny, "logger=wandb"), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "completed"
    assert caplog.text.count("W&B has failed, and the run goes on without it") == 1


def test_jobs_of_a_sweep_are_runs_of_their_own_in_one_folder_and_one_sums_them_up(
    composed: Composed, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sweep_folder(tmp_path)
    for cell in ("lstm", "gru", "rnn"):
        train(composed(*tiny, "logger=wandb", f"model={cell}"), folder / cell)
    failing = composed(*tiny, "logger=wandb", "model.hidden_size=24")
    with monkeypatch.context() as patch:
        patch.setattr(L.Trainer, "test", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(failing, folder / "failing")
    write_report(folder)
    for _ in range(2):  # as when the sweep is continued
        record_sweep(folder, failing)

    runs: dict[str, dict[str, Any]] = {}
    for data in sorted((folder / "wandb").glob("offline-run-*")):
        records = inspected(data)
        (told,) = [record["run"] for record in records if "run" in record]
        (end,) = [record["exit"] for record in records if "exit" in record]
        runs[told["run_id"]] = {**told, "exit_code": end.get("exit_code", 0), "data": data}
    assert sorted((run["display_name"], run["job_type"], run["exit_code"]) for run in runs.values()) == [
        ("a-sweep", "sweep", 1),
        *(("failing", "train", 1), ("gru", "train", 0), ("lstm", "train", 0), ("rnn", "train", 0)),
    ]
    assert {run["run_group"] for run in runs.values()} == {"a-sweep"}
    summed = next(run for run in runs.values() if run["job_type"] == "sweep")
    (table,) = summed["data"].glob("files/media/table/runs_*.json")
    assert [row[:2] for row in json.loads(table.read_text())["data"]] == [
        *(["gru", "completed"], ["lstm", "completed"], ["failing", "failed"], ["rnn", "completed"]),
    ]
    if can_draw():
        assert len(list(summed["data"].glob("files/media/images/report_*.png"))) == 4


def test_a_terminal_without_credentials_is_never_asked(tiny: list[str], tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, str(ROOT / "train.py"), *tiny, "logger=wandb", "hydra.run.dir=run"]
    with subprocess.Popen(command, cwd=tmp_path, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        shown = b""
        try:
            while part := os.read(ours, 65536):
                shown += part
        except OSError:  # how a terminal on Linux says that its other end is closed
            pass
    assert process.returncode == 0, shown.decode()
    assert b"W&B: offline (no credentials" in shown
    assert b"Enter your choice" not in shown
    assert b"API key" not in shown


workspaces = pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb_workspaces")


@workspaces
def test_the_workspace_shows_what_runs_log(composed: Composed) -> None:
    pytest.importorskip("wandb_workspaces")
    workspace = build_workspace("someone", "charlm", "a-sweep")
    assert [section.name for section in workspace.sections] == ["Loss", "Loss by size", "Samples", "Speed"]
    panels = {type(panel).__name__ for section in workspace.sections for panel in section.panels}
    assert {"LinePlot", "ParallelCoordinatesPlot", "ScatterPlot", "MediaBrowser", "WeavePanelSummaryTable"} <= panels
    saved = workspace._to_model().model_dump_json(by_alias=True)
    logged = {
        *(*MetricsFile.COLUMNS, "trainer/global_step", "report_losses_by_size"),
        *(f"result/{name}" for name in ("val_bpc", "test_bpc", "parameters", "seconds")),
        *(f"text/{name}/{at:g}" for name in METRICS for at in (0, *composed().sampling.temperatures)),
    }
    shown = set(re.findall(r"\b(?:train|val|test|result|text|report|trainer)[/_][\w./]+", saved))
    assert {"val/bpc", "result/val_bpc", "text/copied/0.8", "report_losses_by_size"} <= shown <= logged
    assert "model.value.cell" in saved
    assert "a-sweep" in saved


@workspaces
def test_the_workspace_is_saved(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb_workspaces")
    server = serve()
    monkeypatch.setattr(sys, "argv", ["dashboard", "--entity", "someone", "--sweep", "a-sweep"])
    dashboard.main()
    (view,) = server.views
    assert (view["entityName"], view["projectName"]) == ("someone", "charlm")
    assert "/someone/charlm" in capsys.readouterr().out


def test_without_credentials_no_workspace_is_saved_and_a_line_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["dashboard", "--entity", "someone"])
    with pytest.raises(SystemExit, match="2"):
        dashboard.main()
    assert capsys.readouterr().err.count("\n") == 1


@workspaces
def test_a_workspace_that_cannot_be_saved_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(dashboard, "build_workspace", unreachable)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(sys, "argv", ["dashboard", "--entity", "someone"])
    with pytest.raises(SystemExit, match="2"):
        dashboard.main()
    assert "does not save the workspace: no route to host" in capsys.readouterr().err


def sweep_folder(parent: Path) -> Path:
    """Return a folder that is a sweep's."""
    folder = parent / "a-sweep"
    folder.mkdir()
    (folder / SWEEP_FILE).write_text("{}")
    return folder
