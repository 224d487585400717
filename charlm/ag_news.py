"""AG News (Zhang, Zhao and LeCun, "Character-level convolutional networks for text classification", 2015).

120,000 articles to train on and 7,600 to test, for non-commercial research. The files are its authors' own, known by
their MD5 sums, whether they are downloaded or lie in a folder already.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from pathlib import Path

from charlm.cache import cache_folder
from charlm.errors import InputError, reason
from charlm.files import no_empty_folder_left

log = logging.getLogger(__name__)

URL = "https://raw.githubusercontent.com/mhjabreel/CharCnn_Keras/master/data/ag_news_csv/"
MD5 = {"train": "b1a00f826fdfbd249f79597b59e1dc12", "test": "d52ea96a97a2d943681189a97654912d"}


def find_files(folder: str | None, cache_dir: str | None) -> list[tuple[Path, str]]:
    """Return the two files, each with the split that it is.

    Args:
        folder: where both lie already; None downloads what the cache does not have yet.
        cache_dir: see `cache_folder`.

    Raises:
        InputError: a file is missing, not the one that its sum says, or cannot be downloaded.
    """
    if folder is not None:
        return [(local_file(Path(folder).expanduser(), split), split) for split in MD5]
    return [(_downloaded(cache_folder(cache_dir) / "ag_news", split), split) for split in MD5]


def local_file(folder: Path, split: str) -> Path:
    """Return the file of a split in a folder, by the name that its authors gave it or with `ag_news_` before it.

    Raises:
        InputError: it is not there, or not the authors' file.
    """
    path = next((p for p in (folder / f"{split}.csv", folder / f"ag_news_{split}.csv") if p.is_file()), None)
    if path is None:
        raise InputError(
            f"data.path={folder} has no {split}.csv of AG News; leave data.path out to download it, or read other "
            "tables with data=csv"
        )
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != MD5[split]:
        raise InputError(
            f"{path} is not AG News' {split} file: its MD5 sum is {found}, not {MD5[split]}; read it as it is with "
            f"data=csv data.path={path}"
        )
    return path


def _downloaded(folder: Path, split: str) -> Path:
    import pooch
    import requests

    name = f"{split}.csv"
    pooch.get_logger().setLevel(logging.WARNING)
    if not (folder / name).exists():
        log.info(f"downloading {URL}{name} to {folder}")
    try:
        download = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=30)
        with no_empty_folder_left(folder):
            # Written beside and moved there once the sum is right: a download that breaks off leaves nothing behind.
            return Path(
                pooch.retrieve(URL + name, known_hash=f"md5:{MD5[split]}", fname=name, path=folder, downloader=download)
            )
    except (requests.RequestException, OSError, ValueError) as error:
        why = "what came has another MD5 sum" if type(error) is ValueError else reason(error)
        raise InputError(
            f"cannot download {URL}{name}: {why}; lay {' and '.join(f'{s}.csv' for s in MD5)} into a folder and "
            f"name it with data.path=FOLDER{os.sep}"
        ) from None
