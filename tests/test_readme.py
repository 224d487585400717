"""The README's commands work, and its file tree is the repository's."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = [
    line.partition("  #")[0].strip()
    for block in re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
TRAIN = list(dict.fromkeys(line for line in LINES if line.startswith("python train.py")))
SAMPLE = list(dict.fromkeys(line for line in LINES if "python sample.py" in line))
REPORT = [line for line in LINES if line.startswith("python -m charlm.report")]
SCRIPTS = [line for line in LINES if line.startswith(("python docs/", "python benchmarks/"))]
COMPOSED_ONLY = ("data=ag_news", "data=huggingface", "logger.mode=online")  # these need the network
SHORT = {
    "trainer.max_steps": "4",
    "trainer.val_check_interval": "2",
    "model.hidden_size": "8",
    "sampling.length": "5",
    "sampling.temperature": "0.5",
    "trainer.limit_val_batches": "2",
    "trainer.limit_test_batches": "2",
    "logger": "csv",
}
SENTENCE = "The sea and a hill under some old tree, where nobody waits for rain.\n"
EXAMPLES = {  # the files that the README's commands read
    "my_text.txt": SENTENCE * 200,
    "tinyshakespeare.txt": SENTENCE * 200,
    "old_text.txt": SENTENCE * 200,
    "books/one.txt": SENTENCE * 100,
    "books/two.txt": SENTENCE * 100,
    "reviews.csv": "title,body\n" + f'good,"{SENTENCE.strip()}"\n' * 200,
    "corpus.jsonl": f'{{"text": "{SENTENCE.strip()}"}}\n' * 200,
    "prompt.txt": "The ",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in EXAMPLES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, encoding="utf-8")
    return tmp_path


def shortened(line: str) -> str:
    """Return the command with its script's whole path, and where it trains, settings that make it short."""
    given = {argument.partition("=")[0].lstrip("+") for argument in shlex.split(line)}
    if "train.py" in line:
        if any(part in line for part in COMPOSED_ONLY):
            line += " --cfg job"
        else:
            settings = {name: value for name, value in SHORT.items() if name not in given}
            if "model.parameters" in given:  # in the place of the hidden size
                del settings["model.hidden_size"]
            if "logger." in line:  # W&B is the point
                settings.pop("logger", None)
            line = " ".join([line, *(f"{name}={value}" for name, value in settings.items())])
    python = shlex.quote(sys.executable)
    line = re.sub("^python -m", f"PYTHONPATH={shlex.quote(str(ROOT))} {python} -m", line)
    return re.sub(r"python (train|sample)\.py", lambda m: f"{python} {shlex.quote(str(ROOT / m[1]))}.py", line)


def run(line: str, folder: Path) -> None:
    ended = subprocess.run(
        ["bash", "-c", line], cwd=folder, env={**os.environ}, capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, f"{line}\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}"


@pytest.mark.parametrize("line", TRAIN)
def test_every_training_command_of_the_readme_works(line: str, folder: Path) -> None:
    run(shortened(line), folder)


def test_every_sampling_and_report_command_of_the_readme_works(
    folder: Path, program: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    # On the README's own text, so that its prompts can be read; at the places where its commands look for a run.
    trained = program("train.py", "experiment=debug", "trainer.max_steps=4", "hydra.run.dir=runs/first")
    assert trained.returncode == 0, trained.stderr
    assert SAMPLE
    assert REPORT
    for line in SAMPLE + REPORT:
        run(shortened(line), folder)


@pytest.mark.parametrize("line", SCRIPTS)
def test_every_other_script_that_the_readme_names_exists(line: str) -> None:
    assert (ROOT / shlex.split(line)[1]).is_file()


def test_every_make_target_of_the_readme_exists_and_ci_runs_its_tests() -> None:
    targets = {line.split()[1] for line in LINES if line.startswith("make ")}
    assert {"train", "test"} <= targets
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()


def test_the_file_tree_of_the_readme_names_every_module_and_configuration_group() -> None:
    tree = README.partition("## Files")[2].partition("\n## ")[0]
    modules = [path.name for path in (ROOT / "charlm").glob("*.py")]
    groups = [f"{path.name}/" for path in (ROOT / "conf").iterdir() if path.is_dir()]
    assert [name for name in modules + groups if not re.search(rf"\s{re.escape(name)}\s", tree)] == []
