"""Take the README's pictures of a sweep's review: `python docs/screenshots.py SWEEP docs`.

report.png   the report's page, in a headless Chromium
leet.png     `wandb leet` with the validation and training curves of all runs, in a terminal (tmux), as it stands there

Needs tmux and Debian's chromium with chromium-driver.
"""

from __future__ import annotations

import base64
import io
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.terminal_theme import SVG_EXPORT_THEME as THEME
from rich.text import Text
from selenium import webdriver

COLUMNS, LINES = 132, 27
KEYS = (  # select all runs, show only these metrics, without the sidebar of one run
    *(("C-a", 1.0), ("y", 3.0), ("/", 0.5), ("^(val|train)/bpc$", 0.5), ("Enter", 0.5), ("]", 1.0)),
    *(("c", 0.5), ("2", 1.0), ("r", 0.5), ("1", 2.0)),
)


def terminal(folder: Path) -> str:
    """Return what `wandb leet` shows of a folder's runs, with its colours as escape sequences."""
    tmux = ["tmux", "-L", f"charlm-{time.time_ns()}"]
    command = f"COLORTERM=truecolor WANDB_CONFIG_DIR=. {Path(sys.executable).with_name('wandb')} leet wandb"
    size = ["-x", str(COLUMNS), "-y", str(LINES)]
    subprocess.run([*tmux, "new-session", "-d", *size, "-c", str(folder), command], check=True)
    try:
        time.sleep(6)
        for keys, seconds in KEYS:
            subprocess.run([*tmux, "send-keys", keys], check=True)
            time.sleep(seconds)
        return subprocess.run([*tmux, "capture-pane", "-p", "-e"], check=True, capture_output=True, text=True).stdout
    finally:
        subprocess.run([*tmux, "kill-server"], check=False)


def as_page(screen: str) -> str:
    """Return a terminal's screen as a page."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), color_system="truecolor", force_terminal=True)
    console.print(Text.from_ansi(screen), no_wrap=True, crop=True)
    style = f"body {{ margin: 0; background: {THEME.background_color.hex}; color: {THEME.foreground_color.hex};"
    style += " display: inline-block; padding: 12px }"
    font = "pre { margin: 0; font: 15px/1.17 'DejaVu Sans Mono', monospace !important }"
    code = console.export_html(theme=THEME, inline_styles=True, code_format="<pre>{code}</pre>")
    # The dots of curves come from a font of another width.
    code = re.sub("[\u2800-\u28ff]", r"<i>\g<0></i>", code)
    font += " i { display: inline-block; font: .822em/1 'DejaVu Sans'; width: .7325em }"
    return f"<!doctype html><meta charset=utf-8><style>{style} {font}</style>{code}"


def picture(page: Path, width: int, height: int | None, file: Path) -> None:
    """Write a page's picture, at most `height` high."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    chrome = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        chrome.get(page.resolve().as_uri())
        time.sleep(3)  # for the figures
        whole = chrome.execute_script("return document.body.scrollHeight")
        clip = {"x": 0, "y": 0, "width": width, "height": min(whole, height or whole), "scale": 1}
        shot = chrome.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    finally:
        chrome.quit()
    Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB").save(file, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sweep, target = map(Path, sys.argv[1:])
    picture(sweep / "report.html", 1200, 1070, target / "report.png")
    with tempfile.TemporaryDirectory(prefix="charlm-") as folder:
        # A copy, for leet remembers beside the data what it was told.
        shutil.copytree(
            sweep / "wandb", Path(folder) / "wandb", ignore=shutil.ignore_patterns(".wandb-leet*", "latest*")
        )
        page = Path(folder) / "leet.html"
        page.write_text(as_page(terminal(Path(folder))), encoding="utf-8")
        picture(page, 1220, None, target / "leet.png")
