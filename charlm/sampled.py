"""Texts that a finished training wrote at other sampling settings than its own: sampled/ in its run's folder.

    sampled/<key>.yaml    the settings, which are there first and thereby ask for the texts
    sampled/<key>.jsonl   the texts, in the form of samples.jsonl

Sampling settings change no weight. So jobs of a sweep that differ in nothing else share one training, which writes what
the others ask for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from charlm.config import SamplingConfig
from charlm.files import json_lines, read_names, unreadable, write_whole

if TYPE_CHECKING:  # a sweep asks without waiting for torch
    from charlm.network import CharRNN
    from charlm.text_metrics import TrainingText
    from charlm.vocabulary import Vocabulary


def drawn_with(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a run's sampling settings that decide what a finished training writes, in one form."""
    given = sampling["temperature"]
    temperatures = [float(value) for value in (given if isinstance(given, list) else [given])]
    return {
        **{name: sampling[name] for name in sorted(sampling) if name != "every_n_steps"},
        "temperature": temperatures,
    }


class Sampled:
    """What is asked for, and what there is of it.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "sampled"
        self._told = folder / "config.yaml"

    def own(self) -> dict[str, Any]:
        """Return what the training itself wrote with, in the form of `drawn_with`.

        Raises:
            InputError: config.yaml, which says it, is gone or damaged.
        """
        told = read_names(self._told, yaml.safe_load)
        try:
            return drawn_with(told["sampling"])
        except (LookupError, TypeError, ValueError):
            raise unreadable(self._told, ValueError("it does not say how the samples are drawn")) from None

    def rows_file(self, sampling: Mapping[str, Any]) -> Path:
        """Return where the texts of these settings are kept: by temperature, and by what all settings are."""
        settings = drawn_with(sampling)
        temperatures = "-".join(f"{value:g}" for value in settings["temperature"][:8])
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]
        return self._folder / f"{temperatures}_{digest}.jsonl"

    def holds(self, sampling: Mapping[str, Any]) -> bool:
        """Whether the texts of these settings are there."""
        return self.rows_file(sampling).exists()

    def ask(self, samplings: Iterable[Mapping[str, Any]]) -> None:
        """Ask for the texts of all these settings, and no longer for what was asked for earlier and is not there."""
        for file in self._folder.glob("*.yaml"):
            if not file.with_suffix(".jsonl").exists():
                file.unlink()
        for sampling in samplings:
            self._folder.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(drawn_with(sampling), sort_keys=False, allow_unicode=True)
            write_whole(self.rows_file(sampling).with_suffix(".yaml"), text)

    def asked(self) -> Iterator[dict[str, Any]]:
        """Yield the settings whose texts are asked for and not yet there.

        Raises:
            InputError: a file that says them is damaged.
        """
        for file in sorted(self._folder.glob("*.yaml")):
            if not file.with_suffix(".jsonl").exists():
                yield read_names(file, yaml.safe_load)

    def write(
        self, network: CharRNN, vocabulary: Vocabulary, seed: int, step: int, training_text: TrainingText | None
    ) -> Iterator[list[dict[str, Any]]]:
        """Write all that is asked for and not yet there, measured, and yield the rows of each settings.

        Args:
            network: of the best checkpoint.
            vocabulary: the network's.
            seed: the run's.
            step: how many optimizer steps the training took.
            training_text: the run's, if it is at hand.

        Raises:
            InputError: a prompt with characters that the training text lacks.
        """
        from charlm.generate import sample_rows
        from charlm.text_metrics import measured

        drawn: dict[Path, list[dict[str, Any]]] = {}
        for settings in self.asked():
            sampling = SamplingConfig(**settings)
            rows = sample_rows(network, vocabulary, sampling, sampling.temperatures, seed, step)
            drawn[self.rows_file(settings)] = rows
        # Measured all together, for the training text is read anew each time.
        every = iter(measured((row for rows in drawn.values() for row in rows), network, vocabulary, training_text))
        for file, rows in drawn.items():
            rows = list(islice(every, len(rows)))
            write_whole(file, json_lines(rows))
            yield rows
