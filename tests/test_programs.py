"""train.py and sample.py as a user runs them: what they print, refuse and leave behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra._internal.hydra import Hydra

from charlm import commandline
from charlm.config import TrainConfig
from train import train

Program = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run(composed: Callable[..., TrainConfig], tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished small run."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    train(composed(*tiny), folder)
    return folder


@pytest.mark.parametrize(
    ("script", "arguments", "says"),
    [
        ("train.py", ["data=text", "data.path=none.txt"], "none.txt does not exist"),
        ("train.py", ["data=text", "data.path=empty.txt"], "holds no text"),
        ("train.py", ["data=text", "data.path=sweep/none"], "a folder without a file"),
        ("train.py", ["data=text", "data.path=bytes.txt"], "byte 0xff at offset 600"),
        ("train.py", ["data=text", "data.path=short.txt"], "data.window=39 is the largest that fits"),
        (
            "train.py",
            ["data=text", "data.path=short.txt", "data.window=20", "data.batch_size=1000"],
            "lower data.batch_size",
        ),
        ("train.py", ["data=text", "data.path=utf16.txt"], "data.encoding=utf-16"),
        ("train.py", ["data=text", "data.path=short.txt", "data.split=documents"], "the val split is empty"),
        ("train.py", ["data.widow=3"], "did you mean data.window?"),
        ("train.py", ["--seed", "3"], "there is no --seed; settings are written name=value, as in seed=VALUE"),
        ("train.py", ["trainer.val_check_interval=0.5"], "give trainer.check_val_every_n_epoch=1 too"),
        ("train.py", ["trainer.limit_train_batches=1e-9"], "leaves an epoch without a batch"),
        ("train.py", ["hydra.run.dir=folder"], "folder holds metrics.csv, mine and no run of charlm's"),
        ("train.py", ["hydra.run.dir=."], "and no run of charlm's"),
        ("train.py", ["trainer.max_step=3"], "did you mean trainer.max_steps?"),
        ("train.py", ["data.window=abc"], "could not be converted to Integer"),
        ("train.py", ["model=lst"], "choose from gru, lstm, rnn"),
        ("train.py", ["model.hidden_size=0"], "model.hidden_size=0 must be 1 or more"),
        ("train.py", ["model.dropout=1.5"], "model.dropout=1.5"),
        ("train.py", ["sampling.temperature=-1"], "sampling.temperature=-1"),
        ("train.py", ["sampling.prompt=Привет, мир"], "'П' (U+041F)"),
        ("train.py", ["sampling.prompt=Ω"], "with sampling.on_unknown=replace"),
        ("train.py", ["trainer.accelerator=gpu", "trainer.devices=3"], "trainer.devices=3"),
        ("train.py", ["data.window"], "not of the form name=value"),
        ("train.py", ["data=text", "data.path=short.txt", "data.encoding=base64"], "is no encoding"),
        ("train.py", ["sweep=cell_size_temperature"], "takes -m"),
        ("train.py", ["model=lstm,gru"], "add -m to try each"),
        ("train.py", ["seed=-1,-2", "-m"], "seed=-1 must be"),
        ("train.py", ["hydra.run.dir="], "names no folder"),
        ("train.py", ["hydra.run.dir=short.txt"], "cannot write short.txt"),
        ("train.py", ["-m", "hydra.sweep.dir=short.txt", "seed=1,2"], "cannot write short.txt"),
        ("train.py", ["optimizer.betas=0.9"], "optimizer.betas is a list"),
        ("train.py", ["trainer.num_nodes=2"], "start train.py on each host"),
        ("train.py", ["trainer=ddp", "trainer.strategy=ddp_spawn"], "choose trainer.strategy=ddp"),
        ("train.py", ["trainer.limit_val_batches=1e-4"], "limit_val_batches=0.0001 of 30 batches is less than one"),
        ("train.py", ["logger=null"], "logger=null names none of conf/logger/"),
        ("train.py", ["data=text", "data.path=/dev/null"], "is neither a file nor a folder"),
        ("train.py", ["hydra.run.dir=sweep"], "sweep is a sweep's folder"),
        ("train.py", ["hydra.run.dir=/proc/charlm/run"], "cannot write /proc/charlm"),
        (
            "train.py",
            ["hydra.job.chdir=true"],
            "hydra.job.chdir=true would look for relative paths in the run's folder",
        ),
        ("train.py", ["--resolve"], "--resolve goes with --cfg"),
        ("train.py", ["--cfg", "job", "-m", "seed=1,2"], "-m and --cfg do not go together"),
        ("sample.py", ["output=folder"], "output=folder cannot be written"),
        ("sample.py", ["device=meta"], "device=meta is not available"),
        ("sample.py", ["device=gpu"], "did you mean cuda?"),
        ("sample.py", [], "no run in runs/ has completed"),
        ("sample.py", ["checkpoint=none.ckpt"], "none.ckpt does not exist"),
        ("sample.py", ["checkpoint=short.txt"], "not a checkpoint of charlm's"),
        ("sample.py", ["checkpoint=sweep"], "sweep is not a run's folder"),
        ("sample.py", ["temperature=-0.5"], "temperature=-0.5"),
        ("sample.py", ["lenght=3"], "did you mean length?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(
    script: str, arguments: list[str], says: str, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder" / "mine").mkdir(parents=True)
    (tmp_path / "folder" / "mine" / "video.part").touch()
    (tmp_path / "folder" / "metrics.csv").write_text("mine")
    (tmp_path / "folder" / ".directory").touch()
    (tmp_path / "utf16.txt").write_text("text", encoding="utf-16")
    (tmp_path / "sweep" / "none").mkdir(parents=True)
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    (tmp_path / "bytes.txt").write_bytes(b"text\n" * 120 + b"\xff")
    (tmp_path / "short.txt").write_text("0123456789" * 40)
    before = sorted(tmp_path.rglob("*"))
    done = program(script, *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_prompt_character_of_no_use_is_refused_before_anything_is_written(
    run: Path, program: Program, tmp_path: Path
) -> None:
    done = program("sample.py", f"checkpoint={run}", "prompt=seé", "output=texts.jsonl")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "'é' (U+00E9)" in done.stderr
    assert not list(tmp_path.iterdir())


def test_texts_stand_under_their_temperatures_and_in_a_file(run: Path, program: Program, tmp_path: Path) -> None:
    given = (f"checkpoint={run}", "prompt=The ", "length=25", "temperature=[0,0.5,inf]", "output=texts.jsonl")
    first, second = program("sample.py", *given), program("sample.py", *given)
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert [row["temperature"] for row in rows] == [0.0, 0.5, "inf"]
    headings = ("--- greedy ---", "--- temperature 0.5 ---", "--- temperature inf ---")
    expected = "".join(f"{heading}\nThe {row['text']}\n" for heading, row in zip(headings, rows, strict=True))
    assert first.stdout == expected
    assert "entropy" in first.stderr.splitlines()[1]  # what was measured; the texts go alone into a pipe
    assert {"distinct_4grams", "loop_rate", "entropy"} <= rows[0].keys()
    assert first.stderr.endswith("drawn on cpu, weights=float32\n")
    assert rows[0]["weights"] == "float32"
    assert list(tmp_path.iterdir()) == [tmp_path / "texts.jsonl"]


def test_a_terminal_of_few_characters_shows_the_others_escaped(run: Path, program: Program) -> None:
    given = (f"checkpoint={run}", "prompt=seé", "length=5", "temperature=0", "on_unknown=replace")
    done = program("sample.py", *given, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "se\\xe9" in done.stdout


def test_a_sweep_of_samples_leaves_the_texts_of_all_in_one_file(run: Path, program: Program, tmp_path: Path) -> None:
    done = program("sample.py", "-m", f"checkpoint={run}", "temperature=0.5,1.0", "seed=1,2", "output=texts.jsonl")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert [(row["temperature"], row["seed"]) for row in rows] == [(0.5, 1), (0.5, 2), (1.0, 1), (1.0, 2)]
    assert all(row["text"] in done.stdout for row in rows)
    assert list(tmp_path.iterdir()) == [tmp_path / "texts.jsonl"]


def test_a_sweep_of_samples_writes_nothing_where_one_of_them_cannot_work(
    run: Path, program: Program, tmp_path: Path
) -> None:
    given = ("-m", f"checkpoint={run}", "output=texts.jsonl")
    for values, says in (
        ("temperature=0.5,warm", "temperature=warm"),
        ("top_k=5,some", "top_k"),
        ("seed=1,-1", "seed=-1"),
    ):
        done = program("sample.py", *given, values)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
        assert says in done.stderr
    assert not list(tmp_path.iterdir())


def test_several_samples_differ_and_a_prompt_may_come_from_standard_input(run: Path, program: Program) -> None:
    given = (f"checkpoint={run}", "prompt_file=-", "length=25", "temperature=1.0", "num_samples=3")
    done = program("sample.py", *given, stdin="Some sea\nThe ")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Some sea\nThe ") == 3
    texts = done.stdout.split("--- temperature 1, sample ")[1:]
    assert len({text.split("---\n")[1] for text in texts}) == 3


def test_ctrl_c_before_work_begins_leaves_nothing(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    code = f"""if True:
        import runpy, sys
        class Interrupting:
            def find_spec(self, name, path=None, target=None):
                if name == "lightning":  # the first import behind the making of the run's folder
                    raise KeyboardInterrupt
        sys.meta_path.insert(0, Interrupting())
        sys.path.insert(0, {str(root)!r})
        runpy.run_path({str(root / "train.py")!r}, run_name="__main__")"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (128 + signal.SIGINT, b"")
    assert not list(tmp_path.iterdir())


