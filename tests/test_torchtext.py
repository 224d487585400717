"""The bridge to torchtext: its datasets read from files laid as it lays them, its vocabularies, checkpoints across.

`make test-torchtext` runs all of this in an environment that has torchtext, and names the other one's Python in
CHARLM_OTHER_PYTHON. Elsewhere the first test runs alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import lzma
import os
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from charlm import torchtext_bridge
from charlm.config import TrainConfig
from charlm.corpus import Corpus, load_corpus
from charlm.errors import InputError
from charlm.sources import SPLITS

ROOT = Path(__file__).parent.parent
HERE = importlib.util.find_spec("torchtext") is not None
needs_torchtext = pytest.mark.skipif(not HERE, reason="needs torchtext: make test-torchtext")
# torchdata leaves files to the garbage collector, also those of a download that failed.
pytestmark = pytest.mark.filterwarnings("ignore:.*(file|socket):pytest.PytestUnraisableExceptionWarning")

Composed = Callable[..., TrainConfig]
Program = Callable[..., subprocess.CompletedProcess[str]]

SIZES = {"train": 200, "test": 30}
AG_NEWS = {split: [(f"{split} title {i}", f"what {i} is about") for i in range(n)] for split, n in SIZES.items()}


@pytest.mark.skipif(HERE, reason="torchtext is here")
@pytest.mark.parametrize("asked", ["data=torchtext", "data.vocabulary=torchtext"])
def test_without_torchtext_asking_for_it_is_one_line_with_the_remedy(
    asked: str, program: Program, tmp_path: Path
) -> None:
    done = program("train.py", asked)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert f"{asked} needs torchtext 0.18" in done.stderr
    assert "make setup-torchtext" in done.stderr
    assert list(tmp_path.iterdir()) == []


def lay(folder: Path, dataset: str, name: str, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lay a file where torchtext would download it to, and have its sum expected."""
    path = folder / "datasets" / dataset / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    module = torchtext_bridge.load(f"datasets.{dataset.lower()}", "this test")
    found = hashlib.md5(content).hexdigest()
    if isinstance(module.MD5, dict):
        monkeypatch.setitem(module.MD5, name.split(".")[0], found)
    elif module.MD5:
        monkeypatch.setattr(module, "MD5", found)


def zipped(files: dict[str, str]) -> bytes:
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


def tarred(files: dict[str, str]) -> bytes:
    packed = BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content.encode())
            archive.addfile(member, BytesIO(content.encode()))
    return packed.getvalue()


@pytest.fixture
def ag_news(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for split, rows in AG_NEWS.items():
        content = "".join(f'"3","{title}","{body}"\n' for title, body in rows).encode()
        lay(tmp_path / "root", "AG_NEWS", f"{split}.csv", content, monkeypatch)
    return tmp_path / "root"


def documents(corpus: Corpus) -> dict[str, list[str]]:
    """Return the documents of each split, where they are kept apart."""
    decode = corpus.vocabulary.decode
    return {split: [decode(corpus.block[a:b].tolist()) for a, b in corpus.segments[split]] for split in SPLITS}


def load(composed: Composed, root: Path, dataset: str, *overrides: str) -> Corpus:
    given = (f"data.dataset={dataset}", f"data.path={root}", "data.separator=null", "data.window=5")
    return load_corpus(composed("data=torchtext", *given, *overrides).data)


# --- datasets -----------------------------------------------------------------------------------------------------


@needs_torchtext
def test_ag_news_by_torchtext_is_ag_news(ag_news: Path, composed: Composed) -> None:
    found = documents(load(composed, ag_news, "AG_NEWS"))
    assert len(found["val"]) == round(200 / 9)
    assert sorted(found["train"] + found["val"]) == sorted(" ".join(row) for row in AG_NEWS["train"])
    assert [text.replace("<unk>", "s") for text in found["test"]] == [" ".join(row) for row in AG_NEWS["test"]]


@needs_torchtext
def test_an_archive_is_unpacked_and_its_three_splits_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, composed: Composed
) -> None:
    lines = {name: [f" = {name} {i} = \n" for i in range(20)] for name in ("train", "valid", "test")}
    archive = zipped({f"wikitext-2/wiki.{name}.tokens": "".join(text) for name, text in lines.items()})
    lay(tmp_path, "WikiText2", "wikitext-2-v1.zip", archive, monkeypatch)
    found = documents(load(composed, tmp_path, "WikiText2"))
    assert found["train"] == lines["train"]
    assert [len(found[split]) for split in SPLITS] == [20, 20, 20]


