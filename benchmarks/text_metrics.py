"""What it costs to measure samples against their training text: `python benchmarks/text_metrics.py`, a CPU, a minute.

On one core. Copying is measured beside two other exact ways: `str.find` for each run that might be longer (Python's own
search), and an automaton of the samples' suffixes that reads the text character by character. Both find the longest run
alone, and the slower ones read less text.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measurement import on_one_core

SAMPLES, LENGTH = 5, 1000


def texts(size: int) -> tuple[str, list[str]]:
    """Return a text and samples: copies with ever more errors, which copy ever less."""
    from pydoc_data.topics import topics

    draw = random.Random(0)
    lines = "".join(topics[name] for name in sorted(topics)).splitlines(keepends=True)
    parts: list[str] = []
    while sum(map(len, parts)) < size:
        draw.shuffle(lines)
        parts.append("".join(lines))
    text = "".join(parts)[:size]
    samples = []
    for errors in (0, 0.003, 0.03, 0.1, 0.5):
        start = draw.randrange(size - LENGTH)
        copied = text[start : start + LENGTH]
        samples.append("".join(draw.choice(text) if draw.random() < errors else char for char in copied))
    return text, samples


def longest_by_find(sample: str, text: str) -> int:
    """Let Python search for every run that would be longer than the longest yet."""
    longest = 0
    for start in range(len(sample)):
        while start + longest < len(sample) and sample[start : start + longest + 1] in text:
            longest += 1
    return longest


def longest_by_automaton(sample: str, text: str) -> int:
    """Read a text with the suffix automaton of a sample (Blumer et al., 1985)."""
    moves: list[dict[str, int]] = [{}]
    link, length, last = [-1], [0], 0
    for char in sample:
        new = len(moves)
        moves.append({})
        length.append(length[last] + 1)
        link.append(0)
        state = last
        while state >= 0 and char not in moves[state]:
            moves[state][char] = new
            state = link[state]
        if state >= 0:
            target = moves[state][char]
            if length[target] == length[state] + 1:
                link[new] = target
            else:
                clone = len(moves)
                moves.append(dict(moves[target]))
                length.append(length[state] + 1)
                link.append(link[target])
                while state >= 0 and moves[state].get(char) == target:
                    moves[state][char] = clone
                    state = link[state]
                link[target] = link[new] = clone
        last = new
    longest = state = matched = 0
    for char in text:
        while state and char not in moves[state]:
            state = link[state]
            matched = length[state]
        if char in moves[state]:
            state = moves[state][char]
            matched += 1
            longest = max(longest, matched)
    return longest


def measure(way: str, size: int) -> dict[str, Any]:
    """Return what one way costs in this process."""
    import numpy as np

    from charlm.copying import find_copying
    from charlm.corpus import Corpus
    from charlm.text_metrics import TrainingText, distinct_4grams, loop_rate
    from charlm.vocabulary import Vocabulary, code_points

    text, samples = texts(size)
    vocabulary = Vocabulary.of([code_points(text)])
    block = np.array(vocabulary.encode(text))
    ids = [vocabulary.encode(sample) for sample in samples]
    training = TrainingText(Corpus(vocabulary, block, {"train": [(0, len(block))]}, {}, {}))
    if not way.startswith("str"):
        del text
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    begun = time.perf_counter()
    match way:
        case "copying, hashed":
            found: Any = [copy.longest for copy in find_copying(ids, block, [(0, len(block))])]
        case "real words":
            found = training.real_words(samples)
        case "loops, 4-grams":
            found = [(loop_rate(sample), distinct_4grams(sample)) for sample in samples]
        case "str.find":
            found = [longest_by_find(sample, text) for sample in samples]
        case "automaton":
            found = [longest_by_automaton(sample, vocabulary.decode(block)) for sample in samples]
    seconds = time.perf_counter() - begun
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
    return {"seconds": seconds, "peak": peak / 1024, "found": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=30, help="million characters of training text (default 30)")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "CHARACTERS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    on_one_core()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure[0], int(arguments.measure[1]))))
        return
    print(f"{platform.processor() or platform.machine()}, one core; Python {platform.python_version()}; ", end="")
    print(f"{SAMPLES} samples of {LENGTH:,} characters")
    print(f"{'':<18}{'characters of text':>20}{'seconds':>10}{'million/s':>11}{'peak MB':>9}   longest copies")
    whole = arguments.size * 10**6
    for way, size in (
        *(("copying, hashed", whole), ("real words", whole), ("loops, 4-grams", whole)),
        *(("copying, hashed", 3 * 10**6), ("str.find", 3 * 10**6), ("automaton", 3 * 10**6)),
    ):
        command = [sys.executable, __file__, "--measure", way, str(size)]
        cost = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        copies = cost["found"] if isinstance(cost["found"][0], int) else ""
        print(
            f"{way:<18}{size:>20,}{cost['seconds']:>10.2f}{size / cost['seconds'] / 1e6:>11.2f}{cost['peak']:>9,.0f}"
            f"   {copies}",
            flush=True,
        )


if __name__ == "__main__":
    main()
