"""What a sample is worth: its words, its variety, its loops, how sure the network was, and what it copied.

    real_words       share of its words that are words of the training text
    distinct_4grams  share of its n-grams of 4 characters that are different ones
    loop_rate        share of its characters that only repeat a cycle
    entropy          of the distribution of the next character, bits, the mean over the text: how unsure the network was
    longest_copy     characters of the longest run that stands verbatim in the training text
    copied           share of its characters in such runs of 30 or more

A measure is NaN where the text is too short for it. Prompts do not count.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from charlm.copying import find_copying
from charlm.corpus import Corpus
from charlm.generate import beginning, next_character_entropy
from charlm.metrics import bits
from charlm.network import CharRNN
from charlm.vocabulary import Vocabulary

METRICS = ("real_words", "distinct_4grams", "loop_rate", "entropy", "longest_copy", "copied")

LOOP_TURNS = 3  # how often a cycle comes before it is a loop, ...
LOOP_LENGTH = 20  # ... and how many characters these have, so that "..." or an indentation is none
LONGEST_CYCLE = 1000  # characters; a bound to the time that very long texts take

_LETTER = re.compile(r"[^\W\d_]")  # of any script
_WORD = re.compile(r"[^\W\d_]{2,}")
_PIECE = 2**20  # characters of the training text at a time
_LONGEST_WORD = 100  # what is longer, a piece's end may cut


def measured(
    rows: Iterable[Mapping[str, Any]],
    network: CharRNN,
    vocabulary: Vocabulary,
    training_text: TrainingText | None = None,
) -> list[dict[str, Any]]:
    """Return rows with `prompt` and `text`, and with the measures of the text by the names in `METRICS`.

    Args:
        rows: what was written.
        network: which wrote it.
        vocabulary: the network's.
        training_text: what the network learned from; without, only what needs none is measured.
    """
    rows = list(rows)
    found = [
        {
            "distinct_4grams": distinct_4grams(row["text"]),
            "loop_rate": loop_rate(row["text"]),
            "entropy": entropy(
                network,
                beginning(vocabulary, vocabulary.encode(row["prompt"]).tolist()),
                vocabulary.encode(row["text"]).tolist(),
            ),
        }
        for row in rows
    ]
    if training_text:
        known = training_text.measure([row["text"] for row in rows])
        found = [one | other for one, other in zip(known, found, strict=True)]
    return [{**row, **{name: m[name] for name in METRICS if name in m}} for row, m in zip(rows, found, strict=True)]


def entropy(network: CharRNN, prompt: Sequence[int], text: Sequence[int]) -> float:
    """Return the mean entropy of the distributions that a text's characters were drawn from, in bits per character.

    They are the network's own, at temperature 1; see `next_character_entropy`. Without anything before it the first
    character does not count.
    """
    ids = torch.tensor([[*prompt, *text]], device=network.output.weight.device)
    before = next_character_entropy(network, ids)[0, max(len(prompt) - 1, 0) : -1] if text else ids[0, :0].float()
    return bits(float(before.mean()))


def distinct_4grams(text: str) -> float:
    """Return how many of a text's 4-grams of characters are different ones, as a share of all.

    It is distinct-n (Li et al., "A diversity-promoting objective function for neural conversation models", 2016), there
    of words. It falls as a text grows: compare texts of one length.
    """
    count = len(text) - 3
    return len({text[i : i + 4] for i in range(count)}) / count if count > 0 else math.nan


def loop_rate(text: str) -> float:
    """Return the share of a text's characters that only repeat a cycle.

    A loop is a stretch of `LOOP_LENGTH` characters or more in which some characters, `LONGEST_CYCLE` at most, come
    `LOOP_TURNS` times or more, one turn behind the other. Its first turn says something; what comes behind counts.
    (Holtzman et al., "The curious case of neural text degeneration", 2020, count the texts that end in a phrase three
    times or more.)
    """
    codes = np.array([ord(char) for char in text], dtype=np.int32)
    repeats = np.zeros(len(codes), dtype=bool)
    for period in range(1, min(len(codes) // LOOP_TURNS, LONGEST_CYCLE) + 1):
        same = np.r_[False, codes[period:] == codes[:-period], False]
        starts, stops = np.flatnonzero(same[1:] != same[:-1]).reshape(-1, 2).T
        lengths = period + stops - starts
        for i in np.flatnonzero((lengths >= LOOP_TURNS * period) & (lengths >= LOOP_LENGTH)):
            repeats[period + starts[i] : period + stops[i]] = True
    return float(repeats.mean()) if len(codes) else math.nan


def words(text: str) -> list[str]:
    """Return a text's words in lower case: two letters or more between all that is none.

    Not single letters, for nearly each stands somewhere by itself: they would make words of noise.
    """
    return _WORD.findall(text.lower())


class TrainingText:
    """The training split, as a measure of what a network wrote that has read it.

    Each measure reads the split once, in pieces, so that it may be memory-mapped.
    """

    def __init__(self, corpus: Corpus) -> None:
        self._vocabulary = corpus.vocabulary
        self._block = corpus.block
        self._segments = corpus.segments["train"]

    def measure(self, texts: Sequence[str]) -> list[dict[str, float]]:
        """Return `real_words`, `longest_copy` and `copied` of each text; see `charlm.copying` for the latter two."""
        copies = find_copying([self._vocabulary.encode(text) for text in texts], self._block, self._segments)
        return [
            {"real_words": share, "longest_copy": copy.longest, "copied": copy.share}
            for share, copy in zip(self.real_words(texts), copies, strict=True)
        ]

    def real_words(self, texts: Sequence[str]) -> list[float]:
        """Return the share of each text's words that are words of the training split, in whatever case.

        A word that reaches to the text's end is left out: there the sample's length may have cut it. In a script
        without spaces a word is as long as a clause, and the share says little.
        """
        written = [
            [found[0] for found in _WORD.finditer(text) if found.end() < len(text)] for text in map(str.lower, texts)
        ]
        unknown = {word for each in written for word in each}
        for piece in self._pieces():
            unknown.difference_update(words(piece))
            if not unknown:
                break
        return [sum(word not in unknown for word in each) / len(each) if each else math.nan for each in written]

    def _pieces(self) -> Iterator[str]:
        """Yield the split's text in pieces that end between words."""
        # A special symbol ends a document, as a newline does.
        codes = [ord(symbol) if len(symbol) == 1 else ord("\n") for symbol in self._vocabulary.symbols]
        table = np.array(codes, dtype="<u4")
        for start, stop in self._segments:
            rest = ""
            for first in range(start, stop, _PIECE):
                text = rest + table[self._block[first : min(first + _PIECE, stop)]].tobytes().decode("utf-32-le")
                cut = len(text)
                while first + _PIECE < stop and cut > len(text) - _LONGEST_WORD and _LETTER.match(text[cut - 1 : cut]):
                    cut -= 1
                rest = text[cut:]
                yield text[:cut]
