"""How fast charlm draws text beside its references: `python benchmarks/sampling.py`, on a GPU where there is one.

    notebook   as the notebook draws that charlm grew from: a one-hot vector, a call of `nn.LSTM` and
               `torch.multinomial` for each character, with gradients, the text in a list
    nn.LSTM    the same with what costs nothing to leave out left out: no gradients, rows for one-hot vectors
    charlm     `Sampler.texts`, from the weights to the text, all that it prepares included
    int8       the same with weights of 8 bits, on a CPU

Networks are fresh ones over 104 characters, as the default corpus has; temperature 0.8. Characters a second of all
texts together, medians of several runs by turns; ratios are medians of the turns'.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from measurement import Table, by_turns, machine, ratio, seconds

from charlm.generate import Sampler
from charlm.network import CharRNN
from charlm.vocabulary import UNKNOWN, Vocabulary

SYMBOLS = [UNKNOWN, "\n", *(chr(code) for code in range(32, 134))]
TEMPERATURE = 0.8
CPU_CASES = [("lstm", 128, 1, 1), ("lstm", 512, 2, 1), ("lstm", 128, 1, 64), ("lstm", 512, 2, 64), ("gru", 128, 1, 1)]
CUDA_CASES = [
    *((cell, size, layers, batch) for cell, size, layers in (("lstm", 128, 1), ("lstm", 512, 2)) for batch in (1, 256)),
    *(("gru", 128, 1, batch) for batch in (1, 256)),
]
# Characters of each text that charlm draws, by the number of texts, and the share of them that the references draw:
# about half a second each.
CHARACTERS = {"cpu": {1: 4000, 64: 400}, "cuda": {1: 20_000, 256: 5000}}
SHARE = {"cpu": 0.1, "cuda": 0.04}
START = 1  # a newline


def notebook(network: CharRNN, texts: int, length: int) -> list[str]:
    """Draw as the notebook does, with the arithmetic that belongs to each line of it."""
    device = network.output.weight.device

    def call(ids: torch.Tensor, state: Any = None) -> Any:
        hidden, state = network.rnn(F.one_hot(ids, len(SYMBOLS)).float(), state)
        return network.output(hidden), state

    scores, state = call(torch.full((texts, 1), START, device=device))
    rows: list[list[str]] = [[] for _ in range(texts)]
    for _ in range(length):
        ids = torch.multinomial(scores[:, -1].div(TEMPERATURE).exp(), 1)
        for row, i in zip(rows, ids.flatten().tolist(), strict=True):
            row.append(SYMBOLS[i])
        scores, state = call(ids, state)
    return ["".join(row) for row in rows]


@torch.inference_mode()
def by_character(network: CharRNN, texts: int, length: int) -> list[str]:
    """Draw with a call of the network for each character."""
    scores, state = network(torch.full((texts, 1), START, device=network.output.weight.device))
    rows = []
    for _ in range(length):
        ids = torch.multinomial(scores[:, -1].div(TEMPERATURE).softmax(dim=1), 1)
        rows.append([SYMBOLS[i] for i in ids.flatten().tolist()])
        scores, state = network(ids, state)
    return ["".join(pieces) for pieces in zip(*rows, strict=True)]


def charlm(network: CharRNN, texts: int, length: int, weights: str = "float32") -> list[str]:
    seeds = [(1, number) for number in range(texts)]
    sampler = Sampler(network, Vocabulary(SYMBOLS), weights=weights)
    return sampler.texts([START], length, [TEMPERATURE] * texts, seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runs", type=int, default=7)
    given = parser.parse_args()
    print(machine("numpy"))
    ways: dict[str, Callable[[CharRNN, int, int], list[str]]] = {
        "notebook": notebook,
        "nn.LSTM": by_character,
        "charlm": charlm,
    }
    ratios = [("charlm", "notebook"), ("charlm", "nn.LSTM")]
    if given.device == "cpu":
        ways["int8"] = partial(charlm, weights="int8")
        ratios.append(("int8", "notebook"))
    names = (f"{first} / {second}" for first, second in ratios)
    table = Table("network", "texts", *ways, *names, "300 characters, ms")
    for cell, size, layers, texts in CUDA_CASES if given.device == "cuda" else CPU_CASES:
        torch.manual_seed(1)
        network = CharRNN(len(SYMBOLS), cell, size, layers).to(given.device).eval()
        for way in ways.values():
            way(network, texts, 40)  # libraries load
        whole = CHARACTERS[given.device][texts]
        lengths = {way: whole if way in ("charlm", "int8") else int(whole * SHARE[given.device]) for way in ways}
        drawers = {way: partial(seconds, partial(ways[way], network, texts, lengths[way])) for way in ways}
        rates = {
            way: [texts * lengths[way] / taken for taken in values]
            for way, values in by_turns(drawers, given.runs).items()
        }
        short = by_turns({"charlm": partial(seconds, partial(charlm, network, texts, 300))}, 3)["charlm"]
        table.row(
            f"{cell.upper()} {size}x{layers}",
            str(texts),
            *(statistics.median(values) for values in rates.values()),
            *(f"{ratio(rates, first, second):.1f}" for first, second in ratios),
            statistics.median(short) * 1e3,
        )


if __name__ == "__main__":
    main()
