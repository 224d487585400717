"""How fast charlm draws text beside its references: `python benchmarks/sampling.py`, on a GPU where there is one.

    notebook   as the notebook draws that charlm grew from: a one-hot vector, a call of `nn.LSTM` and
               `torch.multinomial` for each character, with gradients, the text in a list
    nn.LSTM    the same with what costs nothing to leave out left out: no gradients, rows for one-hot vectors
    charlm     `Sampler.texts`, from the weights to the text, all that it prepares included
    float32    the same, where charlm by itself rounds the weights to 8 bits

`--int8` sets weights of 8 bits beside float32 for networks of many sizes: where charlm should round.

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

from charlm.decode_cpu import product_of, step_bytes
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
INT8_SIZES = [(128, 1), (128, 2), (256, 1), (256, 2), (384, 1), (384, 2), (512, 1), (512, 2), (1024, 1), (1024, 2)]
INT8_CASES = [
    *((cell, *sizes) for cell in ("lstm", "gru") for sizes in INT8_SIZES),
    *(("rnn", *sizes) for sizes in ((256, 2), (512, 1), (512, 2), (1024, 1))),
]
# Characters of each text that charlm draws, by the number of texts, and the share of them that the references draw:
# about half a second each.
CHARACTERS = {"cpu": {1: 4000, 6: 1000, 64: 400}, "cuda": {1: 40_000, 256: 20_000}}
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


def charlm(network: CharRNN, texts: int, length: int, weights: str = "auto") -> list[str]:
    seeds = [(1, number) for number in range(texts)]
    sampler = Sampler(network, Vocabulary(SYMBOLS), weights=weights)
    return sampler.texts([START], length, [TEMPERATURE] * texts, seeds)


def fresh(cell: str, size: int, layers: int, device: str) -> CharRNN:
    torch.manual_seed(1)
    return CharRNN(len(SYMBOLS), cell, size, layers).to(device).eval()


def beside_references(device: str, runs: int) -> None:
    ratios = [("charlm", "notebook"), ("charlm", "nn.LSTM"), *([("charlm", "float32")] if device == "cpu" else [])]
    columns = list(dict.fromkeys(["notebook", "nn.LSTM", "charlm", *(name for pair in ratios for name in pair)]))
    table = Table("network", "texts", *columns, *(f"{a} / {b}" for a, b in ratios), "300 characters, ms")
    for cell, size, layers, texts in CUDA_CASES if device == "cuda" else CPU_CASES:
        network = fresh(cell, size, layers, device)
        whole = CHARACTERS[device][texts]
        ways: dict[str, Callable[[CharRNN, int, int], list[str]]]
        ways = {"notebook": notebook, "nn.LSTM": by_character, "charlm": charlm}
        lengths = {"notebook": int(whole * SHARE[device]), "nn.LSTM": int(whole * SHARE[device]), "charlm": whole}
        if Sampler(network, Vocabulary(SYMBOLS)).arithmetic != "float32":
            ways["float32"], lengths["float32"] = partial(charlm, weights="float32"), whole
        drawers = {name: partial(seconds, partial(way, network, texts, lengths[name])) for name, way in ways.items()}
        by_turns(drawers, 1)  # libraries load
        rates = {
            name: [texts * lengths[name] / taken for taken in values]
            for name, values in by_turns(drawers, runs).items()
        }
        short = by_turns({"charlm": partial(seconds, partial(charlm, network, texts, 300))}, 3)["charlm"]
        table.row(
            f"{cell.upper()} {size}x{layers}",
            str(texts),
            *(statistics.median(rates[name]) if name in rates else "" for name in columns),
            *(f"{ratio(rates, a, b):.1f}" if b in rates else "" for a, b in ratios),
            statistics.median(short) * 1e3,
        )


def int8_beside_float32(runs: int) -> None:
    counts = (1, 6, 64)
    table = Table(
        "network", "MB of float32 a character", *(f"int8 / float32, {texts} texts" for texts in counts), "auto"
    )
    for cell, size, layers in INT8_CASES:
        network = fresh(cell, size, layers, "cpu")
        ratios = []
        for texts in counts:
            draw = partial(charlm, network, texts, max(40, int(CHARACTERS["cpu"][texts] * min(1, 128 / size))))
            drawers = {weights: partial(seconds, partial(draw, weights)) for weights in ("int8", "float32")}
            by_turns(drawers, 1)  # libraries load
            ratios.append(f"{ratio(by_turns(drawers, runs), 'float32', 'int8'):.2f}")
        chosen = Sampler(network, Vocabulary(SYMBOLS)).arithmetic
        table.row(f"{cell.upper()} {size}x{layers}", f"{step_bytes(network) / 1e6:.1f}", *ratios, chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--int8", action="store_true")
    given = parser.parse_args()
    print(machine("numpy"))
    if given.int8:
        if product_of(fresh("lstm", 512, 2, "cpu"), "int8") is None:
            parser.error("this processor has no instructions for 8 bits (such as AVX512-VNNI) that torch makes use of")
        int8_beside_float32(given.runs)
    else:
        beside_references(given.device, given.runs)


if __name__ == "__main__":
    main()
