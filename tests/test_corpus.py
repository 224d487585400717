"""From a source's documents to splits of one block."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from charlm.config import DataConfig, TrainConfig
from charlm.corpus import Corpus, load_corpus
from charlm.errors import InputError
from charlm.sources import SPLITS
from charlm.vocabulary import UNKNOWN

Composed = Callable[..., TrainConfig]


@pytest.fixture
def config(composed: Composed, tmp_path: Path) -> Callable[..., DataConfig]:
    """Return a function from files' contents and overrides to a data configuration that reads them."""

    def make(files: dict[str, str | bytes], *overrides: str, data: str = "text") -> DataConfig:
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        path_given = any(override.startswith("data.path") for override in overrides)
        path = [] if path_given else [f"data.path={tmp_path}"]
        return composed(f"data={data}", *path, *overrides).data

    return make


def texts(corpus: Corpus) -> dict[str, list[str]]:
    """Return the text of each split, segment by segment."""
    return {
        split: [corpus.vocabulary.decode(corpus.block[start:stop]) for start, stop in corpus.segments[split]]
        for split in SPLITS
    }


def test_contiguous_splits_together_are_the_text(config: Callable[..., DataConfig]) -> None:
    text = "abcdefghij" * 10
    corpus = load_corpus(config({"a.txt": text}))
    split = texts(corpus)
    assert [len(split[name][0]) for name in SPLITS] == [80, 10, 10]
    assert "".join(split[name][0] for name in SPLITS) == text


def test_at_both_ends_the_training_text_reaches_to_the_test(config: Callable[..., DataConfig]) -> None:
    text = "".join(chr(97 + i % 26) for i in range(100))
    corpus = load_corpus(config({"a.txt": text}, "data.split=ends"))
    split = texts(corpus)
    assert [len(split[name][0]) for name in ("val", "train", "test")] == [10, 80, 10]
    assert split["val"][0] + split["train"][0] + split["test"][0] == text


def test_the_vocabulary_is_that_of_the_training_split(config: Callable[..., DataConfig]) -> None:
    corpus = load_corpus(config({"a.txt": "a" * 80 + "ab" * 5 + "c" * 10}))
    assert corpus.vocabulary.symbols == [UNKNOWN, "a"]
    assert corpus.unknown == {"train": 0, "val": 5, "test": 10}


def test_files_of_a_folder_are_joined_in_order_by_the_separator(config: Callable[..., DataConfig]) -> None:
    files = {"b.txt": "two", "a/x.txt": "one", ".hidden": "no", "c.txt": "three"}
    corpus = load_corpus(config(files, 'data.separator="|"', "data.fractions=[0.5,0.5,0]"))
    assert "".join(corpus.vocabulary.decode(corpus.block)) == f"one|two|t{UNKNOWN * 2}ee"


def test_end_closes_every_document(config: Callable[..., DataConfig]) -> None:
    corpus = load_corpus(
        config({"a.txt": "aba", "b.txt": "bab"}, "data.separator='<eos>'", "data.fractions=[0.5,0.5,0]")
    )
    assert corpus.vocabulary.decode(corpus.block) == "aba<eos>bab<eos>"
    assert corpus.block[3] == corpus.vocabulary.end_id


def test_without_a_separator_each_document_is_a_segment(config: Callable[..., DataConfig]) -> None:
    files = {f"{i}.txt": "abc" * 3 for i in range(10)}
    corpus = load_corpus(config(files, "data.separator=null"))
    assert texts(corpus) == {"train": ["abc" * 3] * 8, "val": ["abc" * 3], "test": ["abc" * 3]}


def test_splitting_by_document_cuts_none(config: Callable[..., DataConfig]) -> None:
    documents = [f"<{i:03}{'x' * i}>" for i in range(40)]
    files = {f"{i:03}.txt": text for i, text in enumerate(documents)}
    corpus = load_corpus(config(files, "data.split=documents", "data.separator=null"))
    found = [segment for split in texts(corpus).values() for segment in split]
    assert sorted(segment.replace(UNKNOWN, "?")[-1] for segment in found) == [">"] * 40
    assert sum(corpus.characters(split) for split in SPLITS) == sum(map(len, documents))
    assert 0.7 < corpus.characters("train") / len(corpus.block) < 0.9


