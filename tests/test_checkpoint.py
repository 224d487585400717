"""A checkpoint file is whole and charlm's own, or it is refused: nothing in it runs, and it takes no more memory than
it has bytes.
"""

from __future__ import annotations

import io
import logging
import os
import random
import re
import resource
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from charlm.checkpoint import open_checkpoint, read_checkpoint
from charlm.config import TrainConfig
from charlm.errors import InputError
from train import train

Composed = Callable[..., TrainConfig]


@pytest.fixture(scope="module")
def run(composed: Composed, tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished small run."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    train(composed(*tiny), folder)
    return folder


@pytest.fixture(scope="module")
def content(run: Path) -> bytes:
    return (run / "checkpoints" / "last.ckpt").read_bytes()


@contextmanager
def little_memory() -> Iterator[None]:
    """Let this process take one gigabyte more than it has."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    saved = io.BytesIO(), io.BytesIO()
    for value, file in zip((first, second), saved, strict=True):
        torch.save(value, file)
    records = [{name: archive.read(name) for name in archive.namelist()} for archive in map(zipfile.ZipFile, saved)]
    return records[0] == records[1]


def test_a_changed_byte_is_noticed_or_means_nothing(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "changed.ckpt"
    path.write_bytes(content)
    whole, draw, noticed = read_checkpoint(path), random.Random(0), 0
    for place in draw.sample(range(len(content)), 150):
        changed = bytearray(content)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            assert equal(read_checkpoint(path), whole), place
        except InputError:
            noticed += 1
    assert noticed > 75


def test_a_torn_file_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "torn.ckpt"
    for length in (0, 1, 100, *random.Random(0).sample(range(len(content)), 20), len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=r"torn\.ckpt is not a checkpoint of charlm's"):
            read_checkpoint(path)


class Payload:
    """What pickle would run a command for."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("reader", [open_checkpoint, read_checkpoint])
def test_code_in_a_checkpoint_does_not_run(reader: Callable[[Path], Any], run: Path, tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.ckpt", tmp_path / "it-ran"
    inside = torch.load(run / "checkpoints" / "best.ckpt")
    torch.save({**inside, "extra": Payload(f"touch {trace}")}, path)
    torch.load(path, weights_only=False)
    assert trace.exists()  # the payload is real
    trace.unlink()
    with pytest.raises(InputError, match="such as code"):
        reader(path)
    assert not trace.exists()


def hyper(**model: Any) -> Callable[[dict[str, Any]], None]:
    def change(inside: dict[str, Any]) -> None:
        inside["hyper_parameters"]["model"].update(model)

    return change


def symbols(value: Any) -> Callable[[dict[str, Any]], None]:
    def change(inside: dict[str, Any]) -> None:
        inside["hyper_parameters"]["symbols"] = value

    return change


def weight(value: torch.Tensor) -> Callable[[dict[str, Any]], None]:
    def change(inside: dict[str, Any]) -> None:
        inside["state_dict"]["network.output.weight"] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        hyper(num_layers=-1),
        hyper(num_layers=10**9),
        hyper(hidden_size=-5),
        hyper(hidden_size=10**9),
        hyper(hidden_size="many"),
        hyper(hidden_size=None),
        hyper(cell="transformer"),
        hyper(embedding_size=10**9),
        hyper(unheard_of=1),
        symbols([str(i) for i in range(50_000)]),
        symbols([]),
        symbols(["a", "a"]),
        symbols("abc"),
        symbols(None),
        symbols([1, 2]),
        weight(torch.zeros(1)),
        weight(torch.zeros(2, 3)),
        weight(torch.zeros(1).expand(50_000, 50_000)),
        lambda inside: inside["state_dict"].clear(),
        lambda inside: inside["state_dict"].update(more=torch.zeros(1)),
        lambda inside: inside.update(state_dict=[]),
        lambda inside: inside.update(state_dict={"network.output.weight": 3}),
        lambda inside: inside.update(hyper_parameters=3),
        lambda inside: inside.pop("hyper_parameters"),
    ],
)
def test_sizes_that_make_no_sense_are_refused_before_memory_is_taken(
    change: Callable[[dict[str, Any]], Any], run: Path, tmp_path: Path
) -> None:
    path = tmp_path / "absurd.ckpt"
    inside = torch.load(run / "checkpoints" / "best.ckpt")
    change(inside)
    torch.save(inside, path)
    with little_memory(), pytest.raises(InputError, match=r"absurd\.ckpt is not a checkpoint of charlm's"):
        open_checkpoint(path)


