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

from charlm.config import SamplingConfig
from charlm.errors import InputError
from charlm.network import CharRNN, State
from charlm.vocabulary import UNKNOWN, Vocabulary


def draw(
    logits: Tensor, temperature: Tensor, uniform: Tensor, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Choose the next character of each sample.

    Temperature divides the logits before the softmax; 0 takes the largest, infinity makes all equally likely. Top-k
    (Fan et al., "Hierarchical neural story generation", 2018) keeps the k likeliest; top-p (Holtzman et al., "The
    curious case of neural text degeneration", 2020) the fewest whose probabilities at this temperature sum to p.

    Args:
        logits: shape (B, V); minus infinity rules a character out.
        temperature: of each sample, shape (B,).
        uniform: random numbers in [0, 1), shape (B,); the choice is the inverse of the cumulative distribution there.
        top_k: None keeps all.
        top_p: None keeps all.

    Returns:
        Ids, shape (B,).
    """
    exact = torch.float32 if logits.device.type == "mps" else torch.float64  # MPS has no float64
    logits = logits.to(exact)
    if top_k is not None and top_k < logits.shape[1]:
        least = logits.topk(top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    # From the largest down, so that a tiny temperature sends the others to minus infinity and none to plus infinity.
    scaled = (logits - logits.amax(dim=1, keepdim=True)) / temperature.to(logits)[:, None]
    scaled = scaled.masked_fill(logits == -torch.inf, -torch.inf)  # -inf / inf is not a number
    probabilities = scaled.softmax(dim=1)  # (B, V)
    if top_p is not None:
        ordered, order = probabilities.sort(dim=1, descending=True, stable=True)
        surplus = ordered.cumsum(dim=1) - ordered >= top_p  # where those before already suffice
        probabilities = probabilities.masked_fill(surplus.gather(1, order.argsort(dim=1)), 0.0)
    cumulative = probabilities.cumsum(dim=1)
    target = uniform.to(logits)[:, None] * cumulative[:, -1:]
    ids = torch.searchsorted(cumulative, target, right=True).squeeze(1)  # never one of probability 0
    # Rounding can send the target up to the very end, behind the last that has a probability.
    last = (probabilities > 0).long().mul(torch.arange(logits.shape[1], device=logits.device)).amax(dim=1)
    return torch.where(temperature.to(logits) == 0, logits.argmax(dim=1), torch.minimum(ids, last))


def prompt_ids(vocabulary: Vocabulary, prompt: str, on_unknown: str = "error") -> list[int]:
    """Encode a prompt.

    Args:
        vocabulary: the network's.
        prompt: what the text goes on from.
        on_unknown: "replace" reads a character that the vocabulary lacks as `<unk>`.

    Raises:
        InputError: such a character, with `on_unknown="error"`.
    """
    missing = vocabulary.missing(prompt)
    if missing and on_unknown == "error":
        names = ", ".join(f"{char!r} (U+{ord(char):04X})" for char in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise InputError(
            f"the prompt has {names}{more}, which the training text lacks; leave it out, or have it read as {UNKNOWN} "
            "with on_unknown=replace"
        )
    return [int(i) for i in vocabulary.encode(prompt)]


@torch.inference_mode()
def next_character_entropy(network: CharRNN, ids: Tensor) -> Tensor:
    """Return how unsure the network is of the character behind each one.

    The entropy (Shannon, "A mathematical theory of communication", 1948) of its own distribution over all symbols: at
    temperature 1, whatever the text was drawn at. One forward pass scores the whole text; of a prompt and a text of n
    characters, `[:, -n - 1 : -1]` belongs to the n drawn ones.

    Args:
        network: on the device of `ids`.
        ids: int32 or int64, shape (B, T).

    Returns:
        Nats, between 0 and log V, shape (B, T).
    """
    training = network.training
    network.eval()
    try:
        log_probabilities = network(ids)[0].float().log_softmax(dim=-1)  # (B, T, V)
    finally:
        network.train(training)
    entropy: Tensor = torch.special.entr(log_probabilities.exp()).sum(dim=-1)
    return entropy


@dataclass(frozen=True)
class Sampler:
    """Draws texts from a network.

    The same seed gives the same text, whatever else is drawn beside it: each sample has random numbers of its own.
    """

    network: CharRNN
    vocabulary: Vocabulary
    top_k: int | None = None
    top_p: float | None = None

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
        device = self.network.output.weight.device
        samples = len(temperatures)
        temperature = torch.tensor(temperatures, dtype=torch.float32, device=device)
        # Random numbers of each sample's own, other ones at another temperature.
        keys = [(*seed, int(np.float64(t).view(np.uint64))) for seed, t in zip(seeds, temperatures, strict=True)]
        uniform = np.stack([np.random.default_rng(key).random(length, dtype=np.float32) for key in keys], axis=1)
        uniforms = torch.from_numpy(uniform).to(device)  # (length, B)
        training = self.network.training
        self.network.eval()
        try:
            logits, state = self._prime(self._begin(prompt), samples, device)
            for i in range(length):
                with torch.inference_mode():
                    ids = draw(logits, temperature, uniforms[i], self.top_k, self.top_p)
                    yield ids.tolist()
                    logits, state = self._step(ids[:, None], state)
        finally:
            self.network.train(training)

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
        ended = [False] * len(temperatures)
        tails = [""] * len(temperatures)
        for ids in self.stream(prompt, length, temperatures, seeds):
            pieces = []
            for sample, i in enumerate(ids):
                ended[sample] = ended[sample] or i == self.vocabulary.end_id
                pieces.append("" if ended[sample] else self.vocabulary.symbols[i])
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
        texts = [""] * len(temperatures)
        for pieces in self.grow(prompt, length, temperatures, seeds):
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        return texts

    def _begin(self, prompt: Sequence[int]) -> Sequence[int]:
        if prompt:
            return prompt
        newline = int(self.vocabulary.encode("\n")[0])
        if self.vocabulary.end_id is not None:
            return [self.vocabulary.end_id]
        return [newline] if newline != self.vocabulary.unknown_id else []

    @torch.inference_mode()
    def _prime(self, prompt: Sequence[int], samples: int, device: torch.device) -> tuple[Tensor, State | None]:
        if not prompt:
            return self._ruled_out(torch.zeros(samples, len(self.vocabulary), device=device)), None
        logits, state = self._step(torch.tensor([prompt], device=device), None)
        repeated = tuple(part.repeat(1, samples, 1) for part in (state if isinstance(state, tuple) else (state,)))
        return logits.repeat(samples, 1), repeated if len(repeated) == 2 else repeated[0]

    def _step(self, ids: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Read ids (B, T) and return the logits behind the last one, (B, V)."""
        logits, state = self.network(ids, state)
        return self._ruled_out(logits[:, -1]), state

    def _ruled_out(self, logits: Tensor) -> Tensor:
        logits[:, self.vocabulary.unknown_id] = -torch.inf  # stands for no character that could be written
        return logits


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
