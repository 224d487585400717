"""Large texts: encoded once, whoever asks, and never half."""

from __future__ import annotations

import errno
import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from charlm import corpus as corpus_module
from charlm import encoding
from charlm.cache import cached_block
from charlm.config import DataConfig
from charlm.corpus import Corpus, load_corpus
from charlm.errors import InputError

Config = Callable[..., DataConfig]


@pytest.fixture(scope="session")
def config(data_config: Config) -> Config:
    """Return a function from a path of text and a cache to a configuration."""
    return lambda path, cache, **settings: data_config("text", path=str(path), cache_dir=str(cache), **settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of ASCII, of many characters, and of more than a narrow type can number."""
    draw = np.random.default_rng(0)
    place = tmp_path / "texts"
    place.mkdir()
    for i, top in enumerate((0x7F, 0x7F, 0x400, 0x2000, 0x7F)):
        codes = draw.integers(0x20, top, 5000)
        (place / f"{i}.txt").write_text("".join(map(chr, codes)), encoding="utf-8")
    return place


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every text counts as large, and takes many chunks."""
    monkeypatch.setattr(corpus_module, "CACHED_FROM", 0)
    monkeypatch.setattr(encoding, "CHUNK", 777)


def same(one: Corpus, other: Corpus) -> bool:
    return (
        one.vocabulary.symbols == other.vocabulary.symbols
        and np.array_equal(one.block, other.block)
        and one.segments == other.segments
        and one.unknown == other.unknown
        and one.identity == other.identity
        and one.bytes_per_character == other.bytes_per_character
    )


@pytest.mark.parametrize("split", ["contiguous", "documents", "stream_tail"])
@pytest.mark.parametrize("separator", ["--", "<eos>", None])
def test_a_block_on_disk_is_the_one_in_memory(
    tmp_path: Path, config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch, split: str, separator: str | None
) -> None:
    settings = config(folder, tmp_path / "cache", split=split, separator=separator)
    in_memory = load_corpus(settings)
    monkeypatch.setattr(corpus_module, "CACHED_FROM", 0)
    monkeypatch.setattr(encoding, "CHUNK", 777)
    built, found = load_corpus(settings), load_corpus(settings)
    assert isinstance(found.block, np.memmap)
    assert same(in_memory, built)
    assert same(in_memory, found)


def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path | None]:
    seen: list[Path | None] = []
    build = corpus_module._build

    def counted(source: Any, file: Path | None) -> Any:
        seen.append(file)
        return build(source, file)

    monkeypatch.setattr(corpus_module, "_build", counted)
    return seen


@pytest.mark.usefixtures("large")
def test_text_and_settings_alone_decide_which_block(
    tmp_path: Path, config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = builds(monkeypatch)
    cache = tmp_path / "cache"
    load_corpus(config(folder, cache))
    load_corpus(config(folder.rename(tmp_path / "moved"), cache, window=20, stride=3, batch_size=8))
    assert len(seen) == 1
    moved = tmp_path / "moved"
    for changes in ({"split": "documents"}, {"separator": None}, {"fractions": [0.5, 0.3, 0.2]}):
        load_corpus(config(moved, cache, **changes))
    load_corpus(config(moved, cache, split="stream_tail"))
    load_corpus(config(moved, cache, split="stream_tail", batch_size=8))
    assert len(seen) == 6
    content = (moved / "0.txt").read_text()
    (moved / "0.txt").write_text(content[:-1] + "é")
    assert load_corpus(config(moved, cache)).block.size
    assert len(seen) == 7


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("harm", ["cut", "changed", "no facts", "half facts", "no block", "left over"])
def test_a_torn_block_is_noticed_and_built_again(tmp_path: Path, config: Config, folder: Path, harm: str) -> None:
    settings = config(folder, tmp_path / "cache")
    whole = load_corpus(settings)
    expected = np.array(whole.block)
    [place] = (p for p in (tmp_path / "cache" / "blocks").iterdir() if p.is_dir())
    block, facts = place / "block.bin", place / "corpus.json"
    if harm == "cut":
        block.write_bytes(block.read_bytes()[:-1])
    elif harm == "changed":
        content = bytearray(block.read_bytes())
        content[len(content) // 2] ^= 1
        block.write_bytes(content)
    elif harm == "no facts":
        facts.unlink()
    elif harm == "half facts":
        facts.write_text(facts.read_text()[:50])
    elif harm == "no block":
        block.unlink()
    else:  # a job was killed while it built
        place.rename(place.with_name(place.name + ".building"))
    assert np.array_equal(load_corpus(settings).block, expected)
    assert {p.name for p in place.iterdir()} == {"block.bin", "corpus.json"}
    assert not place.with_name(place.name + ".building").exists()


def _build_slowly(folder: Path, started: Any, finished: Any) -> None:
    def build(file: Path) -> dict[str, Any]:
        with started.get_lock():
            started.value += 1
        finished.wait(0.5)  # long enough for the others to come and find no block yet
        np.arange(100, dtype=np.uint8).tofile(file)
        return {"dtype": "uint8", "length": 100}

    block, _ = cached_block(folder, "key", build)
    assert block.sum() == 4950


def test_jobs_that_start_together_build_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    started, never = context.Value("i", 0), context.Event()
    jobs = [context.Process(target=_build_slowly, args=(tmp_path, started, never)) for _ in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert [job.exitcode for job in jobs] == [0] * 4
    assert started.value == 1


def test_a_build_that_fails_leaves_no_block_and_is_tried_again(tmp_path: Path) -> None:
    def full(file: Path) -> dict[str, Any]:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(InputError, match=r"No space left on device; set data.cache_dir=FOLDER"):
        cached_block(tmp_path, "key", full)
    assert [p.name for p in (tmp_path / "blocks").iterdir() if p.suffix != ".lock"] == []

    def well(file: Path) -> dict[str, Any]:
        file.write_bytes(b"abc")
        return {"dtype": "uint8", "length": 3}

    assert bytes(cached_block(tmp_path, "key", well)[0]) == b"abc"


@pytest.mark.usefixtures("large")
def test_bad_text_leaves_no_block(tmp_path: Path, config: Config) -> None:
    (tmp_path / "bad.txt").write_bytes(b"well " * 1000 + b"\xff")
    with pytest.raises(InputError, match="offset 5000"):
        load_corpus(config(tmp_path / "bad.txt", tmp_path / "cache"))
    assert [p.name for p in (tmp_path / "cache" / "blocks").iterdir() if p.suffix != ".lock"] == []


@pytest.mark.usefixtures("large")
def test_training_on_a_mapped_block_never_writes_to_it(tmp_path: Path, config: Config, folder: Path) -> None:
    settings = config(folder, tmp_path / "cache")
    found = load_corpus(settings)
    before = np.array(found.block)
    found.block[:100] = 1
    assert np.array_equal(load_corpus(settings).block, before)


def test_a_small_text_leaves_nothing_in_the_cache(tmp_path: Path, config: Config, folder: Path) -> None:
    load_corpus(config(folder, tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.usefixtures("large")
def test_facts_are_plain_json(tmp_path: Path, config: Config, folder: Path) -> None:
    load_corpus(config(folder, tmp_path / "cache"))
    [facts] = (tmp_path / "cache" / "blocks").glob("*/corpus.json")
    assert json.loads(facts.read_text())["symbols"][0] == "<unk>"
