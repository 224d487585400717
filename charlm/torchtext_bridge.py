"""torchtext, for whoever comes from it: its text datasets by their names, and vocabularies in its order.

Its development has ended. Its last release, 0.18, loads with torch 2.3 alone, so that it has an environment of its own;
a checkpoint knows neither, and opens in either.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from charlm.cache import cache_folder
from charlm.config import TorchtextConfig
from charlm.errors import InputError, LibraryErrors, listed, reason
from charlm.files import no_empty_folder_left
from charlm.sources import Piece, Source, split_named
from charlm.vocabulary import UNKNOWN

_EXPANSION = 5  # how much larger a dataset's text is than its files at most: archives, and beside them what was in them


def load(module: str, wanted_by: str) -> Any:
    """Return a module of torchtext's.

    Args:
        module: its name.
        wanted_by: the setting that asks for it, as the user gives it.

    Raises:
        InputError: torchtext cannot be loaded here.
    """
    try:
        importlib.import_module("torchtext").disable_torchtext_deprecation_warning()  # it would tell at every import
        return importlib.import_module(f"torchtext.{module}")
    except (ImportError, OSError) as error:  # it is not there, or its library was built for another torch
        raise InputError(
            f"{wanted_by} needs torchtext 0.18, which loads with torch 2.3 alone ({reason(error, 100)}); use an "
            "environment of its own: `make setup-torchtext` makes .venv-torchtext"
        ) from None


def symbols_of(counts: Mapping[str, int]) -> list[str]:
    """Return the symbols of torchtext's vocabulary of these characters: `<unk>`, then as they first appeared.

    Args:
        counts: how often each occurs, in the order in which they first appear.

    Raises:
        InputError: torchtext cannot be loaded here.
    """
    vocab = load("vocab", "data.vocabulary=torchtext")
    symbols: list[str] = vocab.vocab(Counter(counts), specials=[UNKNOWN]).get_itos()
    return symbols


class Torchtext(Source):
    """A text dataset of torchtext's, which it downloads where its files do not lie there already.

    Raises:
        InputError: torchtext cannot be loaded, has no such dataset, or cannot get it.
    """

    size = None  # what it yields is not what it reads

    def __init__(self, config: TorchtextConfig) -> None:
        self.config: TorchtextConfig = config
        known: Mapping[str, Callable[..., Any]] = load("datasets", "data=torchtext").DATASETS
        if config.dataset not in known:
            raise InputError(f"data.dataset={config.dataset} is not one of torchtext's: {listed(sorted(known), 50)}")
        self._dataset = known[config.dataset]
        self._options = config.options or {}
        parameters = inspect.signature(self._dataset).parameters
        options = [name for name in parameters if name not in ("root", "split")]
        if unknown := sorted(set(self._options) - set(options)):
            takes = f"it takes {listed(options)}" if options else "it takes none"
            raise InputError(f"data.options: data.dataset={config.dataset} has no option {listed(unknown)}; {takes}")
        self._splits = list(parameters["split"].default) if "split" in parameters else [None]
        root = parameters["root"].default
        if config.path is not None:
            root = Path(config.path).expanduser()
            if not (root / "datasets").is_dir():
                raise InputError(
                    f"data.path={config.path} has no folder `datasets`, where torchtext keeps those it has; leave "
                    "data.path out to download"
                )
        elif config.cache_dir is not None:
            root = cache_folder(config.cache_dir) / "torchtext"
        self._root = str(root)
        self._folder = Path(root) / "datasets" / config.dataset  # torchtext's choice
        self._errors = LibraryErrors(
            f"torchtext cannot read data.dataset={config.dataset}",
            "where its files lie already, name their folder, the one with `datasets` in it, with data.path=FOLDER",
        )
        self._fetch()

    def _items(self, split: str | None) -> Iterator[Any]:
        return iter(self._dataset(root=self._root, **({"split": split} if split else {}), **self._options))

    def _fetch(self) -> None:
        """Have the files laid there: torchtext downloads and unpacks them when items are asked for."""
        before = set(self._folder.rglob("*"))
        with self._errors, no_empty_folder_left(self._folder):
            try:
                for split in self._splits:
                    items = self._items(split)
                    next(items, None)
                    if set(self._folder.rglob("*")) != before:
                        # Unpacked while it is read: a folder that is left halfway would be taken for whole.
                        deque(items, maxlen=0)
            except BaseException:
                # Half a download would be taken for the whole file the next time, where torchtext knows no sum of it.
                for path in sorted(set(self._folder.rglob("*")) - before, reverse=True):
                    path.rmdir() if path.is_dir() else path.unlink()
                raise

    @property
    def _files(self) -> list[Path]:
        return sorted(path for path in self._folder.rglob("*") if path.is_file())

    @property
    def likely_characters(self) -> int:
        return _EXPANSION * sum(path.stat().st_size for path in self._files)

    def digest(self) -> str:
        whole = hashlib.sha256()
        for path in self._files:
            with path.open("rb") as file:
                whole.update(hashlib.file_digest(file, "sha256").digest())
        return whole.hexdigest()

    def pieces(self) -> Iterator[Piece]:
        with self._errors:
            for split in self._splits:
                for item in self._items(split):
                    text = self._text(item)
                    yield Piece(text, True, split_named(split or ""), len(text))

    def _text(self, item: Any) -> str:
        """Return the chosen parts of an item, joined by spaces, as are the words of a sentence that comes in words."""
        parts = list(item) if isinstance(item, tuple | list) else [item]
        fields = self.config.fields
        if fields is None:
            fields = [i for i, part in enumerate(parts) if isinstance(part, str)]
        chosen = [parts[i] for i in fields if i < len(parts)]
        words = [word for part in chosen for word in (part if isinstance(part, list) else [part])]
        if not fields or len(chosen) < len(fields) or not all(isinstance(word, str) for word in words):
            raise InputError(
                f"an item of data.dataset={self.config.dataset} has {len(parts)} parts "
                f"({listed([type(part).__name__ for part in parts])}); choose those that are text, or lists of words, "
                "with data.fields=[...], counted from 0"
            )
        return " ".join(words)
