"""What drawing in 8 bits costs in prediction: `python benchmarks/rounding.py RUN...`, the folders of runs on a CPU.

The test split of each run (the first 16 of many pieces) is read character by character, in 16 lanes side by side, by
its best checkpoint: in float32 and in 8 bits (charlm/products.py). Nats a character.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import yaml
from measurement import Table, machine

from charlm.checkpoint import open_checkpoint
from charlm.config import SCHEMAS
from charlm.corpus import load_corpus
from charlm.decode_cpu import Steps, Weights, product_of
from charlm.network import CharRNN
from charlm.products import ARITHMETICS
from charlm.vocabulary import FIRST_WRITTEN
from charlm.windows import evaluation_lanes

LANES = 16


@torch.inference_mode()
def loss(network: CharRNN, lanes: np.ndarray, arithmetic: str) -> float:
    """Return the mean over the characters, but `<unk>`, of lanes of ids, shape (16, T)."""
    steps = Steps(Weights(network, arithmetic), len(lanes))
    nats, count = 0.0, 0
    for ids, following in zip(lanes.T[:-1], lanes.T[1:] - FIRST_WRITTEN, strict=True):
        steps.read(ids)
        scores = torch.from_numpy(steps.logits).double().log_softmax(dim=1).numpy()
        written = np.flatnonzero(following >= 0)
        nats -= scores[written, following[written]].sum()
        count += len(written)
    return nats / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    given = parser.parse_args()
    print(machine("numpy"))
    table = Table("run", "network", "characters", *ARITHMETICS, "difference")
    for run in given.runs:
        data = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["data"]
        corpus = load_corpus(SCHEMAS["data"][data["source"]](**data))
        network = open_checkpoint(run / "checkpoints" / "best.ckpt").network
        if product_of(network, "int8") is None:
            parser.error("this processor has no instructions for 8 bits (such as AVX512-VNNI) that torch makes use of")
        cut = evaluation_lanes(corpus.segments["test"], LANES)[:LANES]
        length = min(stop - start for start, stop in cut)
        lanes = np.stack([corpus.block[start : start + length] for start, _ in cut]).astype(np.int64)
        losses = [loss(network, lanes, arithmetic) for arithmetic in ARITHMETICS]
        name = f"{type(network.rnn).__name__} {network.rnn.hidden_size}x{network.rnn.num_layers}"
        figures = (*(f"{value:.5f}" for value in losses), f"{losses[1] - losses[0]:+.5f}")
        table.row(run.name, name, f"{lanes.size:,}", *figures)


if __name__ == "__main__":
    main()