@needs_torchtext
def test_labels_are_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, composed: Composed) -> None:
    reviews = {
        f"aclImdb/{split}/{label}/{i}_1.txt": f"{label} film {i}"
        for split in SIZES
        for label in ("pos", "neg")
        for i in range(15)
    }
    lay(tmp_path, "IMDB", "aclImdb_v1.tar.gz", tarred(reviews), monkeypatch)
    found = documents(load(composed, tmp_path, "IMDB"))
    assert sorted(found["train"] + found["val"]) == sorted(text for name, text in reviews.items() if "/train/" in name)


@needs_torchtext
def test_sentences_in_words_are_joined_once_their_field_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, composed: Composed
) -> None:
    sentence = "The\tDET\nsea\tNOUN\nwaits\tVERB\n\n"
    archive = zipped({f"en-ud-v2/en-ud-tag.v2.{name}.txt": sentence * 20 for name in ("train", "dev", "test")})
    lay(tmp_path, "UDPOS", "en-ud-v2.zip", archive, monkeypatch)
    with pytest.raises(InputError, match=r"has 2 parts \(list, list\); choose .* with data.fields"):
        load(composed, tmp_path, "UDPOS")
    found = documents(load(composed, tmp_path, "UDPOS", "data.fields=[0]"))
    assert found["train"] == ["The sea waits"] * 20


@needs_torchtext
def test_a_dataset_without_splits_is_split_here_and_takes_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, composed: Composed
) -> None:
    lines = [f"linea {i} de cien" for i in range(100)]
    lay(tmp_path, "CC100", "es.txt.xz", lzma.compress("\n".join(lines).encode()), monkeypatch)
    given = ("data.options={language_code: es}", "data.fields=[1]")
    with pytest.raises(InputError, match="has no splits of its own; choose contiguous"):
        load(composed, tmp_path, "CC100", *given)
    found = documents(load(composed, tmp_path, "CC100", *given, "data.split=contiguous"))
    assert "".join("".join(found[split]) for split in SPLITS) == "".join(lines)


@needs_torchtext
@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("data.dataset=AG_NEWZ",), "AG_NEWZ is not one of torchtext's: AG_NEWS, AmazonReviewFull"),
        (("data.options={language: es}",), "AG_NEWS has no option language; it takes none"),
        (("data.dataset=CC100", "data.options={split: train}"), "no option split; it takes language_code"),
        (("data.fields=[7]",), r"has 2 parts \(int, str\); choose"),
        (("data.fields=[0]",), r"has 2 parts \(int, str\); choose"),
        (("data.path=nowhere",), "data.path=nowhere has no folder `datasets`"),
    ],
)
def test_what_torchtext_has_not_is_named(
    ag_news: Path, composed: Composed, overrides: tuple[str, ...], says: str
) -> None:
    given = [f"data.path={ag_news}", *overrides]
    with pytest.raises(InputError, match=says):
        load_corpus(composed("data=torchtext", *given).data)


@needs_torchtext
def test_a_failed_download_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, composed: Composed
) -> None:
    module = torchtext_bridge.load("datasets.cc100", "this test")
    monkeypatch.setattr(module, "URL", "http://127.0.0.1:1/%s.txt.xz")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(InputError, match=r"torchtext cannot read data.dataset=CC100: .*data.path=FOLDER") as refusal:
        load_corpus(composed("data=torchtext", "data.dataset=CC100", f"data.cache_dir={tmp_path / 'cache'}").data)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "cache").exists()


