"""What a test figure stands beside: two compressors, and an n-gram model of the same training text.

A model that predicts a text well would compress it well, to as many bits as its loss says (Shannon, "A mathematical
theory of communication", 1948). So what a compressor makes of the test text is a bound that a model should stay far
below; an n-gram model, which only counts, is what a network has to beat to have learnt more than which characters
follow which.
"""

from __future__ import annotations

import bz2
import lzma
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from charlm.corpus import Corpus, Segment
from charlm.metrics import bits
from charlm.vocabulary import Ids

Int64 = npt.NDArray[np.int64]
Float64 = npt.NDArray[np.float64]


def baselines(corpus: Corpus, order: int) -> dict[str, float]:
    """Return what compressors and an n-gram model come to on the test split, by the names of result.json.

    Bits per character of bzip2 and xz, each at its best setting; those that the test text adds to an xz archive of the
    training text; and nats and bits per character of an n-gram model of the training split.

    Args:
        corpus: with a test split.
        order: n: how many characters the n-gram model looks at, the one to predict among them.
    """
    test, train = (_text(corpus, split) for split in ("test", "train"))
    characters = corpus.characters("test")
    segments = corpus.segments
    nats = ngram_nats(corpus.block, segments["train"], segments["test"], order, len(corpus.vocabulary)).mean()
    return {
        "baseline/ngram_order": order,
        "baseline/ngram_loss": float(nats),
        "baseline/ngram_bpc": bits(float(nats)),
        "baseline/bzip2_bpc": 8 * len(bz2.compress(test)) / characters,
        "baseline/xz_bpc": 8 * _xz(test) / characters,
        "baseline/xz_given_train_bpc": 8 * (_xz(train + test) - _xz(train)) / characters,
    }


def _text(corpus: Corpus, split: str) -> bytes:
    pieces = (corpus.vocabulary.decode(corpus.block[start:stop]) for start, stop in corpus.segments[split])
    return "".join(pieces).encode()


def _xz(data: bytes) -> int:
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def ngram_nats(
    block: Ids, train: Sequence[Segment], test: Sequence[Segment], order: int, vocabulary_size: int
) -> Float64:
    """Return -ln p of each character of `test` under an n-gram model of `train`, segment after segment.

    Interpolated modified Kneser-Ney (Chen and Goodman, "An empirical study of smoothing techniques for language
    modeling", 1999, section 4.1). With c the counts, h a context, h' the same without its first character, and D the
    discount, which depends on whether c is 1, 2 or more,

        p(w | h) = (c(hw) - D(c(hw)) + p(w | h') * sum over v of D(c(hv))) / sum over v of c(hv)

    where c counts occurrences in the longest contexts, and in shorter ones the different characters that stand before
    hw. What is below the empty context gives every symbol of the vocabulary the same.

    Args:
        block: ids of a text, shape (characters,).
        train: segments of the block to count in.
        test: segments of the block to predict. No context reaches back out of its segment.
        order: n, 1 or more.
        vocabulary_size: V.
    """
    # One sequence, train before test. Before each segment stand borders, so many that no context reaches over them.
    border = vocabulary_size
    fence = np.full(order - 1, border, dtype=np.int64)
    text = np.concatenate([part for a, b in (*train, *test) for part in (fence, block[a:b].astype(np.int64))])
    learnt = sum(len(fence) + b - a for a, b in train)
    counted, asked = text[:learnt] != border, text[learnt:] != border
    symbols = vocabulary_size + 1

    contexts = [np.zeros(len(text), dtype=np.int64)]  # by length: the number of the context before each character
    for _ in range(1, order):
        longer = np.zeros(len(text), dtype=np.int64)
        longer[1:] = contexts[-1][:-1] * symbols + text[:-1]
        contexts.append(_numbered(longer))
    grams = [_numbered(context * symbols + text) for context in contexts]

    probability = np.full(int(asked.sum()), 1 / vocabulary_size)
    for length in range(order):
        context, gram = contexts[length], grams[length]
        if length == order - 1:
            seen = gram[:learnt][counted]
        else:  # each longer n-gram once, however often it occurs
            longer = grams[length + 1][:learnt]
            _, first = np.unique(longer[counted], return_index=True)
            seen = gram[:learnt][counted][first]
        count = np.bincount(seen, minlength=int(gram.max()) + 1)
        discount = _discounts(count)[np.minimum(count, 3)]
        owner = np.zeros(len(count), dtype=np.int64)  # the context of each n-gram
        owner[gram] = context
        total = np.bincount(owner, weights=count)
        left = np.bincount(owner, weights=discount)
        g, h = gram[learnt:][asked], context[learnt:][asked]
        known = total[h] > 0
        finer = (count[g] - discount[g] + left[h] * probability) / np.where(known, total[h], 1)
        probability = np.where(known, finer, probability)
    nats: Float64 = -np.log(probability)
    return nats


def _numbered(keys: Int64) -> Int64:
    """Return numbers from 0 on in the place of keys, equal for equal ones."""
    number: Int64 = np.unique(keys, return_inverse=True)[1]
    return number


def _discounts(count: Int64) -> Float64:
    """Return the discounts of counts 0, 1, 2 and 3 or more (Chen and Goodman, equation 26).

    Where a text is too small or too even to estimate one, it is that of absolute discounting, and without even that
    half a count.
    """
    with_count = [int((count == times).sum()) for times in range(1, 5)]
    y = with_count[0] / (with_count[0] + 2 * with_count[1]) if with_count[0] and with_count[1] else 0.5
    discounts = [0.0]
    for times, (here, more) in enumerate(pairwise(with_count), start=1):
        discount = times - (times + 1) * y * more / here if here and more else y
        discount = discount if discount > 0 else y  # of 0, nothing would be left for what was not seen
        discounts.append(min(discount, float(times)))
    return np.array(discounts)
