"""Hugging Face's datasets: read from local files, saved folders and streams, with the library's own code, offline."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from charlm.config import DataConfig
from charlm.corpus import Corpus, load_corpus
from charlm.errors import InputError
from charlm.sources import SPLITS, find_source

HERE = importlib.util.find_spec("datasets") is not None
needs_datasets = pytest.mark.skipif(not HERE, reason="needs Hugging Face's datasets: pip install -e '.[huggingface]'")

Config = Callable[..., DataConfig]
ROWS = {"train": 90, "validation": 20, "test": 10, "unsupervised": 5}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: Any) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset as the Hub lays it: a file for each split."""
    place = tmp_path / "dataset"
    (place / "data").mkdir(parents=True)
    for split, number in ROWS.items():
        rows = [{"title": f"{split} {i}", "text": f"text {i} of {split}", "label": i} for i in range(number)]
        (place / "data" / f"{split}-00000-of-00001.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture
def config(data_config: Config, tmp_path: Path) -> Config:
    """Return a function from a path and settings to a configuration that keeps documents apart."""

    def make(path: object, **settings: Any) -> DataConfig:
        given = {"path": str(path), "cache_dir": str(tmp_path / "cache"), "separator": None, **settings}
        return data_config("huggingface", **given)

    return make


def documents(corpus: Corpus) -> dict[str, list[str]]:
    decode = corpus.vocabulary.decode
    return {split: [decode(corpus.block[a:b].tolist()) for a, b in corpus.segments[split]] for split in SPLITS}


@needs_datasets
@pytest.mark.parametrize("streaming", [False, True])
def test_a_folders_own_splits_are_read_by_their_names(folder: Path, config: Config, streaming: bool) -> None:
    found = documents(load_corpus(config(folder, streaming=streaming)))
    assert {split: len(texts) for split, texts in found.items()} == {"train": 90, "val": 20, "test": 10}
    assert found["train"] == [f"text {i} of train" for i in range(90)]


@needs_datasets
def test_columns_are_joined_and_splits_are_chosen(folder: Path, config: Config) -> None:
    chosen = {"train": "unsupervised", "val": "train[:10%]", "test": "test"}
    found = documents(load_corpus(config(folder, columns=["title", "text"], splits=chosen)))
    assert found["train"] == [f"unsupervised {i} text {i} of unsupervised" for i in range(5)]
    assert [len(found[split]) for split in ("val", "test")] == [9, 10]


@needs_datasets
def test_a_table_of_one_split_gives_val_and_test_of_its_rows(tmp_path: Path, config: Config) -> None:
    table = tmp_path / "table.csv"
    table.write_text("text,label\n" + "".join(f"row {i},{i}\n" for i in range(100)))
    found = documents(load_corpus(config("csv", files=str(table))))
    assert {split: len(texts) for split, texts in found.items()} == {"train": 80, "val": 10, "test": 10}
    assert {len(text) for texts in found.values() for text in texts} <= {*range(5, 26)}


@needs_datasets
def test_what_the_library_saved_is_read(tmp_path: Path, folder: Path, config: Config) -> None:
    import datasets

    whole = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    whole.save_to_disk(str(tmp_path / "saved"))
    whole["validation"].save_to_disk(str(tmp_path / "one"))
    assert documents(load_corpus(config(tmp_path / "saved")))["train"] == [f"text {i} of train" for i in range(90)]
    one = load_corpus(config(tmp_path / "one", split="contiguous"))
    assert len(one.block) == sum(len(f"text {i} of validation") for i in range(20))


@needs_datasets
@pytest.mark.parametrize("streaming", [False, True])
def test_only_so_many_documents_of_each_split(folder: Path, config: Config, streaming: bool) -> None:
    found = documents(load_corpus(config(folder, streaming=streaming, documents=7)))
    assert {split: len(texts) for split, texts in found.items()} == {"train": 7, "val": 7, "test": 7}


@needs_datasets
def test_a_stream_is_encoded_once_and_anew_when_it_changes(folder: Path, tmp_path: Path, config: Config) -> None:
    settings = config(folder, streaming=True)
    first = load_corpus(settings)
    assert bytes(load_corpus(settings).block) == bytes(first.block)
    blocks = tmp_path / "cache" / "blocks"
    assert len([path for path in blocks.iterdir() if path.is_dir()]) == 1
    digests = {find_source(settings).digest()}
    [train] = folder.glob("data/train-*")
    train.write_text(train.read_text().replace("text 0 of", "TEXT 0 of"))
    digests.add(find_source(settings).digest())
    assert len(digests) == 2
    assert "TEXT 0 of train" in documents(load_corpus(settings))["train"]


@needs_datasets
def test_a_row_without_text_is_left_out(tmp_path: Path, config: Config) -> None:
    rows = [{"text": None if i % 2 else f"row {i}"} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = documents(load_corpus(config("json", files=str(tmp_path / "rows.jsonl"), fractions=[0.5, 0.5, 0.0])))
    assert sum(map(len, found.values())) == 20


@needs_datasets
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"columns": ["body"]}, r"has no body; it has title, text, label"),
        ({"columns": ["label"]}, r"is no text but int; choose a column of text"),
        ({"splits": {"train": "tran"}}, "tran"),
        ({"splits": {"train": "tran"}, "streaming": True}, "has no tran; it has train, validation, test, unsupervised"),
        ({"path": "csv", "files": "none.csv"}, "none.csv.*it names a dataset of the Hub, a local folder"),
        ({"path": "nowhere/at_all_here"}, "cannot read data.path=nowhere/at_all_here"),
    ],
)
def test_what_is_not_there_is_one_line(
    folder: Path, config: Config, settings: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # not to be tried again five times
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=says) as refusal:
        load_corpus(config(**{"path": folder, **settings}))
    assert "\n" not in str(refusal.value)


@needs_datasets
def test_a_script_of_a_dataset_is_not_run(tmp_path: Path, config: Config) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "dataset.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(InputError):
        load_corpus(config(tmp_path / "dataset"))
    assert not (tmp_path / "ran").exists()


def test_without_the_library_asking_for_it_names_the_remedy(monkeypatch: pytest.MonkeyPatch, config: Config) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs the library datasets .* install it: .*'\.\[huggingface\]'"):
        find_source(config("owner/name"))
