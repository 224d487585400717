"""From character to character in exact sums; on CUDA many characters at a time, as one graph.

What a text is does not depend on what is drawn beside it. But a GPU's libraries choose a kernel, and with it the order
of summation, by the number of rows. So no sum of products is rounded here. The state that is multiplied is a whole
number of units of 2^-24, at most 2^24 of them; the weights are in units of a power of two, fine enough to change
nothing, and coarse enough that every partial sum is a whole number of its units below 2^53. Those float64 holds
exactly, in whatever order they are added. All else goes element by element, or, in the draw, along a row.

Where there is no float64 (MPS), sums are rounded as elsewhere, and texts agree as far as the kernels do.

Legend: B samples, K characters at a time, V vocabulary, H hidden, G gates (4H in an LSTM, 3H in a GRU, H else).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from charlm.draw import draw, prepared
from charlm.errors import reason
from charlm.network import CharRNN
from charlm.vocabulary import FIRST_WRITTEN, Ids

log = logging.getLogger(__name__)

AT_A_TIME = {"cuda": 32}  # characters in a graph; starting it costs little beside them, and a reader sees no pause

# Characters, the prompt's among them, from which on `charlm.step_kernels` takes the place of torch's kernels on CUDA.
# It halves a step's time of 30 microseconds (256 texts, LSTM 128 on an H100), but takes 0.6 seconds to load in each
# process, and 2 the first time on a machine: one text of 40,000 characters pays for that, or a process that draws again
# and again. What is shorter, such as a training's samples, does without.
LONG = 1000

UNIT = 2.0**-24  # of the state; it is at most 1


def decode(
    network: CharRNN,
    prompt: Sequence[int],
    temperatures: Sequence[float],
    uniforms: npt.NDArray[np.float32],
    top_k: int | None,
    top_p: float | None,
) -> Iterator[Ids]:
    """Yield the next ids, shape (B,), for each row of `uniforms`; see `charlm.generate.Sampler.stream`."""
    device = network.output.weight.device
    length, samples = uniforms.shape
    kernels = own_kernels(device) if device.type == "cuda" and len(prompt) + length >= LONG else None
    weights = Weights(network, kernels)
    most = AT_A_TIME.get(device.type, 1)

    # The prompt, as one text.
    alone = Steps(weights, 1)
    ids = torch.tensor(prompt, dtype=torch.int64, device=device)[:, None]  # (characters, 1)
    piece = torch.zeros(most, 1, dtype=torch.int64, device=device)
    whole = len(prompt) // most * most

    def read(count: int) -> None:
        for k in range(count):
            alone.read(piece, k)

    if whole:
        replay = _recorded(read, most, alone)
        for part in torch.split(ids[:whole], most):
            piece.copy_(part)
            replay()
    for k in range(whole, len(prompt)):
        alone.read(ids, k)

    # What goes on from there.
    steps = Steps(weights, samples)
    steps.begin_as(alone)
    heat = torch.tensor(temperatures, dtype=weights.dtype, device=device)
    uniform = torch.from_numpy(uniforms).to(device)
    temperature, _ = prepared(heat, uniform[0])
    most = min(most, length)
    given = torch.zeros(most, samples, dtype=weights.dtype, device=device)
    drawn = torch.zeros(most, samples, dtype=torch.int64, device=device)
    choices = steps.logits.shape[1]
    in_one = kernels if kernels and choices <= kernels.LARGEST_CHOICE and top_k is None and top_p is None else None

    def write(count: int) -> None:
        for k in range(count):
            if in_one:
                in_one.draw(steps.logits, temperature, given, drawn, k)
            else:
                draw(steps.logits, steps.logits / temperature[:, None], given[k], top_k, top_p, out=drawn[k])
            steps.read(drawn, k, FIRST_WRITTEN)

    replay = _recorded(write, most, steps)
    earlier: Callable[[], Iterable[Ids]] = tuple
    for part in torch.split(uniform, most):
        given[: len(part)].copy_(prepared(heat, part)[1])
        replay()
        latest = _on_its_way(drawn[: len(part)] + FIRST_WRITTEN)
        yield from earlier()  # while the device goes on
        earlier = latest
    yield from earlier()


def _on_its_way(ids: Tensor) -> Callable[[], Iterable[Ids]]:
    """Start to copy ids to the host and return what waits for them, and for nothing that the device is told after."""
    there = ids.to("cpu", non_blocking=True)
    if ids.is_cuda:
        copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        copied.record()

    def arrived() -> Iterable[Ids]:
        if ids.is_cuda:
            copied.synchronize()
        rows: Ids = there.numpy()
        return rows

    return arrived


def _recorded(run: Callable[[int], None], count: int, steps: Steps) -> Callable[[], None]:
    """Return what does as `run(count)`: on CUDA the replay of its graph. The steps' state is left as it was."""
    device = steps.logits.device
    if device.type != "cuda":
        return partial(run, count)
    before = [place.clone() for place in steps.places]
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries load their kernels and take their memory at first
            run(1)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run(count)
    for place, value in zip(steps.places, before, strict=True):
        place.copy_(value)
    return graph.replay


