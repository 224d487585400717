"""The two ways from character to character score as the network does, and a text is its own whatever surrounds it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from fractions import Fraction
from importlib.util import find_spec
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from charlm import decode_cpu, decode_exact, products
from charlm.draw import Drawer, draw, prepared
from charlm.errors import InputError
from charlm.generate import Sampler
from charlm.network import CharRNN
from charlm.vocabulary import FIRST_WRITTEN, UNKNOWN, Vocabulary

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
COMPILES = find_spec("triton") and (os.environ.get("CC") or any(map(shutil.which, ("cc", "gcc", "clang"))))
triton = pytest.mark.skipif(
    not (torch.cuda.is_available() and COMPILES), reason="needs a CUDA device, Triton and a C compiler"
)


class OwnKernels:
    """`decode_exact` as it draws long texts on CUDA."""

    Steps = decode_exact.Steps

    @staticmethod
    def Weights(network: CharRNN) -> decode_exact.Weights:
        kernels = decode_exact.own_kernels(network.output.weight.device)
        assert kernels is not None
        return decode_exact.Weights(network, kernels)

    @staticmethod
    def decode(*given: Any, **rules: Any) -> Iterator[Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode_exact, "LONG", 0)
            yield from decode_exact.decode(*given, **rules)


cells = pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
WAYS = [
    pytest.param(decode_cpu, "cpu", id="cpu"),
    pytest.param(decode_exact, "cpu", id="exact"),
    pytest.param(decode_exact, "cuda", id="graph", marks=cuda),
    pytest.param(OwnKernels, "cuda", id="own-kernels", marks=triton),
]
ways = pytest.mark.parametrize(("way", "device"), WAYS)
SYMBOLS = [UNKNOWN, "\n", *(chr(code) for code in range(97, 157))]


def network(
    cell: str = "lstm",
    size: int = 48,
    layers: int = 2,
    device: str = "cpu",
    symbols: int = len(SYMBOLS),
    **options: Any,
) -> CharRNN:
    """Return a network whose state is far from 0 and from its bounds, as a trained one's."""
    torch.manual_seed(1)
    made = CharRNN(symbols, cell, size, layers, **options).to(device)
    for parameter in made.parameters():
        parameter.data.mul_(1.5)
    return made.eval()


def drawn(way: Any, made: CharRNN, samples: int, length: int, prompt: tuple[int, ...] = (3,), **options: Any) -> Any:
    """Return ids, shape (length, samples), sample i with random numbers of its own and one of three temperatures."""
    uniforms = np.stack([np.random.default_rng(i).random(length, dtype=np.float32) for i in range(samples)], axis=1)
    temperatures = [(0.7, 1.0, 1.4)[i % 3] for i in range(samples)]
    rules = {"top_k": None, "top_p": None, **options}
    return np.array(list(way.decode(made, prompt, temperatures, uniforms, **rules)))


def read(steps: decode_cpu.Steps | decode_exact.Steps, ids: torch.Tensor) -> None:
    if isinstance(steps, decode_cpu.Steps):
        steps.read(ids.numpy())
    else:
        steps.read(ids.to(steps.logits.device)[None], 0)


@ways
@cells
@pytest.mark.parametrize(
    ("layers", "options"),
    [(1, {}), (3, {}), (1, {"one_hot_scale": 8.0}), (2, {"embedding_size": 20}), (2, {"tied": True})],
    ids=str,
)
def test_steps_score_as_the_network_does(
    cell: str, layers: int, options: dict[str, Any], way: Any, device: str
) -> None:
    made = network(cell, 48, layers, **options)
    ids = torch.randint(0, len(SYMBOLS), (3, 50), generator=torch.Generator().manual_seed(2))
    scores = made(ids)[0][:, :, FIRST_WRITTEN:].detach()  # on a CPU: cuDNN's are rounded more coarsely
    made.to(device)
    weights = way.Weights(made)
    steps = way.Steps(weights, 3)
    for i in range(50):
        read(steps, ids[:, i])
        assert torch.as_tensor(steps.logits).cpu().numpy() == pytest.approx(scores[:, i].numpy(), abs=2e-5)


