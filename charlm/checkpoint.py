"""Checkpoint files: written whole, verified before use, opened without running code.

One suffices to write text: weights, sizes and vocabulary are all in it.
"""

from __future__ import annotations

import inspect
import io
import logging
import pickle
import pickletools
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins import CheckpointIO

from charlm.config import ModelConfig
from charlm.errors import InputError, first_line
from charlm.files import write_whole
from charlm.module import CharLM
from charlm.network import CharRNN
from charlm.run import newest_completed

log = logging.getLogger(__name__)


def find_checkpoint(given: str | None, runs: Path) -> Path:
    """Return the checkpoint that is meant: a file, the best one of a run's folder, or where none is given, the best one
    of the run below `runs` that was the last to complete.

    Raises:
        InputError: what is given is a folder of something else, or no run has completed yet.
    """
    if given is not None:
        path = Path(given).expanduser()
        if not path.is_dir():
            return path
        inside = path if path.name == "checkpoints" else path / "checkpoints"
        if not inside.is_dir():
            raise InputError(f"{path} is not a run's folder; name one, or have the newest below it with runs={path}")
        return inside / "best.ckpt"
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
        torch.zeros(1, device=device).item()  # "meta" holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        hint = "; did you mean cuda?" if name.startswith("gpu") else ""
        raise InputError(f"device={name} is not available here: {first_line(error)}{hint}") from None
    return device


def open_checkpoint(path: Path) -> CharLM:
    """Return the model of a checkpoint, on the CPU, whatever device it was trained on.

    Raises:
        InputError: there is no such file, or it is not a checkpoint of charlm's.
    """
    if not path.is_file():
        raise InputError(f"checkpoint={path} does not exist; a run keeps its own in RUN/checkpoints/best.ckpt")
    content = read_checkpoint(path)
    model = CharLM(**content["hyper_parameters"])
    model.load_state_dict(content["state_dict"])
    return model.eval()


# --- the file -----------------------------------------------------------------------------------------------------

# All that a checkpoint's pickle may name. Torch's own list for `weights_only` is longer, and a bytearray of any length
# is on it.
_NAMES = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    *(
        f"torch.{kind}Storage"
        for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Byte", "Bool")
    ),
}


class WholeCheckpoints(CheckpointIO):
    """Checkpoints as Lightning saves and loads them: written whole, verified before they are used."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint; the file that had the name stays until the new one is on the disk.

        Raises:
            RunStopped: the disk is full, or the folder may not be written to.
        """
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_whole(Path(path), content.getbuffer())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Return what `read_checkpoint` does."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint."""
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return what a checkpoint holds, on the CPU.

    A checkpoint is a zip file of stored, uncompressed records, each with its CRC-32: whether it is whole is in the file
    itself (`unzip -t FILE` says so too). Only tensors and plain values are read (`weights_only=True`); what carries
    code, or claims more memory than the file has bytes, is refused before anything runs or takes memory.

    Raises:
        InputError: the file is torn, or not a checkpoint of charlm's.
    """
    try:
        with path.open("rb") as file:
            _verify(path, file)
            file.seek(0)
            content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise _refusal(path, "it holds more than tensors and plain values, such as code") from None
    except zipfile.BadZipFile:
        raise _refusal(path, "it is cut off or damaged, or of another kind") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise _refusal(path, first_line(error)) from None
    if not isinstance(content, dict) or not {"state_dict", "hyper_parameters"} <= content.keys():
        raise _refusal(path, "it holds no weights with their sizes")
    _check_sizes(path, content["hyper_parameters"], content["state_dict"])
    return content


def _verify(path: Path, file: BinaryIO) -> None:
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise _refusal(path, "its records are compressed")
        if damaged := archive.testzip():
            raise _refusal(path, f"it is damaged at {damaged}")
        pickles = [record for record in records if record.filename.endswith(".pkl")]
        if len(pickles) != 1:
            raise _refusal(path, "it holds no weights with their sizes")
        for operation, argument, _ in pickletools.genops(archive.read(pickles[0])):
            name = str(argument).replace(" ", ".")
            if operation.name == "STACK_GLOBAL" or (operation.name in ("GLOBAL", "INST") and name not in _NAMES):
                raise _refusal(path, "it holds more than tensors and plain values, such as code")


def _check_sizes(path: Path, hyper_parameters: Any, weights: Any) -> None:
    """Refuse sizes that make no sense or that `weights` do not fit, before any memory is taken for them.

    Raises:
        InputError: they are such.
    """
    try:
        signature = inspect.signature(CharRNN).parameters
        defaults = {
            field.name: signature[field.name].default for field in fields(ModelConfig) if field.name in signature
        }
        config = ModelConfig(**{"parameters": None, **defaults, **hyper_parameters["model"]})
        if config.num_layers > len(weights) or any(
            value.numel() * value.itemsize > value.untyped_storage().nbytes()
            or value.untyped_storage().nbytes() > path.stat().st_size
            for value in weights.values()
        ):
            raise ValueError("it claims more weights than it holds")
        with torch.device("meta"):
            model = CharLM(**hyper_parameters)
    except (TypeError, KeyError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise _refusal(path, first_line(error)) from None
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    for name in sorted({*shapes, *weights}):
        there, expected = weights[name].shape if name in weights else None, shapes.get(name)
        if there != expected:
            raise _refusal(path, f"{name} is {_shape(there)}, not {_shape(expected)}")


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape))


def _refusal(path: Path, why: str) -> InputError:
    return InputError(f"{path} is not a checkpoint of charlm's: {why}")