@needs_torchtext
def test_a_large_dataset_is_encoded_once_and_anew_when_its_files_change(
    ag_news: Path, tmp_path: Path, composed: Composed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("charlm.corpus.CACHED_FROM", 0)
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    whole = load(composed, ag_news, "AG_NEWS", cache)
    again = load(composed, ag_news, "AG_NEWS", cache)
    assert bytes(whole.block) == bytes(again.block)
    blocks = tmp_path / "cache" / "blocks"
    assert len([path for path in blocks.iterdir() if path.is_dir()]) == 1
    content = (ag_news / "datasets" / "AG_NEWS" / "train.csv").read_bytes().replace(b"title", b"story")
    lay(ag_news, "AG_NEWS", "train.csv", content, monkeypatch)
    assert "train story 1" in "".join(documents(load(composed, ag_news, "AG_NEWS", cache))["train"])
    assert len([path for path in blocks.iterdir() if path.is_dir()]) == 2


# --- vocabulary ---------------------------------------------------------------------------------------------------


@needs_torchtext
@pytest.mark.parametrize("split", ["contiguous", "documents", "stream_tail"])
@pytest.mark.parametrize("separator", ["\n", "<eos>"])
def test_torchtexts_vocabulary_is_the_one_it_makes_of_the_training_text(
    tmp_path: Path, composed: Composed, split: str, separator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("charlm.encoding.CHUNK", 97)
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text("".join(chr(0x61 + (i * 7 + j * j) % 60) for j in range(50)))
    given = ("data=text", f"data.path={tmp_path}", f"data.split={split}", f"data.separator='{separator}'")
    corpus = load_corpus(composed(*given, "data.vocabulary=torchtext").data)
    plain = load_corpus(composed(*given).data)
    ids = [i for a, b in plain.segments["train"] for i in plain.block[a:b].tolist()]
    counter = Counter(plain.vocabulary.symbols[i] for i in ids)
    vocab = torchtext_bridge.load("vocab", "this test")
    assert corpus.vocabulary.symbols == vocab.vocab(counter, specials=["<unk>"]).get_itos()
    assert corpus.vocabulary.symbols != plain.vocabulary.symbols
    assert corpus.vocabulary.decode(corpus.block.tolist()) == plain.vocabulary.decode(plain.block.tolist())


# --- programs -----------------------------------------------------------------------------------------------------


def ran(python: str, folder: Path, script: str, *arguments: str) -> str:
    """Run a program in an environment, and return what it printed."""
    command = [python, str(ROOT / script), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_torchtext
@pytest.mark.parametrize(
    ("vocabulary", "trained_here"), [("code_points", True), ("torchtext", True), ("code_points", False)]
)
def test_a_checkpoint_of_either_vocabulary_opens_in_either_environment(
    tmp_path: Path, tiny: list[str], vocabulary: str, trained_here: bool
) -> None:
    other = os.environ.get("CHARLM_OTHER_PYTHON")
    if not other:
        pytest.skip("needs the default environment beside: make test-torchtext")
    first, second = (sys.executable, other) if trained_here else (other, sys.executable)
    ran(first, tmp_path, "train.py", *tiny, f"data.vocabulary={vocabulary}", "hydra.run.dir=run")
    drawn = [
        ran(python, tmp_path, "sample.py", "checkpoint=run", "prompt=The ", "temperature=0", "length=20")
        for python in (first, second)
    ]
    assert drawn[0] == drawn[1]


@needs_torchtext
def test_a_network_trains_on_a_torchtext_dataset_and_goes_on_where_it_stopped(
    ag_news: Path, composed: Composed, tmp_path: Path
) -> None:
    from train import train

    small = ("data.window=20", "data.batch_size=8", "model.hidden_size=16", "trainer=cpu", "logger=csv")
    steps = ("trainer.max_steps=10", "trainer.val_check_interval=5", "sampling.length=10")
    given = ("data=torchtext", f"data.path={ag_news}", "data.vocabulary=torchtext", *small, *steps)
    loss = train(composed(*given), tmp_path / "run")
    result: dict[str, Any] = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["val/loss"]) == ("completed", loss)
    assert loss < 4
