"""The text as Lightning asks for it: one block, three splits, batches for each."""

from __future__ import annotations

import lightning as L
import torch

from charlm.config import DataConfig
from charlm.corpus import Corpus, load_corpus
from charlm.errors import InputError
from charlm.sources import SPLITS
from charlm.windows import (
    Batches,
    LaneBatches,
    ShuffledBatches,
    Windows,
    evaluation_lanes,
    number_of_lanes,
    stream_lanes,
)


def limited(batches: int, limit: int | float) -> int:
    """Return how many of an epoch's batches Lightning takes, given one of its limits: a number, or a share."""
    return int(batches * limit) if isinstance(limit, float) else min(batches, limit)


class CharDataModule(L.LightningDataModule):
    """Reads a corpus and cuts it into batches of windows.

    Args:
        config: the source, its splits, windows and batches; `batch_size` is of each device.
        seed: of the order in which the training windows come.
    """

    def __init__(self, config: DataConfig, seed: int) -> None:
        super().__init__()
        self.config = config
        self.seed = seed
        self.corpus: Corpus
        self.resident_on: torch.device | None = None  # where training finds the block, and is told only the starts

    def setup(self, stage: str | None = None) -> None:
        """Read, split and encode the text, once.

        Raises:
            InputError: there is no text, or a split is too short for a window.
        """
        if hasattr(self, "corpus"):
            return
        self.corpus = load_corpus(self.config)
        self._block = torch.from_numpy(self.corpus.block)
        for split in SPLITS:
            self._check_length(split)
        self._windows = Windows(self.corpus.segments["train"], self.config.window, self.config.stride)

    def _check_length(self, split: str) -> None:
        window = self.config.window
        longest = max((stop - start for start, stop in self.corpus.segments[split]), default=0)
        if longest == 0 and split != "test":
            raise InputError(
                f"the {split} split is empty with data.split={self.config.split}, data.fractions="
                f"{list(self.config.fractions)}; give more text, as more documents where they are dealt out whole, or "
                "choose others"
            )
        # Training needs whole windows; evaluation scores any two characters, but far fewer than a window say nothing.
        if longest < window + 1 and not (split == "test" and longest == 0):
            largest = min(
                max((stop - start for start, stop in segments), default=0) - 1
                for segments in self.corpus.segments.values()
                if segments
            )
            remedy = f"data.window={largest} is the largest that fits every split" if largest > 0 else "give more text"
            raise InputError(
                f"the {split} split has {longest} characters in one piece, fewer than data.window={window} and one "
                f"more; {remedy}"
            )

    def steps_per_epoch(self, world_size: int) -> int:
        """Return how many batches each of `world_size` ranks trains on in an epoch.

        Raises:
            InputError: not even one.
        """
        steps = len(self._train_batches(0, world_size))
        if not steps:
            raise InputError(
                f"the training split has {len(self._windows)} windows, fewer than data.batch_size="
                f"{self.config.batch_size} on {world_size} device(s); lower data.batch_size"
                + (" or data.stride" if self.config.stride > 1 else "")
            )
        return steps

    def evaluation_steps(self, split: str) -> int:
        """Return in how many batches a split is evaluated, on however many ranks."""
        return len(self._evaluation_batches(split, 0, 1)) if self.corpus.segments[split] else 0

    def resident_block(self) -> torch.Tensor:
        """Return the text's ids, shape (characters,), on the device `resident_on`."""
        return self._block.to(self.resident_on)

    def _train_batches(self, rank: int, world_size: int) -> Batches:
        batch_size, window = self.config.batch_size, self.config.window
        on, pinned = self.resident_on, self._pinned
        if self.config.order == "shuffled":
            given = (self._block, self._windows, batch_size, self.seed)
            return ShuffledBatches(*given, rank, world_size, on, pinned, mapped=self.corpus.block)
        lanes = stream_lanes(self.corpus.segments["train"], batch_size * world_size, window)
        return LaneBatches(self._block, lanes, len(lanes), window, rank, world_size, on, pinned)

    def _evaluation_batches(self, split: str, rank: int, world_size: int) -> Batches:
        lanes, window = self.config.eval_lanes or number_of_lanes(self.corpus.characters(split)), self.config.window
        segments = evaluation_lanes(self.corpus.segments[split], lanes)
        return LaneBatches(self._block, segments, lanes, window, rank, world_size, pinned=self._pinned)

    @property
    def _pinned(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _place(self) -> tuple[int, int]:
        assert self.trainer is not None
        return self.trainer.global_rank, self.trainer.world_size

    def train_dataloader(self) -> Batches:
        """Return this rank's training batches, in epochs of as many as the trainer takes of them."""
        assert self.trainer is not None
        batches = self._train_batches(*self._place())
        batches.end = limited(len(batches), self.trainer.limit_train_batches)
        batches.repeats = self.trainer.overfit_batches > 0  # type: ignore[attr-defined]
        return batches

    def val_dataloader(self) -> Batches:
        """Return this rank's share of the validation split."""
        return self._evaluation_batches("val", *self._place())

    def test_dataloader(self) -> Batches:
        """Return this rank's share of the test split."""
        return self._evaluation_batches("test", *self._place())