class Weights:
    """A network's weights as the steps read them: float64, in units that keep sums of products exact.

    Args:
        network: on the device to draw on.
        kernels: `charlm.step_kernels`; None takes torch's.

    Attributes:
        table: the input gates of the first layer by character, without bias, shape (V, G).
        inputs: (H, G) of each layer but the first, which has the table.
        hidden: (H, G) of each layer.
        biases: of each layer, (G,) beside the input and (G,) beside the state.
        output: (H, V - 1) and (V - 1,), of the characters that can be written.
    """

    def __init__(self, network: CharRNN, kernels: ModuleType | None = None) -> None:
        rnn, output = network.rnn, network.output
        self.dtype = torch.float32 if output.weight.device.type == "mps" else torch.float64
        self.hidden_size, self.cell = rnn.hidden_size, rnn.mode.partition("_")[0].lower()
        self.step = kernels.step if kernels else step

        def parameter(name: str, layer: int) -> Tensor:
            value: Tensor = getattr(rnn, f"{name}_l{layer}").detach()
            return value.to(self.dtype)

        symbols = network.one_hot if network.embedding is None else network.embedding.weight.detach()  # (V, I)
        self.table = symbols.to(self.dtype) @ parameter("weight_ih", 0).T
        layers = range(rnn.num_layers)
        self.inputs = [in_units(parameter("weight_ih", i).T)[0] for i in layers[1:]]
        self.hidden = [in_units(parameter("weight_hh", i).T)[0] for i in layers]
        self.biases = [(parameter("bias_ih", i), parameter("bias_hh", i)) for i in layers]
        weight, bias = (part.detach()[FIRST_WRITTEN:].to(self.dtype) for part in (output.weight, output.bias))
        self.output = in_units(weight.T, bias)


