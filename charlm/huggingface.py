"""Datasets of Hugging Face's `datasets` library: from the Hub, from local files, or saved by the library itself.

Only data is read: from version 4 on, the library runs no code that comes with a dataset.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from charlm.cache import cache_folder
from charlm.config import HuggingFaceConfig
from charlm.errors import InputError, LibraryErrors, install, listed
from charlm.sources import Piece, Source, split_named

log = logging.getLogger(__name__)

_ROWS = 1000  # read at a time


class HuggingFace(Source):
    """A dataset, downloaded and prepared by its library, or where it is streamed, read as it comes.

    Raises:
        InputError: the library is not installed, or finds no such dataset, split or column.
    """

    size = None  # the library does not say what it has read

    def __init__(self, config: HuggingFaceConfig) -> None:
        self.config: HuggingFaceConfig = config
        library = _load()
        self._errors = LibraryErrors(
            f"data=huggingface cannot read data.path={config.path}",
            "it names a dataset of the Hub, a local folder, or a format (csv, json, text, parquet) with data.files",
        )
        with self._errors:
            found = self._saved(library) if _is_saved(config.path) else self._built(library)
        self._datasets = self._chosen(found)
        for name, _, dataset in self._datasets:
            self._check_columns(name, dataset)

    def _saved(self, library: Any) -> dict[str, Any]:
        """Return the splits of what the library's `save_to_disk` wrote."""
        saved = library.load_from_disk(str(Path(self.config.path).expanduser()))
        found = dict(saved) if isinstance(saved, dict) else {str(saved.split or "all"): saved}
        self._origin = {name: dataset._fingerprint for name, dataset in found.items()}
        return found

    def _built(self, library: Any) -> dict[str, Any]:
        """Return the splits of a dataset of the Hub's, or of local files."""
        config = self.config
        folder = cache_folder(config.cache_dir) / "huggingface" if config.cache_dir else None
        path = Path(config.path).expanduser()
        builder = library.load_dataset_builder(
            str(path) if path.exists() else config.path,
            name=config.name,
            revision=config.revision,
            data_files=config.files,
            cache_dir=str(folder) if folder else None,
        )
        # What tells one version from another: a commit of the Hub's, or when a local file was changed.
        files = {str(split): [list(f), f.origin_metadata] for split, f in (builder.config.data_files or {}).items()}
        self._origin = {"builder": builder.hash, "config": builder.config_id, "files": files}
        if config.streaming:
            return dict(builder.as_streaming_dataset())
        builder.download_and_prepare()
        names = list(dict.fromkeys(config.splits.values())) if config.splits else list(builder.info.splits)
        return {name: builder.as_dataset(split=name) for name in names}

    def _chosen(self, found: dict[str, Any]) -> list[tuple[str, str | None, Any]]:
        """Return the datasets to read, each behind its name and the split of ours that it is."""
        if self.config.splits:
            if missing := [name for name in self.config.splits.values() if name not in found]:
                has = listed(list(found))
                raise InputError(f"data.splits: {self.config.path} has no {listed(missing)}; it has {has}")
            return [(name, split, found[name]) for split, name in self.config.splits.items()]
        named = [(name, split_named(name), dataset) for name, dataset in found.items()]
        known = [entry for entry in named if entry[1]]
        if known and len(known) < len(named):
            left = listed([name for name, split, _ in named if not split])
            log.info(f"data.path={self.config.path}: its {left} is left out; data.splits chooses others")
        return known or named

    def _check_columns(self, name: str, dataset: Any) -> None:
        features = dataset.features
        if features is None:  # of a stream that tells no more than its rows
            return
        if missing := [column for column in self.config.columns if column not in features]:
            raise InputError(
                f"data.columns: {self.config.path} ({name}) has no {listed(missing)}; it has {listed(list(features))}"
            )

    @property
    def likely_characters(self) -> int:
        if self.config.streaming:
            return sys.maxsize  # not known, so that it is kept on disk
        return sum(dataset.data.nbytes for _, _, dataset in self._datasets)

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self._origin, sort_keys=True, default=str).encode()).hexdigest()

    def pieces(self) -> Iterator[Piece]:
        columns = self.config.columns
        with self._errors:
            for _, split, dataset in self._datasets:
                chosen = dataset if dataset.features is None else dataset.select_columns(columns)
                if self.config.documents is not None:
                    chosen = chosen.take(self.config.documents)
                for rows in chosen.iter(batch_size=_ROWS):
                    if missing := [column for column in columns if column not in rows]:
                        raise InputError(f"data.columns: a row has no {listed(missing)}; it has {listed(list(rows))}")
                    for values in zip(*(rows[column] for column in columns), strict=True):
                        text = " ".join(self._text(value) for value in values if value is not None)
                        yield Piece(text, True, split, len(text))

    def _text(self, value: Any) -> str:
        if not isinstance(value, str):
            raise InputError(
                f"data.columns={self.config.columns}: a value of {self.config.path} is no text but "
                f"{type(value).__name__}; choose a column of text"
            )
        return value


def _is_saved(path: str) -> bool:
    folder = Path(path).expanduser()
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _load() -> Any:
    try:
        library: Any = importlib.import_module("datasets")
    except ImportError as error:
        raise InputError(
            f"data=huggingface needs the library datasets ({error}); install it: {install('huggingface')}"
        ) from None
    library.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it would tell the Hub of local files being read, too
    hub = importlib.import_module("huggingface_hub.utils")
    for told in (library.logging, hub.logging):
        told.set_verbosity_error()  # what fails is said once, by us
    if not sys.stderr.isatty():
        library.disable_progress_bars()
        hub.disable_progress_bars()
    return library
