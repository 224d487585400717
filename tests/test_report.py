"""The report: what it says of runs in any state, and that the page works in a browser."""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from charlm import report
from charlm.report import write_report
from charlm.results import read_results
from charlm.text_metrics import METRICS

ROOT = Path(__file__).parent.parent
draws = pytest.mark.skipif(not report.can_draw(), reason="altair and vl-convert are not installed (.[report])")

HOSTILE = "</script><script>window.harmed = 1</script><img src=x onerror='window.harmed = 1'>& \x1b[31m \u2028\u202e"


def make_run(folder: Path, cell: str, size: int, loss: float, **settings: Any) -> Path:
    """Write the folder of a run that has completed."""
    folder.mkdir(parents=True)
    model = {"cell": cell, "hidden_size": size, "num_layers": 1}
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 1, "model": model, "sampling": {}, **settings}))
    with (folder / "metrics.csv").open("w") as file:
        file.write("step,train/bpc,val/loss,val/bpc\n")
        for step in range(10, 110, 10):
            file.write(f"{step},{loss / 0.6 + 9 / step},,\n")
            file.write(f"{step},,{loss + 3 / step},{(loss + 3 / step) / 0.693}\n")
    rows = [{"step": 50, "temperature": 0.5, "prompt": "The ", "text": "an early text"}]
    for temperature in (0.0, 0.5, 1.0, "inf"):
        measures = dict.fromkeys(METRICS, 0.25) | {"longest_copy": 7}
        text = f"{cell} {size} at {temperature} {HOSTILE}"
        rows.append({"step": 100, "temperature": temperature, "prompt": "The ", "text": text, **measures})
    (folder / "samples.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    end = {"status": "completed", "val/loss": loss, "test/bpc": loss / 0.7, "test/bpc_standard_error": 0.02}
    end |= {"parameters": size * size, "seconds": 12.5, "command": ["train.py", f"model={cell}", "data.path=my text"]}
    (folder / "result.json").write_text(json.dumps(end))
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """A sweep with runs in every state, some of whose files are being written."""
    folder = tmp_path / "a <b>sweep</b>"
    for cell in ("lstm", "gru", "rnn"):
        for size in (64, 256):
            make_run(folder / f"{cell}-{size}x1", cell, size, 1.0 + 10 / size)
    failed = make_run(folder / "failed", "gru", 512, 1.0)
    end = {"status": "failed", "error": f"RuntimeError: out of memory {HOSTILE}\nin two lines"}
    (failed / "result.json").write_text(json.dumps(end))
    killed = make_run(folder / "killed", "lstm", 1024, 1.0)
    (killed / "result.json").unlink()
    for name in ("metrics.csv", "samples.jsonl"):
        content = (killed / name).read_bytes()
        (killed / name).write_bytes(content[: len(content) * 2 // 3])
    damaged = make_run(folder / "damaged", "lstm", 2048, 1.0)
    (damaged / "result.json").write_text('{"status": "completed"}')
    new = folder / "new"
    new.mkdir()
    (new / "config.yaml").write_text("model: {cell: rnn, hidden_size: null, num_layers: 2}\n")
    (new / "result.json").write_text('{"sta')
    for junk, content in (("empty", ""), ("half", "model: {cell: ["), ("other", "[1, 2]")):
        (folder / junk).mkdir()
        (folder / junk / "config.yaml").write_text(content)
    return folder


def rows(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "sweep.csv").open(newline="", encoding="utf-8") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def test_every_run_is_in_the_table_whatever_its_state(sweep: Path) -> None:
    with FileLock(sweep / "new" / ".lock"):
        (sweep / "lstm-64x1" / ".lock").touch()  # of a run that is over
        write_report(sweep, pictures=False)
    found = rows(sweep)
    completed = [f"{cell}-{size}x1" for cell in ("gru", "lstm", "rnn") for size in (64, 256)]
    assert {name: row["status"] for name, row in found.items()} == {
        **dict.fromkeys(completed, "completed"),
        **{"failed": "failed", "damaged": "failed", "killed": "interrupted", "new": "running"},
    }
    assert found["failed"]["cause"].startswith("RuntimeError: out of memory </script>")
    assert "result.json is damaged" in found["damaged"]["cause"]
    assert float(found["lstm-64x1"]["val_bpc"]) == pytest.approx((1 + 10 / 64) / 0.6931, rel=1e-3)
    assert float(found["killed"]["val_bpc"]) > 1  # the best that it had come to
    assert found["lstm-64x1"]["command"] == "python train.py model=lstm 'data.path=my text'"


def test_settings_that_differ_are_columns_and_those_of_sampling_are_not(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "lstm", 8, 1.0, optimizer={"learning_rate": 0.1}, sampling={"length": 3})
    make_run(tmp_path / "b", "lstm", 8, 1.0, optimizer={"learning_rate": 0.2}, sampling={"length": 4})
    write_report(tmp_path, pictures=False)
    assert [row["optimizer.learning_rate"] for row in rows(tmp_path).values()] == ["0.1", "0.2"]
    assert "sampling.length" not in rows(tmp_path)["a"]
    assert "seed" not in rows(tmp_path)["a"]


def test_samples_are_those_of_the_best_checkpoint_and_of_other_settings_or_the_last_there_are(sweep: Path) -> None:
    run = sweep / "gru-64x1"
    (run / "sampled").mkdir()
    (run / "sampled" / "1.7_abc.jsonl").write_text('{"step": 100, "temperature": 1.7, "prompt": "", "text": "t"}\n{"st')
    found = {result.name: result for result in read_results(sweep)}
    assert [sample["temperature"] for sample in found["gru-64x1"].samples] == [0.0, 0.5, 1.0, 1.7, float("inf")]
    (run / "samples.jsonl").write_text('{"step": 50, "temperature": 0.5, "prompt": "", "text": "an early text"}\n')
    (early, _) = next(result for result in read_results(sweep) if result.name == "gru-64x1").samples
    assert early["text"] == "an early text"


class Elements(HTMLParser):
    """The elements of a page, with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@draws
def test_the_page_needs_nothing_from_elsewhere_and_nothing_half_written_is_left(sweep: Path) -> None:
    write_report(sweep)
    page = Elements()
    page.feed((sweep / "report.html").read_text(encoding="utf-8"))
    assert not [names for _, names in page.found if {"src", "href", "onerror"} & names.keys()]
    assert [tag for tag, _ in page.found].count("script") == 3
    assert any("default-src 'none'" in (names.get("content") or "") for _, names in page.found)
    assert {path.name for path in sweep.iterdir() if path.is_file()} == {
        *("sweep.csv", "report.html"),
        *(f"report_{name}.png" for name in ("losses_by_size", "loss_curves", "cost", "samples")),
    }
    assert all((sweep / name).read_bytes()[:4] == b"\x89PNG" for name in ("report_cost.png", "report_samples.png"))


@draws
def test_a_folder_where_no_run_has_begun_has_a_report_that_says_so(tmp_path: Path) -> None:
    write_report(tmp_path)
    assert "No run has begun yet" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "sweep.csv").exists()


def test_without_the_packages_that_draw_there_is_the_table_and_a_line_that_says_what_to_install(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    report._say_what_is_missing.cache_clear()
    with caplog.at_level(logging.WARNING, "charlm"):
        for _ in range(2):
            write_report(sweep)
    assert len(rows(sweep)) == 10
    assert not (sweep / "report.html").exists()
    assert caplog.text.count("pip install") == 1


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "charlm.report", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def test_a_folder_that_cannot_be_reported_on_is_refused_in_one_line(tmp_path: Path) -> None:
    for folder, why in ((tmp_path / "none", "there is no folder"), (tmp_path, "no runs below it")):
        done = command(str(folder))
        assert done.returncode == 2
        assert why in done.stderr
        assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@draws
def test_one_run_is_reported_on_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", "lstm", 64, 1.0)
    done = command(str(run))
    assert done.returncode == 0, done.stderr
    assert list(rows(run)) == ["run"]


# --- in a browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("there is no chromium with its chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        *("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"),
        *("disable-background-networking", "disable-component-update", "disable-dev-shm-usage"),
        f"user-data-dir={tmp_path_factory.mktemp('browser')}",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def opened(browser: Any, page: Path, width: int) -> None:
    """Open a page in a window of a width, and wait until every figure is drawn."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(page.as_uri())
    drawn = "return [...document.querySelectorAll('.chart')].every(chart => chart.querySelector('svg'))"
    deadline = time.monotonic() + 30
    while not browser.execute_script(drawn):
        assert time.monotonic() < deadline, browser.get_log("browser")
        time.sleep(0.05)


@draws
@pytest.mark.parametrize("width", [1400, 390])
def test_the_page_works_in_a_browser_on_a_wide_screen_and_a_phone(sweep: Path, browser: Any, width: int) -> None:
    write_report(sweep, pictures=False)
    opened(browser, sweep / "report.html", width)
    script = browser.execute_script

    charts = "[...document.querySelectorAll('.chart')]"
    assert script(f"return {charts}.length") == 2 + 3 + 2 + 6
    assert script(f"return {charts}.every(chart => chart.querySelector('[role=graphics-symbol]'))")
    widths = "chart.querySelector('svg').getBoundingClientRect().width <= chart.clientWidth + 1"
    assert script(f"return {charts}.every(chart => {widths})")
    assert script("return document.documentElement.scrollWidth <= window.innerWidth")

    texts = "return [...document.querySelectorAll('.sample pre')].map(text => text.textContent)"
    slider = "document.getElementById('temperature')"
    for at, temperature in enumerate(("0.0", "0.5", "1.0", "inf")):
        script(f"{slider}.value = {at}; {slider}.dispatchEvent(new Event('input'))")
        shown = script(texts)
        assert [text.split(" at ")[0] for text in shown] == ["The gru 256", "The lstm 256", "The rnn 256"]
        assert all(f" at {temperature} </script>" in text for text in shown)
        assert all("\x1b" not in text and "\u202e" not in text for text in shown)
    assert script("return document.getElementById('at').textContent") == "temperature inf"
    script("document.querySelector('#chosen input').click()")
    assert len(script(texts)) == 4

    column = "return [...document.querySelectorAll('tbody tr')].map(row => row.cells[5].textContent)"
    for order in (1, -1):
        script("document.querySelectorAll('th button')[5].click()")
        numbers = [int(text.replace(",", "")) for text in script(column) if text]
        assert numbers == sorted(numbers, reverse=order < 0)
        assert len(numbers) == 6

    assert script("return window.harmed") is None
    assert browser.get_log("browser") == []
