"""How fast networks train whose layers charlm runs itself in a CUDA graph: `python benchmarks/layers.py`, on a GPU.

    torch      cuDNN runs all layers in one call, and sums up the gradients of their weights
    charlm     each layer is a call, and those gradients are charlm's (charlm/cudnn_layer.py)

Both are a bare loop that replays the graph of a whole step. The last column says which of them charlm takes.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from typing import Any
from unittest import mock

import torch
from measurement import Table, by_turns, machine, ratio
from training import BareGraph, bare, composed

from charlm import cudnn_layer
from charlm.network import CELLS
from charlm.trainer import choose_precision

CASES = [  # cell, hidden units, layers, batch
    *((cell, h, 1, batch) for cell in CELLS for h in (64, 128, 256, 512, 1024) for batch in (128, 512)),
    *((cell, 64, 1, batch) for cell in CELLS for batch in (32, 2048)),
    *((cell, h, 2, batch) for cell in CELLS for h in (64, 128, 256) for batch in (128, 512)),
    *(("gru", h, n, 128) for h, n in ((64, 3), (128, 3), (160, 2))),
]


class Layers(BareGraph):
    """Replays a step whose layers are torch's."""

    own = chosen = False

    def on_train_start(self) -> None:
        regularizer = self.network.regularizer
        one_by_one = bool(regularizer.weight_dropout or regularizer.hidden_dropout)
        Layers.chosen = cudnn_layer.pays(self.network.rnn, one_by_one)
        regularizer.recorded = self.own
        with mock.patch.object(cudnn_layer, "pays", return_value=True):
            super().on_train_start()


class OwnLayers(Layers):
    """Replays a step whose layers are charlm's own."""

    own = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=80, help="steps of a run")
    parser.add_argument("--runs", type=int, default=3, help="runs of each way")
    parser.add_argument(
        "--override", nargs="*", default=[], help="settings of train.py, such as trainer.precision=32-true"
    )
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("it needs a CUDA device")
    print(machine("lightning"))
    print(f"window 100, {given.runs} runs of {given.steps} steps; microseconds a step")
    table = Table("network, batch", "precision", "torch", "charlm", "torch / charlm", "chosen")
    for cell, hidden, layers, batch in CASES:
        config = composed(
            f"model={cell}",
            f"model.hidden_size={hidden}",
            f"model.num_layers={layers}",
            f"data.batch_size={batch}",
            "logger=csv",
            *given.override,
        )
        ways: dict[str, Any] = {"torch": bare(Layers), "charlm": bare(OwnLayers)}
        seconds = by_turns({name: partial(way, config, 10, given.steps) for name, way in ways.items()}, given.runs)
        table.row(
            f"{cell}-{hidden}x{layers}-{batch}",
            choose_precision(config.trainer, cell, hidden)["precision"],
            *(statistics.median(seconds[name]) * 1e6 for name in ways),
            f"{ratio(seconds, 'torch', 'charlm'):.2f}",
            "charlm" if Layers.chosen else "torch",
        )


if __name__ == "__main__":
    main()
