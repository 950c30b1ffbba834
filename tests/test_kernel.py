"""The compiled experts: right, and the same to the last bit whatever runs beside them."""

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from tidesim.engine import kernel
from tidesim.engine.cores import Cores
from tidesim.engine.cpu_network import CpuLinear
from tidesim.engine.kernel import ExpertWeights, sorted_pairs

E, D, K, WIDTH = 12, 40, 3, 14


def make(dtype: torch.dtype, seed: int = 0) -> tuple[list[tuple[torch.Tensor, ...]], ExpertWeights]:
    """Gate, up and down of each expert, and where they lie."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((WIDTH, D), (WIDTH, D), (D, WIDTH))
    experts = [tuple(torch.randn(shape, generator=generator).to(dtype) for shape in shapes) for _ in range(E)]
    gate, up, down = (np.array([expert[i].data_ptr() for expert in experts]) for i in range(3))
    return experts, ExpertWeights(gate, up, down)


def choices(num_tokens: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(num_tokens)])


def run(x: torch.Tensor, ids: torch.Tensor, at: ExpertWeights, dtype: torch.dtype, threads: int = 1) -> np.ndarray:
    pairs = sorted_pairs(ids.numpy(), np.arange(E), E)
    out = np.full((ids.numel(), D), np.nan, np.float32)
    experts = np.flatnonzero(pairs.counts)
    with Cores(threads) as cores:
        cores.run_experts(x.numpy(), pairs, experts, at.of(experts), kernel.stored_like(dtype), WIDTH, out)
    return out[pairs.places]  # [T, K, D]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_tokens", [1, 4, 7, 40, 150])
def test_every_pair_gets_its_experts_output(dtype: torch.dtype, num_tokens: int) -> None:
    experts, at = make(dtype)
    x, ids = torch.randn(num_tokens, D, generator=torch.Generator().manual_seed(1)), choices(num_tokens)
    found = run(x, ids, at, dtype)
    for token in range(num_tokens):
        for k, expert in enumerate(ids[token].tolist()):
            gate, up, down = (matrix.double() for matrix in experts[expert])
            row = x[token].double()
            expected = down @ (functional.silu(gate @ row) * (up @ row))
            np.testing.assert_allclose(found[token, k], expected.numpy(), rtol=2e-4, atol=2e-4)


@settings(max_examples=30, deadline=None)
@given(num_tokens=st.integers(1, 70), seed=st.integers(0, 9), threads=st.integers(1, 3), data=st.data())
def test_a_row_does_not_depend_on_the_rows_beside_it_nor_on_threads(
    num_tokens: int, seed: int, threads: int, data: st.DataObject
) -> None:
    _, at = make(torch.bfloat16)
    x, ids = torch.randn(num_tokens, D, generator=torch.Generator().manual_seed(seed)), choices(num_tokens, seed)
    together = run(x, ids, at, torch.bfloat16, threads)
    some = data.draw(st.lists(st.integers(0, num_tokens - 1), min_size=1, unique=True))
    np.testing.assert_array_equal(run(x[some], ids[some], at, torch.bfloat16), together[some])


def test_widening_bfloat16_is_exact() -> None:
    experts, at = make(torch.bfloat16)
    wide = [tuple(matrix.float() for matrix in expert) for expert in experts]
    wide_at = ExpertWeights(*(np.array([expert[i].data_ptr() for expert in wide]) for i in range(3)))
    x, ids = torch.randn(9, D, generator=torch.Generator().manual_seed(2)), choices(9)
    np.testing.assert_array_equal(run(x, ids, at, torch.bfloat16), run(x, ids, wide_at, torch.float32))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 40), st.integers(0, 99), st.lists(st.integers(0, E - 1), unique=True))
def test_sorting_keeps_every_pair_once(num_tokens: int, seed: int, residents: list[int]) -> None:
    ids = choices(num_tokens, seed) if num_tokens else torch.empty(0, K, dtype=torch.int64)
    num_slots, slots = len(residents) + 1, np.full(E, -1)
    slots[residents] = np.arange(len(residents))
    pairs = sorted_pairs(ids.numpy(), slots, num_slots)
    keys = np.where(slots < 0, num_slots + np.arange(E), slots)
    np.testing.assert_array_equal(pairs.counts, np.bincount(keys[ids.numpy().ravel()], minlength=num_slots + E))
    np.testing.assert_array_equal(pairs.first, np.append(0, np.cumsum(pairs.counts)))
    np.testing.assert_array_equal(np.repeat(np.arange(num_slots + E), pairs.counts)[pairs.places], keys[ids.numpy()])
    np.testing.assert_array_equal(np.sort(pairs.places.ravel()), np.arange(ids.numel()))
    np.testing.assert_array_equal(pairs.tokens[pairs.places], np.arange(num_tokens)[:, None].repeat(K, axis=1))


@given(st.lists(st.integers(0, 40), min_size=1, max_size=30), st.data())
def test_the_busiest_experts_run_first(counts: list[int], data: st.DataObject) -> None:
    keys = np.array(data.draw(st.lists(st.integers(0, len(counts) - 1), unique=True)), np.int64)
    order, num_tiles = kernel.busiest_first(np.array(counts, np.int32), keys)
    tiles = -(-np.array(counts)[keys] // kernel.ROW_TILE)
    np.testing.assert_array_equal(order, np.argsort(-tiles, kind="stable"))
    assert num_tiles == tiles.sum()


def test_outputs_are_summed_in_the_order_of_the_choices() -> None:
    rng = np.random.default_rng(0)
    outputs, weights = rng.standard_normal((6, D)).astype(np.float32), rng.random((2, K)).astype(np.float32)
    places = np.array([[4, 0, 2], [1, 3, 5]])
    expected = np.zeros((2, D))
    for token in range(2):
        for k in range(K):
            expected[token] += weights[token, k].astype(np.float64) * outputs[places[token, k]]
    np.testing.assert_allclose(kernel.combine(outputs, places, weights), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("num_outputs", [2, 130, 256])
def test_a_linear_map_is_one_whatever_the_threads(dtype: torch.dtype, threads: int, num_outputs: int) -> None:
    generator = torch.Generator().manual_seed(3)
    weight, x = torch.randn(num_outputs, D, generator=generator).to(dtype), torch.randn(2, 5, D, generator=generator)
    with Cores(threads) as cores, Cores(1) as one:
        found, alone = CpuLinear(weight, cores)(x), CpuLinear(weight, one)(x[:, 3:4])
    torch.testing.assert_close(found, functional.linear(x, weight.float()), rtol=1e-4, atol=1e-4)
    assert torch.equal(found[:, 3:4], alone)


def test_a_dtype_that_compiled_code_does_not_read_is_refused() -> None:
    with pytest.raises(TypeError, match=r"float16.*bfloat16 or float32"):
        kernel.stored_like(torch.float16)
    with pytest.raises(ValueError, match="num_threads"):
        Cores(0)


def test_the_exponential_is_that_of_the_library() -> None:
    from numba import njit

    @njit
    def all_of(x: np.ndarray) -> np.ndarray:
        out = np.empty_like(x)
        for i in range(len(x)):
            out[i] = kernel.exp(x[i])
        return out

    x = np.concatenate([np.linspace(-87, 88, 100_001), [0.0, -0.0, 1e-30]]).astype(np.float32)
    np.testing.assert_allclose(all_of(x), np.exp(x.astype(np.float64)), rtol=3e-7)
    assert all_of(np.array([-np.inf, -1e6], np.float32)).max() < 1e-37
    assert all_of(np.array([0], np.float32))[0] == 1