def in_units(weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Round weights, shape (in, out), and a bias (out,) so that float64 holds every sum with a state exactly.

    As the state is at most 1, no partial sum exceeds what the column's absolute values sum to. In units of the product
    of the state's unit and theirs it must be a whole number of 53 bits.

    Returns:
        The weights by the unit of the state, which comes as a number of units, and the bias.
    """
    bias = weight.new_zeros(weight.shape[1]) if bias is None else bias
    if weight.dtype == torch.float64:
        largest = weight.abs().sum(dim=0) + bias.abs()  # (out,)
        # 53 bits less the state's 24, and one to spare, since to round may add a little.
        scale = 2.0 ** (28 - largest.frexp().exponent).to(weight.dtype)
        weight, bias = (part.mul(scale).round().div(scale) for part in (weight, bias))
    # Column by column in memory: one text's product takes cuBLAS a fraction of the time so (LSTM 128 on an H100: 32,000
    # characters a second row by row, 47,000 so).
    return (weight * UNIT).T.contiguous().T, bias


class Steps:
    """The layers, which read one character of each of B texts at a time.

    Attributes:
        logits: the scores of the characters behind those read, from `FIRST_WRITTEN` on, shape (B, V - 1).
    """

    def __init__(self, weights: Weights, samples: int) -> None:
        self._weights = weights
        zeros = weights.table.new_zeros
        self.logits = zeros(samples, weights.output[0].shape[1])
        self._units = [zeros(samples, weights.hidden_size) for _ in weights.hidden]  # the state, for products
        # What goes element by element: an LSTM's cell state, a GRU's state as it is.
        self._carried = [zeros(samples, weights.hidden_size) for _ in weights.hidden]

    @property
    def places(self) -> list[Tensor]:
        """Where the state lies, and the logits."""
        return [*self._units, *self._carried, self.logits]

    def begin_as(self, other: Steps) -> None:
        """Continue from the one text that `other` has read."""
        for mine, its in zip(self.places, other.places, strict=True):
            mine.copy_(its)

    def read(self, ids: Tensor, k: int, first: int = 0) -> None:
        """Read a character of each text, `first + ids[k]`, where ids has shape (K, B)."""
        weights = self._weights
        for layer, units in enumerate(self._units):
            characters = None if layer else (ids, k, first)
            below = self._units[layer - 1] @ weights.inputs[layer - 1] if layer else weights.table
            before = units @ weights.hidden[layer]
            weights.step(weights.cell, below, characters, before, weights.biases[layer], self._carried[layer], units)
        weight, bias = weights.output
        torch.addmm(bias, self._units[-1], weight, out=self.logits)


@cache
def own_kernels(device: torch.device) -> ModuleType | None:
    """Return `charlm.step_kernels` if it works on `device`.

    Triton compiles the kernels, for which it needs a C compiler and a folder to write to; torch's own need neither.
    """
    try:
        from charlm import step_kernels

        one = torch.ones(1, 1, dtype=torch.float64, device=device)
        ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
        step_kernels.step("rnn", one, (ids, 0, 0), one, (one[0], one[0]), one.clone(), one.clone())
        step_kernels.draw(one * torch.tensor([0.0, 2.0, 1.0], device=device), one[0], one / 2, ids, 0)
        if ids.item() != 1:
            raise RuntimeError("a wrong result")
    except Exception as error:  # whatever is missing or fails
        log.info(
            "long texts are drawn by torch's kernels, at half the speed, for Triton's do not work: %s", reason(error)
        )
        return None
    return step_kernels


def step(
    cell: str,
    below: Tensor,
    characters: tuple[Tensor, int, int] | None,
    before: Tensor,
    biases: tuple[Tensor, Tensor],
    carried: Tensor,
    units: Tensor,
) -> None:
    """Do what `charlm.step_kernels.step` does by torch's operations."""
    if characters is not None:
        ids, k, first = characters
        below = below[first:].index_select(0, ids[k])
    state, then = _CELLS[cell](below, before, carried, *biases)
    if then is not carried:
        carried.copy_(then)
    torch.div(state, UNIT, rounding_mode="trunc", out=units)


# The cells, as torch's layers define them. x and y are the gates from below and from before, (B, G); each returns the
# state, and what it wants of this step in the next. On CUDA torch has an LSTM's and a GRU's as one kernel.


def _lstm(x: Tensor, y: Tensor, c: Tensor, b_x: Tensor, b_y: Tensor) -> tuple[Tensor, Tensor]:
    if x.is_cuda:
        h, c, _ = torch.ops.aten._thnn_fused_lstm_cell(x, y, c, b_x, b_y)
        return h, c
    i, f, g, o = (x + y + (b_x + b_y)).chunk(4, dim=1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(x: Tensor, y: Tensor, h: Tensor, b_x: Tensor, b_y: Tensor) -> tuple[Tensor, Tensor]:
    if x.is_cuda:
        h, _ = torch.ops.aten._thnn_fused_gru_cell(x, y, h, b_x, b_y)
        return h, h
    (r_x, z_x, n_x), (r_y, z_y, n_y) = (x + b_x).chunk(3, dim=1), (y + b_y).chunk(3, dim=1)
    n = (n_x + (r_x + r_y).sigmoid() * n_y).tanh()
    h = n + (z_x + z_y).sigmoid() * (h - n)
    return h, h


def _rnn(x: Tensor, y: Tensor, unused: Tensor, b_x: Tensor, b_y: Tensor) -> tuple[Tensor, Tensor]:
    return (x + y + (b_x + b_y)).tanh(), unused


_CELLS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"lstm": _lstm, "gru": _gru, "rnn": _rnn}
