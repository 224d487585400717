"""Any text in: files of every kind, tables, splits, Unicode."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm import tqdm

from charlm import corpus as corpus_module
from charlm import sources
from charlm.config import DataConfig
from charlm.corpus import Corpus, load_corpus
from charlm.encoding import encode
from charlm.errors import InputError
from charlm.sources import SPLITS, Piece
from charlm.vocabulary import Vocabulary, code_points

Load = Callable[..., Corpus]


@pytest.fixture(scope="session")
def load(data_config: Callable[..., DataConfig]) -> Load:
    """Return a function that loads a source from a path."""
    return lambda source, path, **settings: load_corpus(data_config(source, path=str(path), **settings))


def written(corpus: Corpus) -> str:
    return corpus.vocabulary.decode(corpus.block.tolist())


# --- characters ---------------------------------------------------------------------------------------------------


@given(st.text())
def test_decoding_gives_back_any_text(content: str) -> None:
    vocabulary = Vocabulary.of(code_points(content))
    assert vocabulary.decode(vocabulary.encode(content).tolist()) == content


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=20), st.integers(1, 7))
def test_a_file_comes_back_wherever_its_chunks_are_cut(
    tmp_path_factory: pytest.TempPathFactory, load: Load, content: str, chunk: int
) -> None:
    path = tmp_path_factory.mktemp("any") / "text.txt"
    path.write_bytes(content.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "_CHUNK", chunk)
        corpus = load("text", path, fractions=[0.9, 0.1, 0.0])
    kept = set(content[: corpus.segments["train"][-1][1]])
    assert written(corpus) == "".join(c if c in kept else "<unk>" for c in content)


@pytest.mark.parametrize("content", ["e\u0301 a\u0308 " * 9, "👩‍👩‍👧‍👦🇩🇪 " * 9, "\ufeffwith a mark\r\nand\rall\n" * 3])
def test_combining_marks_emoji_byte_order_marks_and_line_ends_are_kept(
    tmp_path: Path, load: Load, content: str
) -> None:
    (tmp_path / "text.txt").write_bytes(content.encode())
    corpus = load("text", tmp_path / "text.txt")
    assert written(corpus)[: len(content) // 2] == content[: len(content) // 2]
    assert len(corpus.block) == len(content)


def test_half_a_character_is_refused(tmp_path: Path, load: Load) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "all is well"}\n{"text": "half \\ud83d"}\n')
    with pytest.raises(InputError, match=r"lone surrogate U\+D83D at character 5"):
        load("jsonl", tmp_path / "rows.jsonl")


def test_a_large_alphabet_takes_a_wider_type_midway(tmp_path: Path, load: Load) -> None:
    content = "ab" * 200 + "".join(map(chr, range(0x4E00, 0x4E00 + 40_000 // 2))) + "ab" * 20_000
    (tmp_path / "text.txt").write_text(content, encoding="utf-8")
    corpus = load("text", tmp_path / "text.txt")
    assert written(corpus) == content
    assert len(corpus.vocabulary) == 20_000 + 3


@pytest.mark.parametrize("chunk", [1, 2, 3, 2**20])
def test_a_wrong_byte_is_named_by_its_place_in_the_file(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(sources, "_CHUNK", chunk)
    (tmp_path / "text.txt").write_bytes("añ€😀".encode() + b"\xff rest")
    with pytest.raises(InputError, match=r"byte 0xff at offset 10; .*data.encoding"):
        load("text", tmp_path / "text.txt")


# --- files --------------------------------------------------------------------------------------------------------

PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".zst": zstandard.compress}


@pytest.mark.parametrize("suffix", PACK)
def test_a_compressed_file_is_the_text_in_it(tmp_path: Path, load: Load, suffix: str) -> None:
    content = "Once upon a time, é, 中.\n" * 100
    (tmp_path / "plain.txt").write_text(content, encoding="utf-8")
    # Two parts one behind the other are one file to each of these programs.
    half = len(content) // 2
    packed = tmp_path / f"packed.txt{suffix}"
    packed.write_bytes(PACK[suffix](content[:half].encode()) + PACK[suffix](content[half:].encode()))
    assert written(load("text", packed)) == written(load("text", tmp_path / "plain.txt")) == content


@pytest.mark.parametrize("suffix", PACK)
def test_a_compressed_file_that_is_cut_off_or_not_one_is_refused(tmp_path: Path, load: Load, suffix: str) -> None:
    whole = PACK[suffix](np.random.default_rng(0).integers(97, 123, 400_000).astype(np.uint8).tobytes())
    path = tmp_path / f"text{suffix}"
    for content in (whole[: len(whole) // 2], b"not compressed at all"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=str(path)):
            load("text", path)


@pytest.mark.parametrize("suffix", PACK)
def test_a_compressed_file_that_unpacks_without_end_is_refused(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    monkeypatch.setattr(sources, "_HARMLESS", 10_000)
    path = tmp_path / f"text{suffix}"
    path.write_bytes(PACK[suffix](b"a" * 2**20))
    with pytest.raises(InputError, match=r"unpacks to more than 100 times its size.*set data.max_expansion higher"):
        load("text", path)
    path.write_bytes(PACK[suffix](b"a" * 5_000))
    assert len(load("text", path).block) == 5_000  # little is never too much
    path.write_bytes(PACK[suffix](b"a" * 2**20))
    assert len(load("text", path, max_expansion=1e6).block) == 2**20


def test_rows_of_any_length_are_read_across_chunks(tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [["1", f"title {i}", 'say "hi",\nthen go ' * (i % 5)] for i in range(60)]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    whole = written(load("csv", tmp_path / "rows.csv"))
    monkeypatch.setattr(sources, "_CHUNK", 5)
    assert written(load("csv", tmp_path / "rows.csv")) == whole
    assert whole[:400] == "\n".join(" ".join(row[1:]) for row in rows)[:400]


def test_a_field_of_each_json_line_is_a_document(tmp_path: Path, load: Load) -> None:
    path = tmp_path / "rows.jsonl.gz"
    rows = [{"id": i, "text": f"line {i}\nof two"} for i in range(20)]
    path.write_bytes(gzip.compress("\n\n".join(map(json.dumps, rows)).encode()))
    assert written(load("jsonl", path)) == "\n".join(str(row["text"]) for row in rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{'text': 1}", "line 1 is not JSON"),
        ('{"text": "a"}\n[1]', "line 2 has no text in the field 'text': it is no JSON object"),
        ('{"body": "a", "id": 1}', "its fields are body, id; set data.field"),
        ('{"text": 3}', "line 1 has no text"),
    ],
)
def test_a_json_line_without_the_text_is_refused(tmp_path: Path, load: Load, content: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        load("jsonl", tmp_path / "rows.jsonl")


# --- splits -------------------------------------------------------------------------------------------------------


def splits(corpus: Corpus) -> dict[str, str]:
    return {
        split: "".join(corpus.vocabulary.decode(corpus.block[a:b].tolist()) for a, b in corpus.segments[split])
        for split in SPLITS
    }


@pytest.mark.parametrize("split", ["contiguous", "documents", "stream_tail"])
@pytest.mark.parametrize("separator", ["\n", "<eos>", None, ""])
def test_every_character_is_in_one_split(tmp_path: Path, load: Load, split: str, separator: str | None) -> None:
    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_text(f"document {i} " * (i + 1))
    corpus = load("text", tmp_path, split=split, separator=separator)
    covered = sorted(segment for segments in corpus.segments.values() for segment in segments)
    assert [a for a, _ in covered] == [0, *(b for _, b in covered[:-1])]
    assert covered[-1][1] == len(corpus.block)
    assert all(corpus.segments.values())


def test_a_stream_tail_is_the_end_of_every_row(tmp_path: Path, load: Load) -> None:
    content = "".join(chr(97 + i % 26) for i in range(1000))
    (tmp_path / "text.txt").write_text(content)
    corpus = load("text", tmp_path / "text.txt", split="stream_tail", batch_size=4)
    assert corpus.segments == {
        "train": [(0, 200), (250, 450), (500, 700), (750, 950)],
        "val": [(200, 225), (450, 475), (700, 725), (950, 975)],
        "test": [(225, 250), (475, 500), (725, 750), (975, 1000)],
    }
    assert written(corpus) == content


def test_what_training_never_saw_is_counted_and_unknown(tmp_path: Path, load: Load) -> None:
    (tmp_path / "text.txt").write_text("ab" * 400 + "abxyab" + "ab" * 47 + "abéab" * 20)
    corpus = load("text", tmp_path / "text.txt")
    assert corpus.vocabulary.symbols == ["<unk>", "a", "b"]
    assert corpus.unknown == {"train": 0, "val": 2, "test": 20}
    assert corpus.bytes_per_character == {"train": 1.0, "val": 1.0, "test": 1.2}
    assert splits(corpus)["test"] == "ab<unk>ab" * 20


def test_a_source_without_splits_of_its_own_says_so(tmp_path: Path, load: Load) -> None:
    (tmp_path / "text.txt").write_text("text " * 50)
    with pytest.raises(InputError, match=r"data=text has no splits of its own; choose contiguous"):
        load("text", tmp_path / "text.txt", split="source")


def test_a_source_without_val_or_test_gives_them_of_its_train(data_config: Callable[..., DataConfig]) -> None:
    config = data_config("text", path="x", split="source", separator=None, fractions=[0.8, 0.1, 0.1])
    for counts, expected in (
        ({"train": 100}, (80, 10, 10)),
        ({"train": 90, "val": 20}, (80, 20, 10)),
        ({"train": 9, "val": 8, "test": 7}, (9, 8, 7)),
    ):
        pieces = [Piece(f"{split} {i}", True, split) for split, number in counts.items() for i in range(number)]
        draft = encode(pieces, None, None, tqdm(disable=True))
        segments = corpus_module._split(draft, config)
        assert tuple(len(segments[split]) for split in SPLITS) == expected


def test_a_long_text_is_encoded_under_a_bar_that_says_how_fast(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("some text " * 1000)
    monkeypatch.setattr(corpus_module, "CACHED_FROM", 5000)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    load("text", tmp_path / "text.txt", cache_dir=str(tmp_path / "cache"))
    assert re.search(r"encoding: 100%.*10.0k/10.0k .*B/s\]", capsys.readouterr().err)