def test_whoever_has_read_enough_of_the_texts_ends_the_program_quietly(run: Path, tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "sample.py"
    command = [sys.executable, str(script), f"checkpoint={run}", "length=2000", "temperature=[1.0,1.1,1.2]"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    "prompt", ["The sea, and (some) = {hill} ${x} 'q' ", '"Yes," she said.', "'tis", "[see", r"The \${oc.env:HOME}"]
)
def test_a_text_is_taken_as_it_stands(prompt: str, run: Path, program: Program) -> None:
    done = program(
        "sample.py", f"checkpoint={run}", f"prompt={prompt}", "length=1", "temperature=0", "on_unknown=replace"
    )
    assert done.returncode == 0, done.stderr
    assert prompt in done.stdout


def test_help_answers_with_the_choices(program: Program) -> None:
    for script, word in (("train.py", "seed_notebook"), ("sample.py", "temperature")):
        done = program(script, "--help")
        assert done.returncode == 0
        assert word in done.stdout


def test_what_hydra_could_choose_is_looked_for_where_a_help_text_names_it(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "hydra/launcher: basic, checked, pool" in program("train.py", "--hydra-help").stdout
    looked: list[str] = []
    monkeypatch.setattr(Hydra, "list_all_config_groups", lambda self, parent="": looked.append(parent) or [])
    monkeypatch.setattr(Hydra, "format_config_groups", Hydra.format_config_groups)  # to be put back
    commandline._list_groups_where_asked()
    text = Hydra.format_config_groups(Hydra.__new__(Hydra), bool)
    assert looked == []
    assert str(text) == ""
    assert looked == [""]


def test_a_log_file_has_no_progress_bar(tiny: list[str], program: Program, tmp_path: Path) -> None:
    done = program("train.py", *tiny, "hydra.run.dir=~/runs/${model.cell} of ${now:%Y}", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "it/s" not in done.stdout + done.stderr
    assert "step     20 of 20" in done.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("lstm of 20")  # Hydra's interpolations
    assert (folder / "train.log").exists()
    assert program("sample.py", "length=5", "temperature=0").stdout.startswith("the newest completed run: ")


def test_two_processes_train_as_one_with_twice_the_batch(tiny: list[str], program: Program, tmp_path: Path) -> None:
    """Each rank reads its own half of every batch, so that losses agree to rounding, and validation counts all once."""
    same = ("model.dropout=0", "trainer.max_steps=10", "model=gru")
    two = program("train.py", *tiny, *same, "trainer.devices=2", "data.batch_size=4", "hydra.run.dir=two")
    one = program("train.py", *tiny, *same, "trainer.devices=1", "data.batch_size=8", "hydra.run.dir=one")
    assert (two.returncode, one.returncode) == (0, 0), two.stderr + one.stderr
    assert two.stdout.count("kept in") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("two", "one")]
    for figure in ("val/loss", "test/loss", "test/loss_windowed"):
        assert results[0][figure] == pytest.approx(results[1][figure], rel=1e-4)