def repacked(
    content: bytes, path: Path, pickled: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED
) -> None:
    """Write a checkpoint again with another pickle in it."""
    with zipfile.ZipFile(io.BytesIO(content)) as there, zipfile.ZipFile(path, "w", compression) as here:
        for name in there.namelist():
            inside = there.read(name)
            here.writestr(name, pickled(inside) if name.endswith("data.pkl") else inside)


def test_claims_of_ten_gigabytes_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "claims.ckpt"
    repacked(content, path, lambda inside: inside, zipfile.ZIP_DEFLATED)
    with little_memory(), pytest.raises(InputError, match="its records are compressed"):
        read_checkpoint(path)
    repacked(content, path, lambda _: b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\xe4\x0bT\x02\x85R.")
    with little_memory(), pytest.raises(InputError, match="more than tensors and plain values"):
        read_checkpoint(path)
    # The first tensor says that it has as many elements as fit in ten gigabytes.
    counts = re.compile(rb"(cpuq.)(K.|M..)", re.DOTALL)

    def larger(found: re.Match[bytes]) -> bytes:
        return found[1] + b"J\x00\x00\x00\x7f"

    repacked(content, path, lambda inside: counts.sub(larger, inside, count=1))
    with little_memory(), pytest.raises(InputError):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 torn"])
def test_what_is_no_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "some.ckpt"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a checkpoint"):
        open_checkpoint(path)
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="no weights with their sizes"):
        open_checkpoint(path)


# --- which checkpoint a run goes on from --------------------------------------------------------------------------


def spoil(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def interrupted(folder: Path, run: Path) -> None:
    """Make `folder` one of a run that was interrupted before its end."""
    shutil.copytree(run, folder)
    (folder / "result.json").unlink()


def test_a_torn_last_checkpoint_is_named_and_the_one_before_is_used(
    run: Path, composed: Composed, tiny: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    interrupted(folder, run)
    spoil(folder / "checkpoints" / "last.ckpt")
    with caplog.at_level(logging.WARNING, "charlm"):
        train(composed(*tiny), folder)
    assert "last.ckpt is not a checkpoint of charlm's" in caplog.text
    assert "going on from previous.ckpt, the one before" in caplog.text
    weights = [torch.load(where / "checkpoints" / "last.ckpt")["state_dict"] for where in (run, folder)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_last_checkpoint_of_another_run_is_named_and_the_one_before_is_used(
    run: Path, composed: Composed, tiny: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    interrupted(folder, run)
    train(composed(*tiny, "model.hidden_size=20"), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "checkpoints" / "last.ckpt", folder / "checkpoints")
    with caplog.at_level(logging.WARNING, "charlm"):
        train(composed(*tiny), folder)
    assert "last.ckpt is of another run: its model differs; going on from previous.ckpt" in caplog.text


def test_where_no_checkpoint_can_be_used_the_run_is_refused_and_all_stays(
    run: Path, composed: Composed, tiny: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    interrupted(folder, run)
    for name in ("last", "previous"):
        spoil(folder / "checkpoints" / f"{name}.ckpt")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="cannot be resumed"):
        train(composed(*tiny), folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_torn_best_checkpoint_is_named_and_the_next_best_counts(
    run: Path, composed: Composed, tiny: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    interrupted(folder, run)
    last = torch.load(folder / "checkpoints" / "previous.ckpt")
    last["best"] = {"loss": 0.0, "step": 5}  # an earlier one, whose file is torn
    torch.save(last, folder / "checkpoints" / "last.ckpt")
    spoil(folder / "checkpoints" / "best.ckpt")
    with caplog.at_level(logging.WARNING, "charlm"):
        train(composed(*tiny), folder)
    assert "best.ckpt is not a checkpoint of charlm's" in caplog.text
    assert read_checkpoint(folder / "checkpoints" / "best.ckpt")["global_step"] == 20
