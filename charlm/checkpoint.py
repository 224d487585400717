"""Opening a checkpoint, which suffices: weights, sizes and vocabulary are all in it."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import torch

from charlm.errors import InputError
from charlm.module import CharLM
from charlm.run import newest_completed

log = logging.getLogger(__name__)


def find_checkpoint(given: str | None, runs: Path) -> Path:
    """Return the checkpoint that is meant: a file, the best one of a run's folder, or where none is given, the best one
    of the run below `runs` that was the last to complete.

    Raises:
        InputError: no run has completed yet.
    """
    if given is not None:
        path = Path(given).expanduser()
        return path / "checkpoints" / "best.ckpt" if path.is_dir() else path
    folder = newest_completed(runs)
    if folder is None:
        raise InputError(
            f"no run in {runs}/ has completed; train one with `python train.py`, or name a checkpoint=FILE"
        )
    log.info(f"the newest completed run: {folder}")
    return folder / "checkpoints" / "best.ckpt"


def find_device(name: str) -> torch.device:
    """Return a device that this machine has.

    Raises:
        InputError: it has none of that name.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device={name} is not to be had here: {str(error).splitlines()[0]}") from None
    return device


def open_checkpoint(path: Path) -> CharLM:
    """Return the model of a checkpoint, on the CPU, whatever device it was trained on.

    Only tensors and plain values are read (`weights_only=True`): a file that carries code is refused and nothing runs.

    Raises:
        InputError: there is no such file, or it is not a checkpoint of charlm's.
    """
    if not path.is_file():
        raise InputError(f"checkpoint={path} does not exist; a run keeps its own in RUN/checkpoints/best.ckpt")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise _refusal(path, "it is not one, or holds more than tensors and plain values, such as code") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise _refusal(path, str(error).splitlines()[0] if str(error) else type(error).__name__) from None
    if not isinstance(content, dict) or not {"state_dict", "hyper_parameters"} <= content.keys():
        raise _refusal(path, "it holds no weights with their sizes")
    return _build(path, content["hyper_parameters"], content["state_dict"])


def _build(path: Path, hyper_parameters: dict[str, Any], weights: dict[str, torch.Tensor]) -> CharLM:
    try:
        model = CharLM(**hyper_parameters)
        model.load_state_dict(weights)
    except (TypeError, KeyError, ValueError, RuntimeError, AttributeError) as error:
        raise _refusal(path, str(error).splitlines()[0]) from None
    return model.eval()


def _refusal(path: Path, why: str) -> InputError:
    return InputError(f"checkpoint={path} is not a checkpoint of charlm's: {why}")