@ways
@cells
@pytest.mark.parametrize("size", [33, 128])
def test_scores_are_the_same_to_the_last_bit_whatever_is_beside_them(
    cell: str, size: int, way: Any, device: str
) -> None:
    made = network(cell, size, device=device)
    weights = way.Weights(made)
    most = 130
    ids = torch.randint(0, len(SYMBOLS), (40, most), generator=torch.Generator().manual_seed(2))

    def scores(chosen: slice) -> torch.Tensor:
        steps = way.Steps(weights, len(range(most)[chosen]))
        rows = []
        for row in ids[:, chosen]:
            read(steps, row)
            rows.append(torch.as_tensor(steps.logits).cpu().clone())
        return torch.stack(rows)  # (characters, B, V - 1)

    all_of_them = scores(slice(None))
    for chosen in (
        slice(0, 1),
        slice(77, 78),
        slice(129, 130),
        slice(5, 7),
        slice(60, 71),
        slice(1, 66),
        slice(2, 130),
    ):
        assert torch.equal(scores(chosen), all_of_them[:, chosen])


@ways
@cells
@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.9}], ids=str)
def test_a_text_is_its_own_whatever_is_drawn_beside_it(
    cell: str, options: dict[str, Any], way: Any, device: str
) -> None:
    made = network(cell, device=device)
    together = drawn(way, made, 70, 90, **options)
    for samples, length in ((1, 90), (1, 31), (2, 64), (3, 33), (20, 7), (65, 90)):
        assert np.array_equal(drawn(way, made, samples, length, **options), together[:length, :samples])


@ways
def test_a_text_goes_on_from_its_prompt_to_the_last_bit(way: Any, device: str) -> None:
    made = network(device=device)
    whole = drawn(way, made, 1, 200)[:, 0]
    for cut in (1, 31, 32, 33, 150):
        uniforms = np.random.default_rng(0).random(200, dtype=np.float32)[cut:, None]
        rest = list(way.decode(made, (3, *whole[:cut]), [0.7], uniforms, None, None))
        assert [i for (i,) in rest] == whole[cut:].tolist()


