"""The sampler: text from a network, character by character.

Legend: B samples side by side, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from charlm import decode_cpu, decode_exact
from charlm.config import SamplingConfig
from charlm.errors import InputError
from charlm.network import CharRNN
from charlm.vocabulary import UNKNOWN, Ids, Vocabulary

_PIECE = 1024  # characters read at a time


def prompt_ids(vocabulary: Vocabulary, prompt: str, on_unknown: str = "error", section: str = "") -> list[int]:
    """Encode a prompt.

    Args:
        vocabulary: the network's.
        prompt: what the text goes on from.
        on_unknown: "replace" reads a character that the vocabulary lacks as `<unk>`.
        section: where that is set, such as "sampling.", for the message.

    Raises:
        InputError: such a character, with `on_unknown="error"`.
    """
    missing = vocabulary.missing(prompt)
    if missing and on_unknown == "error":
        names = ", ".join(f"{char!r} (U+{ord(char):04X})" for char in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise InputError(
            f"the prompt has {names}{more}, which the training text lacks; leave it out, or have it read as {UNKNOWN} "
            f"with {section}on_unknown=replace"
        )
    return [int(i) for i in vocabulary.encode(prompt)]


def beginning(vocabulary: Vocabulary, prompt: Sequence[int]) -> Sequence[int]:
    """Return what is read before a text: the prompt, or where there is none what a document follows upon.

    That is `<eos>` or a newline, or nothing where the vocabulary has neither.
    """
    if prompt:
        return prompt
    if vocabulary.end_id is not None:
        return [vocabulary.end_id]
    newline = int(vocabulary.encode("\n")[0])
    return [newline] if newline != vocabulary.unknown_id else []


@torch.inference_mode()
def next_character_entropy(network: CharRNN, ids: Tensor) -> Tensor:
    """Return how unsure the network is of the character behind each one.

    The entropy (Shannon, "A mathematical theory of communication", 1948) of its own distribution over all symbols: at
    temperature 1, whatever the text was drawn at. Of a prompt and a text of n
    characters, `[:, -n - 1 : -1]` belongs to the n drawn ones.

    Args:
        network: on the device of `ids`.
        ids: int32 or int64, shape (B, T).

    Returns:
        Nats, between 0 and log V, shape (B, T).
    """
    training = network.training
    network.eval()
    entropies, state = [], None
    try:
        for piece in torch.split(ids, _PIECE, dim=1):  # a long text's distributions would fill the memory
            logits, state = network(piece, state)  # (B, T, V)
            log_probabilities = logits.float().log_softmax(dim=-1)
            entropies.append(torch.special.entr(log_probabilities.exp()).sum(dim=-1))
    finally:
        network.train(training)
    return torch.cat(entropies, dim=1)


@dataclass(frozen=True)
class Sampler:
    """Draws texts from a network.

    The same seed gives the same text on the same device, whatever is drawn beside it and in whatever portions: each
    sample has random numbers of its own, and its scores come out the same to the last bit (charlm/products.py and
    charlm/decode_exact.py say how). On another device a score may differ in its last bits, and a text fork. So may it,
    in the last of 64, where one portion is shorter than 1,000 characters and another is not, on CUDA: other kernels.

    Args:
        network: on the device to draw on.
        vocabulary: the network's.
        top_k: as in `charlm.draw.draw`.
        top_p: as there.
        weights: "float32" draws from the network as it is. "int8" rounds weights and states to 8 bits, as "auto" does
            on a CPU where a large network's text comes faster so.

    Raises:
        InputError: "int8" is not available.
    """

    network: CharRNN
    vocabulary: Vocabulary
    top_k: int | None = None
    top_p: float | None = None
    weights: str = "auto"

    def __post_init__(self) -> None:
        if self.weights == "int8" and decode_cpu.product_of(self.network, self.weights) is None:
            device = self.network.output.weight.device
            raise InputError(
                f"weights=int8 is not available on this {device.type}: it needs device=cpu, and there instructions for "
                "whole numbers of 8 bits (such as AVX512-VNNI) that this torch makes use of"
            )

    @property
    def arithmetic(self) -> str:
        """What `weights` comes to: float32 or int8."""
        return decode_cpu.chosen(self.network, self.weights)

    def stream(
        self, prompt: Sequence[int], length: int, temperatures: Sequence[float], seeds: Sequence[tuple[int, int]]
    ) -> Iterator[list[int]]:
        """Yield the next id of each sample, `length` times.

        Args:
            prompt: ids to go on from. Where there are none the text begins as a document does, behind `<eos>` or a
                newline; if the vocabulary has neither, with any of its characters.
            length: characters to draw.
            temperatures: of each sample.
            seeds: of each sample; (seed, sample number).
        """
        return (ids.tolist() for ids in self._ids(prompt, length, temperatures, seeds))

    def grow(
        self,
        prompt: Sequence[int],
        length: int,
        temperatures: Sequence[float],
        seeds: Sequence[tuple[int, int]],
        stop: str | None = None,
    ) -> Iterator[list[str]]:
        """Yield the next piece of each text: a character, or nothing where the text has ended.

        A text ends at its first `<eos>`, which is not shown, or behind its first `stop`, which is. Once all have ended,
        nothing more is drawn. The arguments are those of `stream`.
        """
        symbols, end_id = self.vocabulary.symbols, self.vocabulary.end_id
        ids_of_all = self.stream(prompt, length, temperatures, seeds)
        if end_id is None and stop is None:
            yield from ([symbols[i] for i in ids] for ids in ids_of_all)
            return
        ended = [False] * len(temperatures)
        tails = [""] * len(temperatures)
        for ids in ids_of_all:
            pieces = []
            for sample, i in enumerate(ids):
                ended[sample] = ended[sample] or i == end_id
                pieces.append("" if ended[sample] else symbols[i])
                if stop is not None and not ended[sample]:
                    tails[sample] = (tails[sample] + pieces[-1])[-len(stop) :]
                    ended[sample] = tails[sample] == stop
            yield pieces
            if all(ended):
                return

    def texts(
        self, prompt: Sequence[int], length: int, temperatures: Sequence[float], seeds: Sequence[tuple[int, int]]
    ) -> list[str]:
        """Return the whole texts that `grow` draws."""
        end_id, decode = self.vocabulary.end_id, self.vocabulary.decode
        drawn = np.empty((length, len(temperatures)), dtype=self.vocabulary.dtype)
        ended = np.zeros(len(temperatures), dtype=bool)
        count = 0
        for count, ids in enumerate(self._ids(prompt, length, temperatures, seeds), start=1):
            drawn[count - 1] = ids
            if end_id is not None:
                ended |= ids == end_id
                if ended.all():
                    break
        texts = np.ascontiguousarray(drawn[:count].T)
        if end_id is None:
            return [decode(ids) for ids in texts]
        return [decode(ids[: next(iter(np.flatnonzero(ids == end_id)), None)]) for ids in texts]

    def _ids(
        self, prompt: Sequence[int], length: int, temperatures: Sequence[float], seeds: Sequence[tuple[int, int]]
    ) -> Iterator[Ids]:
        # Random numbers of each sample's own, other ones at another temperature.
        uniforms = np.empty((len(temperatures), length), dtype=np.float32)
        for row, seed, temperature in zip(uniforms, seeds, temperatures, strict=True):
            key = (*seed, int(np.float64(temperature).view(np.uint64)))
            np.random.default_rng(key).random(dtype=np.float32, out=row)
        given = self.network, beginning(self.vocabulary, prompt), temperatures, uniforms.T, self.top_k, self.top_p
        arithmetic = self.arithmetic
        if length and decode_cpu.product_of(self.network, arithmetic):
            yield from decode_cpu.decode(*given, arithmetic)
        elif length:
            yield from decode_exact.decode(*given)


def sample_rows(
    network: CharRNN,
    vocabulary: Vocabulary,
    sampling: SamplingConfig,
    temperatures: Sequence[float],
    seed: int,
    step: int,
) -> list[dict[str, Any]]:
    """Draw a text at each temperature, as rows of a run's samples.jsonl: step, temperature, prompt, text.

    Raises:
        InputError: the prompt has characters that the training text lacks.
    """
    prompt = prompt_ids(vocabulary, sampling.prompt, sampling.on_unknown)
    sampler = Sampler(network, vocabulary, sampling.top_k, sampling.top_p)
    texts = sampler.texts(prompt, sampling.length, temperatures, [(seed, 0)] * len(temperatures))
    return [
        {"step": step, "temperature": temperature, "prompt": sampling.prompt, "text": text}
        for temperature, text in zip(temperatures, texts, strict=True)
    ]
