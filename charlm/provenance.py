"""Which text a run was trained on: text.json in its folder. It goes on with that text, and with no other.

    {"train/characters": 9600, "val/characters": 1200, "test/characters": 1200, "symbols": 27, "digest": "5f0c9a..."}

The settings say where a text is; what it was then, only this does.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from charlm.config import DataConfig
from charlm.corpus import Corpus, load_corpus
from charlm.errors import InputError
from charlm.files import read_names, write_whole

log = logging.getLogger(__name__)

_RECORD = "text.json"


def record_text(folder: Path, corpus: Corpus) -> None:
    """Write down what the run in `folder` is trained on."""
    write_whole(folder / _RECORD, json.dumps(corpus.identity, indent=2) + "\n")


def confirm_text(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Return whether a run was trained on this text; False where it does not say on which.

    Args:
        folder: the run's.
        identity: of the text as it is now; see `Corpus.identity`.

    Raises:
        InputError: it was trained on another one, or on other splits of it.
    """
    if not (folder / _RECORD).exists():
        log.warning(f"{folder} does not say which text it was trained on, so that no change is noticed")
        return False
    there = read_names(folder / _RECORD, json.loads)
    differing = [
        f"{name}: {there.get(name)} there, {now} now" for name, now in identity.items() if there.get(name) != now
    ]
    if differing:
        raise InputError(
            f"{folder} was trained on another text, or on other splits of it ({'; '.join(differing)}); give the text "
            "as it was, or choose another folder to train on this one with hydra.run.dir (of a sweep: hydra.sweep.dir)"
        )
    return True


def find_text(config: DataConfig) -> Corpus | None:
    """Return the text that a configuration names, or None where it can no longer be read."""
    try:
        return load_corpus(config)
    except InputError as error:
        log.warning(f"the training text cannot be read again: {error}")
        return None