@pytest.mark.parametrize("at_a_time", [2, 7, 32])
def test_how_many_characters_a_graph_holds_changes_no_text(at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network()
    prompt = tuple(range(1, 20))
    one_by_one = drawn(decode_exact, made, 3, 50, prompt)
    monkeypatch.setitem(decode_exact.AT_A_TIME, "cpu", at_a_time)
    assert np.array_equal(drawn(decode_exact, made, 3, 50, prompt), one_by_one)


@cuda
@pytest.mark.parametrize("options", [{}, {"top_k": 5, "top_p": 0.8}], ids=str)
def test_a_graph_draws_what_its_kernels_draw(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    made = network(device="cuda")
    graph = drawn(decode_exact, made, 5, 70, tuple(range(1, 50)), **options)
    monkeypatch.setitem(decode_exact.AT_A_TIME, "cuda", 1)
    monkeypatch.setattr(decode_exact, "_recorded", lambda run, count, steps: lambda: run(count))
    assert np.array_equal(drawn(decode_exact, made, 5, 70, tuple(range(1, 50)), **options), graph)


@triton
@cells
@pytest.mark.parametrize(("size", "symbols"), [(48, 62), (200, 62), (48, 700), (48, 5000)])
@pytest.mark.parametrize("temperature", [0.0, 0.7, float("inf")])
def test_own_kernels_draw_what_torchs_do(
    cell: str, size: int, symbols: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = network(cell, size, device="cuda", symbols=symbols)
    uniforms = np.random.default_rng(1).random((70, 9), dtype=np.float32)
    given = made, [3, 4], [temperature] * 9, uniforms, None, None
    by_torchs = list(decode_exact.decode(*given))
    kernels = decode_exact.own_kernels(made.output.weight.device)
    assert kernels is not None
    spies = {name: Mock(wraps=getattr(kernels, name)) for name in ("step", "draw")}
    for name, spy in spies.items():
        monkeypatch.setattr(kernels, name, spy)
    assert np.array_equal(list(OwnKernels.decode(*given)), by_torchs)
    assert spies["step"].called
    assert spies["draw"].called == (symbols <= kernels.LARGEST_CHOICE)


@triton
def test_where_triton_fails_torchs_kernels_draw(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("charlm.step_kernels.step", None)
    decode_exact.own_kernels.cache_clear()
    with caplog.at_level("INFO"):
        text = list(
            OwnKernels.decode(network(device="cuda"), [3], [0.7], np.full((40, 1), 0.5, np.float32), None, None)
        )
    decode_exact.own_kernels.cache_clear()
    assert len(text) == 40
    assert "drawn by torch's kernels" in caplog.text


def test_where_rows_do_not_agree_sums_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    made = network()
    assert decode_cpu.product_of(made)  # of the libraries that charlm is tested with
    monkeypatch.setattr(decode_cpu, "agree", lambda *kind: False)
    monkeypatch.setattr(decode_cpu, "decode", None)
    text = Sampler(made, Vocabulary(SYMBOLS)).texts([3], 30, [0.8], [(1, 0)])
    assert len(text[0]) == 30


def test_what_agrees_is_tried_with_the_sizes_that_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: set[tuple[int, int]] = set()
    monkeypatch.setattr(decode_cpu, "agree", lambda width_in, width_out, *_: not tried.add((width_in, width_out)))
    made = network("gru", 48, 2)
    assert decode_cpu.product_of(made)
    weights = decode_cpu.Weights(made)
    sizes = [linear.product.size for linear in (*weights.inputs, *weights.hidden, weights.output)]
    assert tried == {tuple(size) for size in sizes}
    assert decode_cpu.step_bytes(made) == 4 * sum(width_in * width_out for width_in, width_out in sizes)


def test_rows_that_a_library_sums_in_another_order_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    product = torch.mm

    def two_ways(rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return product(rows, weight, out=out) if len(rows) > 8 else product(rows.flip(1), weight.flip(0), out=out)

    kind = next(kind for kind in (products.Float32, products.WideFloat32) if kind.agrees(64, 32))
    monkeypatch.setattr(torch, "mm", two_ways)
    assert not kind.agrees(64, 32)


@pytest.mark.parametrize("kind", products.ARITHMETICS["float32"])
@pytest.mark.parametrize("width_out", [103, 192])
def test_each_kind_of_product_in_32_bits_is_the_product(kind: type[products.Product], width_out: int) -> None:
    state, weight = torch.randn(130, 48), torch.randn(48, width_out)
    torch.testing.assert_close(products.multiplied(kind(weight), state), state @ weight)


def test_a_network_has_the_first_kind_of_product_that_agrees_at_all_its_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = network("gru", 48)
    first, second, third = products.ARITHMETICS["float32"]
    for refused, expected in (((), first), ((first,), second), ((first, second), third)):
        monkeypatch.setattr(decode_cpu, "agree", lambda i, o, threads, kind, no=refused: kind not in no or o == 144)
        assert decode_cpu.product_of(made) is expected
    monkeypatch.setattr(decode_cpu, "agree", lambda *kind: False)
    assert decode_cpu.product_of(made) is None
    assert [kind.rows(1) for kind in (first, second, third)] == [2, 2, 4]


# --- weights of 8 bits ----------------------------------------------------------------------------------------------


HAS_INT8 = products.Int8.agrees(48, 192)
int8 = pytest.mark.skipif(not HAS_INT8, reason="needs a processor with instructions for whole numbers of 8 bits")


@int8
@pytest.mark.parametrize("width_in", [3, 33, 128, 512, 1100])
@pytest.mark.parametrize("width_out", [2, 103, 256])
@pytest.mark.parametrize("largest", [False, True])
def test_products_in_8_bits_are_exact_for_any_number_of_rows(width_in: int, width_out: int, largest: bool) -> None:
    random = np.random.default_rng(width_in)
    whole = random.integers(-127, 128, (width_in, width_out))
    state = random.integers(-127, 128, (200, width_in))
    whole[0] = 127  # the largest of each column: a step is 1
    if largest:
        whole[:], state[:] = 127, 127
    exact = (state @ whole).astype(np.float32) * np.float32(1 / 127)
    product = products.Int8(torch.from_numpy(whole).float())
    rows = torch.from_numpy(state.astype(np.float32) / np.float32(127))
    for some in (slice(0, 1), slice(7, 8), slice(0, 2), slice(3, 8), slice(1, 65), slice(None)):
        assert np.array_equal(products.multiplied(product, rows[some]).numpy(), exact[some])


def test_sums_that_a_processor_cuts_short_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturated(rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Multiply as without VNNI: the one factor 128 larger, to have no sign, and pairs summed up in 16 bits."""
        pairs = ((rows.int() + 128)[:, :, None] * weight.int()[None]).unflatten(1, (-1, 2)).sum(dim=2)  # (R, K / 2, N)
        return out.copy_(pairs.clamp(-(2**15), 2**15 - 1).sum(dim=1) - 128 * weight.int().sum(dim=0))

    def exact(rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(rows.double() @ weight.double())

    monkeypatch.setattr(torch, "_int_mm", exact)
    assert products.Int8.agrees(64, 32)
    monkeypatch.setattr(torch, "_int_mm", saturated)
    assert not products.Int8.agrees(64, 32)
    monkeypatch.delattr(torch, "_int_mm")  # as in older ones
    assert not products.Int8.agrees(64, 32)


@int8
@cells
@pytest.mark.parametrize("size", [33, 128])
def test_in_8_bits_too_a_text_is_its_own_whatever_is_drawn_beside_it(cell: str, size: int) -> None:
    made = network(cell, size)
    assert decode_cpu.product_of(made, "int8")
    together = drawn(decode_cpu, made, 200, 60, arithmetic="int8")
    assert not np.array_equal(together, drawn(decode_cpu, made, 200, 60))
    for samples, length in ((1, 60), (1, 13), (2, 60), (6, 60), (64, 60), (65, 7)):
        assert np.array_equal(drawn(decode_cpu, made, samples, length, arithmetic="int8"), together[:length, :samples])


@int8
def test_in_8_bits_too_a_text_goes_on_from_its_prompt_to_the_last_bit() -> None:
    made = network()
    whole = drawn(decode_cpu, made, 1, 200, arithmetic="int8")[:, 0]
    for cut in (1, 32, 150):
        uniforms = np.random.default_rng(0).random(200, dtype=np.float32)[cut:, None]
        rest = list(decode_cpu.decode(made, (3, *whole[:cut]), [0.7], uniforms, None, None, "int8"))
        assert [i for (i,) in rest] == whole[cut:].tolist()


@int8
@cells
def test_in_8_bits_a_network_predicts_as_well_up_to_their_rounding(cell: str) -> None:
    made = network(cell, 64)
    ids = torch.randint(0, len(SYMBOLS), (20, 50), generator=torch.Generator().manual_seed(2))
    exact = made(ids)[0][:, :, FIRST_WRITTEN:].detach().log_softmax(dim=2)
    steps = decode_cpu.Steps(decode_cpu.Weights(made, "int8"), 20)
    for i in range(50):
        steps.read(ids[:, i].numpy())
        rounded = torch.from_numpy(steps.logits).log_softmax(dim=1)
        divergence = (exact[:, i].exp() * (exact[:, i] - rounded)).sum(dim=1).mean()  # Kullback and Leibler, in nats
        assert 0 < divergence < 0.002


# --- which weights are rounded --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cell", "size", "layers", "capability", "exact", "expected"),
    [
        ("lstm", 512, 2, "AVX512", True, "int8"),
        ("lstm", 256, 2, "AVX512", True, "int8"),
        ("gru", 512, 1, "AVX512", True, "int8"),
        ("lstm", 384, 1, "AVX512", True, "float32"),  # a core's cache holds them
        ("gru", 256, 2, "AVX512", True, "float32"),
        ("lstm", 512, 2, "AVX2", True, "float32"),  # not known to be faster
        ("lstm", 512, 2, "DEFAULT", True, "float32"),
        ("lstm", 512, 2, "AVX512", False, "float32"),
    ],
)
def test_large_networks_are_rounded_where_that_is_known_to_be_faster(
    cell: str,
    size: int,
    layers: int,
    capability: str,
    exact: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(decode_cpu, "agree", lambda *kind: exact)
    made = CharRNN(len(SYMBOLS), cell, size, layers)
    assert decode_cpu.chosen(made, "auto") == expected
    assert Sampler(made, Vocabulary(SYMBOLS)).arithmetic == expected
    assert Sampler(made, Vocabulary(SYMBOLS), weights="float32").arithmetic == "float32"
    assert decode_cpu.chosen(made.to("meta"), "auto") == "float32"  # not on a CPU


def test_8_bits_are_refused_where_they_are_not_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_cpu, "agree", lambda *kind: False)
    with pytest.raises(InputError, match="weights=int8 is not available on this cpu"):
        Sampler(network(), Vocabulary(SYMBOLS), weights="int8")


def test_sums_of_weights_in_units_do_not_depend_on_their_order() -> None:
    draw_from = np.random.default_rng(0)
    weight = torch.from_numpy(draw_from.normal(scale=0.3, size=(300, 4)))
    bias = torch.from_numpy(draw_from.normal(size=4))
    rounded, rounded_bias = decode_exact.in_units(weight, bias)
    assert torch.allclose(rounded, weight * decode_exact.UNIT, rtol=0, atol=1e-6 * decode_exact.UNIT)
    state = torch.from_numpy(np.trunc(draw_from.uniform(-1, 1, 300) / decode_exact.UNIT))
    exact = [
        sum((Fraction(h) * Fraction(w) for h, w in zip(state.tolist(), column.tolist(), strict=True)), Fraction(b))
        for column, b in zip(rounded.T, rounded_bias.tolist(), strict=True)
    ]
    for _ in range(20):
        order = draw_from.permutation(300)
        sums: list[float] = rounded_bias.tolist()
        for i in order:
            sums = [s + float(state[i]) * float(w) for s, w in zip(sums, rounded[i], strict=True)]
        assert [Fraction(s) for s in sums] == exact


def cases() -> Iterator[tuple[torch.Tensor, list[float], torch.Tensor]]:
    random = torch.Generator().manual_seed(0)
    temperatures = [0.0, 1e-40, 0.1, 0.8, 1.0, 3.0, float("inf")]
    for spread in (0.1, 3.0, 30.0):
        logits = torch.randn(len(temperatures) * 40, 30, generator=random) * spread
        logits[:, 7] = logits[:, 12]  # as likely as another, and sometimes the likeliest
        logits[::3, 7] = logits[::3, 12] = 100.0
        yield logits, temperatures * 40, torch.rand(len(logits), generator=random)


@pytest.mark.parametrize("top_k", [None, 1, 4, 100])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.7, 1.0])
def test_a_cpu_and_a_gpu_draw_alike(top_k: int | None, top_p: float | None) -> None:
    for logits, temperatures, uniform in cases():
        temperature = torch.tensor(temperatures, dtype=torch.float64)
        temperature, uniform = prepared(temperature, uniform)
        expected = draw(logits, logits / temperature[:, None], uniform, top_k, top_p).numpy()
        cold, numbers = temperature.numpy(), uniform.numpy()
        together = Drawer(cold, 30, top_k, top_p)(logits.numpy(), numbers[:, None])
        assert np.array_equal(together, expected)
        for i in range(0, len(logits), 17):
            one = slice(i, i + 1)
            alone = Drawer(cold[one], 30, top_k, top_p)(logits.numpy()[one], numbers[one, None])
            assert alone.tolist() == [expected[i]]