def test_another_split_seed_draws_other_documents(config: Callable[..., DataConfig]) -> None:
    files = {f"{i}.txt": chr(97 + i) * 10 for i in range(20)}
    first, second = (
        load_corpus(config(files, "data.split=documents", f"data.split_seed={seed}")).vocabulary.symbols
        for seed in (0, 1)
    )
    assert first != second


def test_newlines_and_byte_order_marks_stay(config: Callable[..., DataConfig]) -> None:
    text = "\ufeffone\r\ntwo\rthree\n" * 10
    corpus = load_corpus(config({"a.txt": text}))
    assert corpus.vocabulary.decode(corpus.block) == text


def test_latin_1_reads_bytes_one_character_each(config: Callable[..., DataConfig]) -> None:
    content = bytes(range(256)) * 4
    corpus = load_corpus(config({"a.bin": content}, "data.encoding=latin-1"))
    assert corpus.vocabulary.decode(corpus.block).encode("latin-1") == content


def test_bytes_per_character_is_that_of_utf_8(config: Callable[..., DataConfig]) -> None:
    train = "aé红👩" * 10
    corpus = load_corpus(config({"a.txt": train + "éaaa" + "aaaa"}, "data.fractions=[0.8333333,0.0833333,0.0833334]"))
    assert corpus.bytes_per_character == {"train": (1 + 2 + 3 + 4) / 4, "val": 5 / 4, "test": 1.0}


def test_a_table_gives_a_document_a_row(config: Callable[..., DataConfig]) -> None:
    rows = '"3","Title, one","Said ""x""."\n"1","Two","Line\nbreak"\n'
    corpus = load_corpus(config({"ag.csv": rows}, "data.fractions=[0.5,0.5,0]", data="csv"))
    assert len(corpus.block) == len('Title, one Said "x".\nTwo Line\nbreak')
    assert corpus.vocabulary.decode(corpus.block).startswith("Title, one Said")


def test_columns_are_chosen_by_name(config: Callable[..., DataConfig]) -> None:
    table = "id;text\n1;abab\n2;baba\n"
    given = ("data.header=true", "data.columns=[text]", "data.delimiter=';'", "data.fractions=[0.5,0.5,0]")
    corpus = load_corpus(config({"t.csv": table}, *given, data="csv"))
    assert corpus.vocabulary.decode(corpus.block).replace(UNKNOWN, "\n") == "abab\nbaba"


def test_pythons_own_reference_is_there(composed: Composed) -> None:
    corpus = load_corpus(composed("data=python_docs").data)
    assert corpus.characters("train") > 300_000
    assert "statement" in corpus.vocabulary.decode(corpus.block[:100_000])


@pytest.mark.parametrize(
    ("files", "overrides", "says"),
    [
        ({"a.txt": ""}, (), "holds no text"),
        ({".hidden": "x"}, (), "a folder without a file"),
        ({}, ("data.path=nowhere.txt",), "nowhere.txt does not exist"),
        ({}, ("data.path=*.nothing",), "matches no file"),
        ({"a.txt": b"ab\xff"}, (), r"byte 0xff at offset 2.*data\.encoding"),
        ({"a.txt": "x"}, ("data.encoding=klingon",), "no encoding that Python knows"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused(
    config: Callable[..., DataConfig], files: dict[str, str | bytes], overrides: tuple[str, ...], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        load_corpus(config(files, *overrides))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("data.columns=[5]",), "line 1 has 2 columns"),
        (("data.columns=[text]",), "read without a header"),
        (("data.columns=[text]", "data.header=true"), "its header names one, two"),
    ],
)
def test_a_column_that_is_not_there_is_refused(
    config: Callable[..., DataConfig], overrides: tuple[str, ...], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        load_corpus(config({"t.csv": "one,two\n1,2\n"}, *overrides, data="csv"))
