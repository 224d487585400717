"""Write text with a trained model: `python sample.py prompt="Today "`, `--help`."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from charlm import commandline
from charlm.config import SampleConfig, register
from charlm.console import heading, measures_table, printable
from charlm.errors import InputError
from charlm.files import json_lines, write_whole

log = logging.getLogger("charlm")

# By file. The jobs of `-m` share this process: one takes a second, where a process takes three to start. A file
# that several of them name has the texts of all.
_written: dict[Path, list[dict[str, Any]]] = {}


def sample(config: SampleConfig) -> list[dict[str, Any]]:
    """Draw texts at each temperature and print them as they grow.

    Returns:
        A row for each text: checkpoint, temperature, seed, sample, weights, prompt, text, and what can be measured
        without the training text; see charlm/text_metrics.py.

    Raises:
        InputError: no checkpoint, an unreadable one, a prompt that the model cannot read, or weights that the device
            cannot have. Nothing is written then.
    """
    # Here, so that --help and a mistyped setting are answered without waiting for torch.
    with commandline.importing():
        from charlm.checkpoint import find_checkpoint, find_device, open_checkpoint
        from charlm.generate import Sampler, prompt_ids
        from charlm.text_metrics import measured

    device = find_device(config.device)
    path = find_checkpoint(config.checkpoint, Path(config.runs))
    model = open_checkpoint(path)
    prompt = read_prompt(config)
    ids = prompt_ids(model.vocabulary, prompt, config.on_unknown)
    sampler = Sampler(model.network.to(device), model.vocabulary, config.top_k, config.top_p, config.weights)
    rows: list[dict[str, Any]] = []
    for temperature in config.temperatures:
        texts = [""] * config.num_samples
        seeds = [(config.seed, number) for number in range(config.num_samples)]
        alone = config.num_samples == 1
        if alone:
            print(f"--- {heading(temperature)} ---\n{printable(prompt)}", end="", flush=True)
        for pieces in sampler.grow(ids, config.length, [temperature] * len(seeds), seeds, config.stop):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
            if alone:
                print(printable(pieces[0]), end="", flush=True)
        if alone:
            print()
        for number, text in enumerate(texts):
            if not alone:
                print(
                    f"--- {heading(temperature)}, sample {number + 1} of {len(texts)} ---\n{printable(prompt + text)}"
                )
            rows.append(
                {"checkpoint": str(path), "temperature": temperature, "seed": config.seed, "sample": number}
                | {"weights": sampler.arithmetic, "prompt": prompt, "text": text}
            )
    rows = measured(rows, model.network, model.vocabulary)
    sys.stdout.flush()
    # Where the texts go on into a file, they go alone.
    print(f"\n{measures_table(rows)}\ndrawn on {device.type}, weights={sampler.arithmetic}", file=sys.stderr)
    return rows


def read_prompt(config: SampleConfig) -> str:
    """Return the prompt: as given, or what a file (or "-", the standard input) holds, to its last newline.

    Raises:
        InputError: there is no such file, or it is not UTF-8.
    """
    if config.prompt_file is None:
        return config.prompt
    try:
        content = sys.stdin.buffer.read() if config.prompt_file == "-" else Path(config.prompt_file).read_bytes()
        return content.decode("utf-8")
    except OSError as error:
        raise InputError(f"cannot read prompt_file={config.prompt_file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"prompt_file={config.prompt_file} is not UTF-8 at byte {error.start}") from None


@hydra.main(version_base="1.3", config_path="conf", config_name="sample")
def main(cfg: DictConfig) -> None:
    with commandline.job():
        config = SampleConfig.of(cfg)
        output = Path(config.output) if config.output else None
        if output and not output.parent.is_dir():
            raise InputError(f"output={output} cannot be written: there is no folder {output.parent}")
        if output and (output.is_dir() or not os.access(output.parent, os.W_OK)):
            raise InputError(f"output={output} cannot be written: it must be a file in a folder that may be written to")
        rows = sample(config)
        if output:
            written = _written.setdefault(output, [])
            written.extend(rows)
            write_whole(output, json_lines(written))


if __name__ == "__main__":
    register()
    commandline.run(main, text_keys=("checkpoint", "output", "prompt", "prompt_file", "runs", "stop"))
