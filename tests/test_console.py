"""What a text or a name holds cannot steer a terminal."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

HOSTILE = "\x1b[31mred\x1b[0m\x07 <script>alert(1)</script> \u202egnol\u202c\x9b2J a & b\n"


def test_control_characters_of_a_text_do_not_reach_the_terminal(
    tiny: list[str], program: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "hostile.txt").write_text(HOSTILE * 100, encoding="utf-8")
    given = ("data.path=hostile.txt", "sampling.temperature=[inf]", "hydra.run.dir=run", "sampling.length=200")
    done = program("train.py", *tiny, *given)
    assert done.returncode == 0, done.stderr
    drawn = program("sample.py", "checkpoint=run", "length=200", "temperature=inf")
    for shown in (done.stdout, done.stderr, drawn.stdout, (tmp_path / "run" / "train.log").read_text()):
        assert not set(shown) & set("\x1b\x07\x9b\u202e\u202c")
    texts = [json.loads(line)["text"] for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert "\x1b" in "".join(texts)  # the files keep what was drawn


def test_a_name_with_line_breaks_is_refused_in_one_line_and_nothing_is_written_elsewhere(
    tiny: list[str], program: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = program("train.py", *tiny, "data.path=a\nb\x1b[2J.txt")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "\x1b" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_text_whose_name_has_line_breaks_is_read_and_nothing_is_written_beside_it(
    tiny: list[str], text_file: Path, program: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a\nb.txt").write_text(text_file.read_text())
    done = program("train.py", *tiny, "data.path=texts/a\nb.txt", "hydra.run.dir=here/run")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "texts").iterdir()] == ["a\nb.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "texts"]
