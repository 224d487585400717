"""RESULTS.md's tables are of the runs that they name, and of nothing else."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parent.parent
NAME = "shakespeare ends 0.85 0.05 0.1 plays.txt"
PAGE = f"Before.\n\n<!-- table: {NAME} -->\nold\n<!-- end -->\n\n<!-- table: grid {NAME[12:]} -->\nkept\n<!-- end -->\n"


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return docs/results.py, with a page of its own."""
    spec = importlib.util.spec_from_file_location("results_page", ROOT / "docs" / "results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PAGE", tmp_path / "page.md")
    (tmp_path / "page.md").write_text(PAGE)
    return module


def write_run(folder: Path, seed: int, loss: float, split: str = "ends") -> None:
    folder.mkdir(parents=True)
    config = {
        "seed": seed,
        "model": {"cell": "lstm", "num_layers": 2, "hidden_size": 64},
        "data": {"split": split, "fractions": [0.85, 0.05, 0.1], "path": "/home/someone/plays.txt", "source": "text"},
    }
    result = {
        **{"status": "completed", "val/loss": loss, "test/loss": loss, "test/bpc": loss / 0.6931},
        **{"test/loss_standard_error": 0.01, "test/loss_windowed": loss + 0.05},
        **{"seconds": 12.0, "parameters": 70_000, "device": "a card"},
        "command": [
            *("train.py", "experiment=shakespeare", 'data.path="/home/someone/plays.txt"'),
            *(f"seed={seed}", "hydra.run.dir=runs/x"),
        ],
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "result.json").write_text(json.dumps(result))


def test_runs_that_differ_in_their_seed_alone_are_one_row_in_the_table_that_names_them(
    page: ModuleType, tmp_path: Path
) -> None:
    for seed, loss in ((1, 1.40), (2, 1.44), (3, 1.42)):
        write_run(tmp_path / "runs" / str(seed), seed, loss)
    write_run(tmp_path / "runs" / "elsewhere", 1, 9.0, split="contiguous")
    page.main([tmp_path / "runs"])
    text = (tmp_path / "page.md").read_text()
    (row,) = [line for line in text.splitlines() if "70,000" in line]
    assert "| lstm 64x2 | 70,000 | 1.4200 ± 0.0100 (1.4000 to 1.4400) |" in row
    assert "`python train.py experiment=shakespeare data.path=plays.txt seed=1`" in row
    assert "old" not in text
    assert "kept" in text  # there are no runs of that table


def test_pythons_reference_is_a_text_of_its_own_with_each_python(page: ModuleType, tmp_path: Path) -> None:
    name = "<!-- table: shakespeare contiguous 0.85 0.05 0.1 python_docs-{} -->\nold\n<!-- end -->\n"
    (tmp_path / "page.md").write_text(name.format("3.11") + name.format("3.12"))
    folder = tmp_path / "runs" / "1"
    write_run(folder, 1, 1.4, split="contiguous")
    config, result = (
        yaml.safe_load((folder / "config.yaml").read_text()),
        json.loads((folder / "result.json").read_text()),
    )
    config["data"] |= {"source": "python_docs", "path": None}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "result.json").write_text(json.dumps({**result, "versions": {"python": "3.12.3"}}))
    page.main([tmp_path / "runs"])
    of_3_11, of_3_12 = (tmp_path / "page.md").read_text().split("python_docs-3.12")
    assert "old" in of_3_11
    assert "70,000" in of_3_12


def test_every_table_of_the_page_is_one_that_runs_could_fill() -> None:
    names = [
        line.split("table: ")[1].removesuffix(" -->")
        for line in (ROOT / "RESULTS.md").read_text().splitlines()
        if line.startswith("<!-- table: ")
    ]
    assert names
    experiments = {path.stem for path in (ROOT / "conf" / "experiment").iterdir()} | {"default"}
    assert {name.split()[0] for name in names} <= experiments
    assert len(names) == len(set(names))
