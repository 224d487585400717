"""AG News: the authors' files and no others, from a folder or a server, whole or not at all."""

from __future__ import annotations

import gc
import hashlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from charlm import ag_news
from charlm.config import DataConfig
from charlm.corpus import load_corpus
from charlm.errors import InputError


def rows(split: str, number: int) -> bytes:
    return "".join(f'"{i % 4 + 1}","{split} title {i}","what {i} is about"\n' for i in range(number)).encode()


# pooch leaves the connection of a download that failed to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:.*socket:pytest.PytestUnraisableExceptionWarning")

FILES = {"train": rows("train", 200), "test": rows("test", 30)}


@pytest.fixture(autouse=True)
def _our_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(ag_news, "MD5", {split: hashlib.md5(content).hexdigest() for split, content in FILES.items()})
    yield
    gc.collect()  # here, where the warning is expected


Config = Callable[..., DataConfig]


@pytest.fixture(scope="session")
def config(data_config: Config) -> Config:
    """Return a function from a folder (None: to download) and a cache to a configuration that keeps articles apart."""
    return lambda path, cache, **settings: data_config(
        "ag_news", path=path and str(path), cache_dir=str(cache), separator=None, **settings
    )


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, bytes], int], None]]:
    """Return a function that serves files under these contents, each body cut off `short` bytes before its end."""
    servers: list[HTTPServer] = []

    def start(contents: dict[str, bytes], short: int = 0) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                content = contents.get(self.path.strip("/"))
                self.send_response(200 if content is not None else 404)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                self.wfile.write((content or b"")[: len(content or b"") - short])

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        monkeypatch.setattr(ag_news, "URL", f"http://127.0.0.1:{server.server_port}/")

    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def left_behind(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() or not any(path.iterdir())]


def lay(folder: Path, prefix: str = "", **contents: bytes) -> Path:
    folder.mkdir()
    for split, content in (FILES | contents).items():
        (folder / f"{prefix}{split}.csv").write_bytes(content)
    return folder


@pytest.mark.parametrize("prefix", ["", "ag_news_"])
def test_files_in_a_folder_are_read_without_a_network(
    tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    monkeypatch.setattr(ag_news, "URL", "http://127.0.0.1:1/")
    corpus = load_corpus(config(lay(tmp_path / "files", prefix), tmp_path / "cache"))
    decode = corpus.vocabulary.decode
    texts = {
        split: {decode(corpus.block[a:b].tolist()) for a, b in segments} for split, segments in corpus.segments.items()
    }
    assert {split: len(documents) for split, documents in texts.items()} == {"train": 178, "val": 22, "test": 30}
    assert texts["train"] | texts["val"] == {f"train title {i} what {i} is about" for i in range(200)}
    assert all(document.startswith("test") or "<unk>" in document for document in texts["test"])
    assert not (tmp_path / "cache").exists()


def test_val_is_drawn_by_the_split_seed(tmp_path: Path, config: Config) -> None:
    folder = lay(tmp_path / "files")
    one, again, other = (load_corpus(config(folder, tmp_path, split_seed=seed)) for seed in (0, 0, 1))
    assert one.block.tobytes() == again.block.tobytes() != other.block.tobytes()


def test_another_file_under_the_name_is_refused(tmp_path: Path, config: Config) -> None:
    folder = lay(tmp_path / "files", test=FILES["test"][:-1])
    with pytest.raises(InputError, match=r"is not AG News' test file: its MD5 sum is .*data=csv"):
        load_corpus(config(folder, tmp_path / "cache"))


def test_a_missing_file_is_named(tmp_path: Path, config: Config) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no train.csv of AG News; leave data.path out"):
        load_corpus(config(tmp_path / "empty", tmp_path / "cache"))


def test_a_download_is_verified_kept_and_not_repeated(
    tmp_path: Path, config: Config, serve: Callable[..., None]
) -> None:
    serve({f"{split}.csv": content for split, content in FILES.items()})
    first = load_corpus(config(None, tmp_path))
    assert sorted(left_behind(tmp_path)) == ["ag_news/test.csv", "ag_news/train.csv"]
    serve({})
    assert load_corpus(config(None, tmp_path)).block.tobytes() == first.block.tobytes()


@pytest.mark.parametrize(
    ("served", "short", "message"),
    [
        ({"train.csv": FILES["train"] + b"x"}, 0, "what came has another MD5 sum"),
        ({"train.csv": FILES["train"][:-1]}, 0, "what came has another MD5 sum"),
        ({"train.csv": FILES["train"]}, 100, "cannot download"),  # the server closes early
        ({}, 0, "404"),
    ],
)
def test_a_bad_download_is_one_line_and_leaves_nothing(
    tmp_path: Path, config: Config, serve: Callable[..., None], served: dict[str, bytes], short: int, message: str
) -> None:
    serve(served, short)
    with pytest.raises(InputError, match=message) as refusal:
        load_corpus(config(None, tmp_path))
    assert "\n" not in str(refusal.value)
    assert "data.path=FOLDER" in str(refusal.value)
    assert left_behind(tmp_path) == []


def test_no_server_is_one_line(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ag_news, "URL", "http://127.0.0.1:1/")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(InputError, match="cannot download"):
        load_corpus(config(None, tmp_path))
    assert left_behind(tmp_path) == []
