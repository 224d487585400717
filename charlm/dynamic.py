"""Dynamic evaluation: a model that goes on learning from the text that it is tested on, as it reads it.

Each piece of the text is scored before the weights learn from it, so that the figure stays one of prediction. What a
text has of its own, such as its names, is learnt on the way (Krause et al., "Dynamic evaluation of neural sequence
models", 2018). The model that is kept is not touched.

Legend: B batch, T window, V vocabulary.
"""

from __future__ import annotations

import copy
import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from charlm.config import EvaluationConfig
from charlm.corpus import Corpus
from charlm.network import CharRNN, State, detached
from charlm.regularization import Regularizer
from charlm.windows import ShuffledBatches, Windows, gather

log = logging.getLogger(__name__)

STATISTICS_BATCH = 64  # windows of the training text whose gradients are averaged, and how many such batches
STATISTICS_BATCHES = 100
# Of the first 24,000 characters of Tiny Shakespeare's test text, an LSTM of 384 units: 1.417 nats without, 1.361 by sgd
# at 0.1, 1.360 by rms at 2e-4; a few times as high, either is no better than nothing.
DEFAULT_RATES = {"sgd": 0.1, "rms": 2e-4}
EPSILON = 1e-3  # keeps the RMS rule from dividing by what hardly ever changes (Krause et al.'s code for characters)


def dynamic_loss(network: CharRNN, corpus: Corpus, config: EvaluationConfig, device: torch.device) -> float:
    """Return the loss on the test split of a copy of `network` that learns while it reads, in nats per character.

    It reads each segment from beginning to end, in one place at a time, so that a long text takes its time. With g the
    gradient of a piece, theta_0 the weights that training came to, eta and lambda the rate and decay of `config`, each
    piece is followed by

        sgd   theta += -eta g + lambda (theta_0 - theta)
        rms   theta += -eta g / (r + epsilon) + min(1, lambda r / mean(r)) (theta_0 - theta)

    where r is the root of the mean square of the gradients on the training text.

    Args:
        network: what is tested.
        corpus: with a test split.
        config: rule, rate, decay and length of a piece.
        device: where to compute.
    """
    network = _plain(network).to(device)
    block = torch.from_numpy(corpus.block)
    assert config.dynamic is not None
    rate = config.dynamic_learning_rate or DEFAULT_RATES[config.dynamic]
    weights = list(network.parameters())
    begin = [weight.detach().clone() for weight in weights]
    if config.dynamic == "rms":
        roots = _gradient_roots(network, block, corpus, config.dynamic_window)
        mean = torch.cat([root.flatten() for root in roots]).mean()
        scales = [1 / (root + EPSILON) for root in roots]
        pulls = [(config.dynamic_decay * root / mean).clamp(max=1) for root in roots]
    else:
        scales = [torch.ones_like(weight) for weight in begin]
        pulls = [torch.full_like(weight, config.dynamic_decay) for weight in begin]

    nats, characters = torch.zeros((), dtype=torch.float64, device=device), 0
    for start, stop in corpus.segments["test"]:
        state: State | None = None
        for at in range(start, stop - 1, config.dynamic_window):
            piece = block[at : min(at + config.dynamic_window + 1, stop)].to(device)[None].long()  # (1, T + 1)
            loss, state = _loss(network, piece, state)
            nats += loss.detach().double() * (piece.shape[1] - 1)
            characters += piece.shape[1] - 1
            gradients = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                for weight, first, gradient, scale, pull in zip(weights, begin, gradients, scales, pulls, strict=True):
                    weight.add_(pull * (first - weight) - rate * scale * gradient)
    return float(nats) / characters


def _plain(network: CharRNN) -> CharRNN:
    """Return a copy that computes as in evaluation, but in training mode: cuDNN learns in no other. Its one-hot vectors
    are of ones, for which the rates are.
    """
    copied = copy.deepcopy(network).train()
    copied.rnn.dropout = 0.0
    copied.dropout = nn.Dropout(0.0)
    copied.regularizer = Regularizer()
    if copied.embedding is None:
        scale = float(copied.one_hot[0, 0])
        copied.one_hot.div_(scale)
        copied.rnn.weight_ih_l0.data.mul_(scale)
    return copied


def _loss(network: CharRNN, tokens: Tensor, state: State | None) -> tuple[Tensor, State]:
    """Return the mean loss of tokens (B, T + 1), and the state behind them, cut off from how it came about."""
    logits, state = network(tokens[:, :-1], state)
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return loss, detached(state)


def _gradient_roots(network: CharRNN, block: Tensor, corpus: Corpus, window: int) -> list[Tensor]:
    """Return the root of the mean square gradient of each weight on batches of the training text."""
    longest = max(stop - start for start, stop in corpus.segments["train"])
    windows = Windows(corpus.segments["train"], window := min(window, longest - 1))
    batch_size = min(STATISTICS_BATCH, len(windows))
    weights = list(network.parameters())
    squares = [torch.zeros_like(weight) for weight in weights]
    batches = min(STATISTICS_BATCHES, len(windows) // batch_size)
    order = ShuffledBatches(block, windows, batch_size, seed=0).starts(epoch=0, start=0)
    for _ in range(batches):
        tokens = gather(block, next(order), window).to(weights[0].device).long()
        gradients = torch.autograd.grad(_loss(network, tokens, None)[0], weights)
        for square, gradient in zip(squares, gradients, strict=True):
            square += gradient**2
    return [(square / batches).sqrt() for square in squares]
