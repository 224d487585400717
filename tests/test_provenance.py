"""A run goes on with the text that it was trained on, and with no other."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lives import begin_ranks

from charlm.config import TrainConfig
from charlm.corpus import load_corpus
from charlm.errors import InputError
from train import train

Composed = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def books(text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of two texts, which nobody changes."""
    folder, text = tmp_path_factory.mktemp("provenance") / "books", text_file.read_text()
    folder.mkdir()
    (folder / "a.txt").write_text(text[:5000])
    (folder / "b.txt").write_text(text[5000:])
    return folder


@pytest.fixture(scope="module")
def trained(composed: Composed, tiny: list[str], books: Path) -> Path:
    """Return the folder of a finished run on them."""
    folder = books.with_name("trained")
    here = Path.cwd()
    os.chdir(books.parent)
    try:
        train(composed(*tiny, "data.path=books"), folder)
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def run(trained: Path, books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of a run that was interrupted at half of its steps, in a folder with a copy of its texts."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(books, tmp_path / "books")
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    (folder / "result.json").unlink()
    os.replace(folder / "checkpoints" / "previous.ckpt", folder / "checkpoints" / "last.ckpt")
    return folder


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / "checkpoints" / "last.ckpt")["state_dict"]
    return state


def edited(change: Callable[[str], str]) -> Callable[[Path], Any]:
    """Return what changes a text of the folder `books`."""
    return lambda books: (books / "b.txt").write_text(change((books / "b.txt").read_text()))


CHANGES: dict[str, Callable[[Path], Any]] = {
    "a character": edited(lambda text: text.replace("a", "e", 1)),
    "two characters swapped, far apart": edited(lambda text: text[-2] + text[1:-2] + text[0] + text[-1]),
    "a character more": edited(lambda text: text + "a"),
    "a character that it had not": edited(lambda text: "@" + text[1:]),
    "a file more": lambda books: (books / "c.txt").write_text("and more"),
    "a file less": lambda books: (books / "a.txt").unlink(),
    "files in another order": lambda books: os.rename(books / "a.txt", books / "z.txt"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_with_another_text_a_run_is_refused_and_nothing_is_lost(
    change: str, run: Path, composed: Composed, tiny: list[str]
) -> None:
    before = content(run)
    CHANGES[change](Path("books"))
    with pytest.raises(InputError, match=r"run was trained on another text.*digest: \w+ there, \w+ now") as refused:
        train(composed(*tiny, "data.path=books"), run)
    assert "choose another folder" in str(refused.value)
    assert content(run) == before


def test_with_its_own_text_again_it_goes_on_to_the_same_weights(
    run: Path, trained: Path, books: Path, composed: Composed, tiny: list[str]
) -> None:
    config = composed(*tiny, "data.path=books")
    CHANGES["a character"](Path("books"))
    with pytest.raises(InputError):
        train(config, run)
    shutil.rmtree("books")
    os.symlink(books, "books")  # the text counts, not the file
    (books / "a.txt").touch()
    train(config, run)
    expected, found = weights(trained), weights(run)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_before_its_first_checkpoint_a_run_begins_anew_with_another_text(
    run: Path, composed: Composed, tiny: list[str]
) -> None:
    shutil.rmtree(run / "checkpoints")
    CHANGES["a character"](Path("books"))
    config = composed(*tiny, "data.path=books")
    train(config, run)
    assert json.loads((run / "text.json").read_text()) == load_corpus(config.data).identity


def test_a_run_that_does_not_say_its_text_goes_on_and_says_so(
    run: Path, trained: Path, composed: Composed, tiny: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    (run / "text.json").unlink()
    with caplog.at_level(logging.WARNING, "charlm"):
        train(composed(*tiny, "data.path=books"), run)
    assert "does not say which text it was trained on" in caplog.text
    assert (run / "text.json").read_text() == (trained / "text.json").read_text()


def test_a_finished_run_is_no_result_on_another_text(
    run: Path, trained: Path, composed: Composed, tiny: list[str]
) -> None:
    shutil.rmtree(run)
    shutil.copytree(trained, run)
    before = content(run)
    CHANGES["a character"](Path("books"))
    for sampling in ([], ["sampling.temperature=0.7"]):
        with pytest.raises(InputError, match="run was trained on another text"):
            train(composed(*tiny, "data.path=books", *sampling), run)
    assert content(run) == before
    shutil.rmtree("books")  # where there is none, there is no doubt which is meant
    train(composed(*tiny, "data.path=books", "sampling.temperature=0.7"), run)
    assert list((run / "sampled").glob("0.7_*.jsonl"))


def test_a_sweep_takes_no_result_on_another_text(
    program: Callable[..., subprocess.CompletedProcess[str]], text_file: Path, tiny: list[str], tmp_path: Path
) -> None:
    shutil.copy(text_file, tmp_path / "text.txt")
    short = [override for override in tiny if not override.startswith("data.path")]
    given = ("-m", *short, "data.path=text.txt", "trainer.max_steps=10", "hydra.sweep.dir=s")
    assert program("train.py", *given, "model=lstm").returncode == 0
    (tmp_path / "text.txt").write_text(text_file.read_text().replace("a", "e", 1))
    (training,) = tmp_path.glob("s/*-16x1_*")
    before = content(training)
    wider = program("train.py", *given, "model=lstm,gru")
    assert (wider.returncode, len(wider.stderr.splitlines())) == (2, 1), wider.stderr
    assert f"s/{training.name} was trained on another text" in wider.stderr
    assert list(tmp_path.glob("s/*-16x1_*")) == [training]
    assert content(training) == before
    (tmp_path / "text.txt").unlink()
    again = program("train.py", *given, "model=lstm")
    assert again.returncode == 0, again.stderr
    assert "1 done before" in again.stdout


class AnotherTextOnRank1:
    """Has the second process read another text, as a host may whose copy is old."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, folder: Path) -> None:
        import charlm.datamodule

        load = charlm.datamodule.load_corpus
        if os.environ["LOCAL_RANK"] == "1":
            charlm.datamodule.load_corpus = lambda config: load(replace(config, path=str(self.path)))  # type: ignore[call-arg]


def test_ranks_that_read_different_texts_all_end_and_say_so(tiny: list[str], text_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "old.txt"
    other.write_text(text_file.read_text().replace("a", "e", 1))
    processes = begin_ranks(tmp_path / "run", tiny, AnotherTextOnRank1(other))
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [1, 1]
    assert "rank 1 does not read the text that rank 0 does" in (tmp_path / "run.log").read_text()
