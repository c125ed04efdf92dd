"""Each instruction that CUDA kernels reach through ``ptx.cuh``, against what the PTX ISA says of it.

The kernels of ``emulation/instructions.cu`` take and give a lane's words; which matrix element a word holds is worked
out here, from element to lane, and not from lane to element as the emulation does. With ``-m gpu`` the same tests judge
a GPU: what they say of the emulation is what the hardware does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.sparse import _semi_structured_conversions as cutlass

sys.path.insert(0, str(Path(__file__).parent / "emulation"))
import instructions
import planted
from instructions import ENCODE, SEEDS, check_product, compressed, metadata, operands, signed, sparse_rows, words

SOURCE = Path(planted.__file__).with_name("instructions.cu")
Run = Callable[..., np.ndarray]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Run:
    """``run(name, a, b, c, y=zeros, threads=32, seed=0)``: what the instruction makes of y."""
    device = request.param
    function = instructions.library(SOURCE, device, planted.shared_folder(tmp_path_factory, worker_id)).run_instruction

    def run(name: str, *inputs: np.ndarray, y: np.ndarray, threads: int = 32, seed: int = 0) -> np.ndarray:
        return instructions.call(function, name, threads, seed, device, inputs, y)

    return run


def test_a_failure_is_a_message(run: Run) -> None:
    with pytest.raises(AssertionError, match="no instruction is called mma bf32"):
        run("mma bf32", y=np.zeros(1, np.uint32))


# --- words


def test_lop3(run: Run) -> None:
    a, b, c = words(np.random.default_rng(0), 3, 640)
    got = run("lop3", a, b, c, y=np.zeros((640, 12), np.uint32), threads=640)
    for bit in range(8):
        chosen = [x if bit >> place & 1 else ~x for place, x in ((2, a), (1, b), (0, c))]
        assert np.array_equal(got[:, bit], chosen[0] & chosen[1] & chosen[2])
    assert np.array_equal(got[:, 8], (a & b) | c)
    assert np.array_equal(got[:, 9], a ^ b ^ c)
    assert np.array_equal(got[:, 10], (a & b) | (a & c) | (b & c))
    assert np.array_equal(got[:, 11], (a & b) | (~a & c))


def test_prmt(run: Run) -> None:
    a, b, c = words(np.random.default_rng(1), 3, 6400)
    got = run("prmt", a, b, c, y=np.zeros(6400, np.uint32), threads=6400).view(np.uint8).reshape(-1, 4)
    pool = np.concatenate([a.view(np.uint8).reshape(-1, 4), b.view(np.uint8).reshape(-1, 4)], 1)
    for place in range(4):
        digit = c >> 4 * place & 15
        byte = pool[np.arange(6400), digit % 8]
        sign = np.where(byte > 127, 255, 0)
        assert np.array_equal(got[:, place], np.where(digit > 7, sign, byte))


def test_bits(run: Run) -> None:
    places = np.arange(32, dtype=np.uint32)
    sparse = np.concatenate([1 << places, (2 << places) - 1, np.zeros(64, np.uint32)]).astype(np.uint32)
    a = np.concatenate([sparse, *(words(np.random.default_rng(4), 1600) >> 4 * shift for shift in range(8))])
    got = signed(run("bits", a, y=np.zeros((len(a), 2), np.uint32), threads=len(a)))
    bits = a[:, None] >> places & 1
    assert np.array_equal(got[:, 0], bits.sum(1))
    assert np.array_equal(got[:, 1], np.where(bits.any(1), 31 - bits[:, ::-1].argmax(1), -1))


def test_dp4a(run: Run) -> None:
    a, b, c = words(np.random.default_rng(2), 3, 6400)
    got = run("dp4a", a, b, c, y=np.zeros((6400, 2), np.uint32), threads=6400)
    for column, kind in ((0, np.int8), (1, np.uint8)):
        left, right = (x.view(kind).reshape(-1, 4).astype(np.int64) for x in (a, b))
        assert np.array_equal(got[:, column], ((left * right).sum(1) + c).astype(np.uint32))


def test_packed_halves(run: Run) -> None:
    draw = np.random.default_rng(3)
    halves = np.arange(2**16, dtype=np.uint32)
    with np.errstate(over="ignore", invalid="ignore"):
        exact = halves.astype(np.uint16).view(np.float16).astype(np.float32)
        # every half, the ties between two of them and their neighbours, the last before infinity, and anything else
        between = ((exact[:-1].astype(np.float64) + exact[1:].astype(np.float64)) / 2).astype(np.float32)
        tie = np.append(between, np.float32([65520, -65520])).view(np.uint32)
        pool = np.concatenate([exact.view(np.uint32), tie, tie + 1, tie - 1, halves << 16, (halves << 16) + 0x8000,
                               (halves << 16) + 0x8001, words(draw, 50000)])  # fmt: skip
        pool = np.resize(pool, (len(pool) + 63) // 64 * 64)
        low, high = pool.view(np.float32), draw.permutation(pool).view(np.float32)
        got = run("pack", low, high, y=np.zeros((len(pool), 2), np.uint32), threads=len(pool))
        for place, x in ((0, low), (16, high)):
            fp16 = np.where(np.isnan(x), 0x7FFF, x.astype(np.float16).view(np.uint16))
            rounded = torch.from_numpy(x.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
            assert np.array_equal(got[:, 0] >> place & 0xFFFF, fp16)
            assert np.array_equal(got[:, 1] >> place & 0xFFFF, np.where(np.isnan(x), 0x7FFF, rounded))
        back = run("float_from_fp16", halves, y=np.zeros(2**16, np.float32), threads=2**16)
    assert np.array_equal(back, exact, equal_nan=True)


# --- warps

LANES = np.arange(32)
GROUPS = [[2**32 - 1], [0xFFFF], [0xFFFF0000], [0xFFFF, 0xFFFF0000], [0x55555555], [0xCCCCCCCC, 0x33333333]]


def looked_up(by: int) -> list[np.ndarray]:
    """The lane that each lane asks, by xor, up and down."""
    return [LANES ^ by, np.where(LANES - by < 0, LANES, LANES - by), np.where(LANES + by > 31, LANES, LANES + by)]


@pytest.mark.parametrize("masks", GROUPS, ids=lambda masks: "-".join(f"{mask:x}" for mask in masks))
def test_shuffles(run: Run, masks: list[int]) -> None:
    """The lanes of each mask among themselves, by what keeps every lane within its mask; the others are away."""
    group = sum((mask >> LANES & 1) * mask for mask in masks)
    here = group != 0
    allowed = [[by for by in range(32) if (group >> looked_up(by)[way] & 1)[here].all()] for way in range(3)]
    for seed in SEEDS:
        draw = np.random.default_rng(seed)
        a, bys = words(draw, 32), [each[seed % len(each)] for each in allowed]
        chosen = np.array([draw.choice(LANES[mask >> LANES & 1 == 1]) if mask else 0 for mask in group])
        by = np.stack([chosen, *(np.full(32, each) for each in bys)], 1).astype(np.uint32)
        got = run("shuffle", a, by, group.astype(np.uint32), y=np.full((32, 4, 4), -7, np.int64), seed=seed)
        wide = a.astype(np.int64)
        sources = [chosen, *(looked_up(bys[way])[way] for way in range(3))]
        for kind, value in enumerate((wide, signed(a).astype(np.int64), wide & 0xFFFFFF, wide << 20)):
            for way, source in enumerate(sources):
                assert np.array_equal(got[:, kind, way], np.where(here, value[source], -7))


@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0xFFFF, 0xFFFF0000, 0x1, 0x80000001, 0x12345678])
def test_votes_and_reductions(run: Run, mask: int) -> None:
    lanes = np.array([lane for lane in range(32) if mask >> lane & 1])
    for seed in SEEDS:
        draw = np.random.default_rng(seed)
        a = words(draw, 32) | (1 if seed % 4 == 0 else 0)  # every lane votes yes
        source = draw.choice(lanes, 32)
        y = np.full((32, 12), 7, np.uint32)
        got = run("partial", a, source.astype(np.uint32), np.full(32, mask, np.uint32), y=y, seed=seed)
        own, ballot = a[lanes], sum(int(a[lane] & 1) << int(lane) for lane in lanes)
        same = [any(own & 1), all(own & 1), ballot, own.sum(dtype=np.uint32), signed(own).min(), signed(own).max(),
                own.min(), own.max(), np.bitwise_and.reduce(own), np.bitwise_or.reduce(own),
                np.bitwise_xor.reduce(own)]  # fmt: skip
        for lane in range(32):
            expected = [a[source[lane]], *same] if lane in lanes else [7] * 12
            assert [int(x) % 2**32 for x in expected] == got[lane].tolist()


# --- memory


def test_atomics(run: Run) -> None:
    threads = 512
    for seed in SEEDS:
        a = words(np.random.default_rng(seed), threads)
        y = np.zeros(20 + 2 * threads, np.uint32)
        y[6], y[[8, 14]] = 2**31 - 1, 2**32 - 1
        got = run("atomics", a, y=y, threads=threads, seed=seed)
        total = int(a.astype(np.uint64).sum())
        assert got[[0, 1, 12]].tolist() == [total % 2**32] * 3
        assert got[2:4].view(np.uint64)[0] == total
        assert got[4:5].view(np.float32)[0] == (a % 1024).sum()
        assert got[[17, 18]].tolist() == [0, (a % 1024).sum()]  # bits of subnormal floats
        assert signed(got)[5:7].tolist() == [max(0, signed(a).max()), signed(a).min()]
        assert got[[7, 8, 13, 14]].tolist() == [a.max(), a.min()] * 2
        assert got[[10, 11, 15, 16]].tolist() == [2 * threads, threads, threads * (threads + 1) // 2, 2 * threads]
        assert sorted(got[20 : 20 + threads]) == list(range(threads))
        assert sorted([got[9], *got[20 + threads :]]) == list(range(threads + 1))


def test_accesses_to_global_memory(run: Run) -> None:
    a = words(np.random.default_rng(0), 32, 8)
    got = run("global", a, y=np.zeros((32, 8), np.uint32))
    assert np.array_equal(got[:, :7], a[:, :7])
    assert not got[:, 7].any()


def test_asynchronous_copies(run: Run) -> None:
    for seed in SEEDS:
        draw = np.random.default_rng(seed)
        a, valid = words(draw, 32, 8), words(draw, 32)
        got = run("copies", a, valid, y=np.zeros((32, 7), np.uint32), seed=seed)
        kept = np.repeat([valid & 1, valid >> 1 & 1, valid >> 2 & 1], [4, 2, 1], axis=0).T
        assert np.array_equal(got, a[:, :7] * kept)


# --- blocks


def test_named_barriers(run: Run) -> None:
    for seed in SEEDS:
        a = words(np.random.default_rng(seed), 8, 32)
        assert np.array_equal(run("barriers", a, y=np.zeros((8, 32), np.uint32), threads=64, seed=seed), a[:, ::-1])


def test_grid_barrier(run: Run) -> None:
    for seed in SEEDS:
        a = words(np.random.default_rng(seed), 256) >> 2
        got = run("grid_barrier", a, y=np.zeros(16 + 2 * 256, np.uint32), threads=256, seed=seed)
        assert np.array_equal(got[16 + 256 :], np.roll(a, -37 * 7) + 7)


def test_cluster(run: Run, request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params["run"] == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("clusters begin with sm_90")
    for seed in SEEDS:
        a = words(np.random.default_rng(seed), 2, 4, 32)
        got = run("cluster", a, y=np.zeros((2, 4, 32, 9), np.uint32), threads=256, seed=seed)
        assert np.array_equal(got[..., 0], np.roll(a, -1, 1))
        assert np.array_equal(got[..., 1], np.roll(a, 2, 1) + 1)
        assert np.array_equal(got[..., 2], np.arange(4)[None, :, None].repeat(2, 0).repeat(32, 2))
        assert np.array_equal(got[..., 3:7], np.roll(a, -3, 1).reshape(2, 4, 8, 4).repeat(4, 2))
        assert np.array_equal(got[..., 7], np.roll(a, 1, 1))
        assert np.array_equal(got[..., 8], np.arange(32)[None, None].repeat(2, 0).repeat(4, 1))


# --- matrices: from the element to the lane, the word and the place in it


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrix(run: Run, count: int, transposed: bool) -> None:
    for seed in SEEDS:
        draw = np.random.default_rng(seed)
        rows, order = words(draw, 32, 4), draw.permutation(32).astype(np.uint32)
        name = f"load_matrix{'_transposed' if transposed else ''} {count}"
        got = run(name, rows, order, y=np.zeros((32, count, 2), np.uint16), seed=seed)
        for tile in range(count):
            matrix = rows.view(np.uint16)[order[tile * 8 : tile * 8 + 8]]
            for row, column in np.ndindex(8, 8):
                across, along = (column, row) if transposed else (row, column)
                assert got[across * 4 + along // 2, tile, along % 2] == matrix[row, column]


def fragment_a(matrix: np.ndarray, kind: str) -> np.ndarray:
    """[16, K] as four words a lane."""
    encode, values = ENCODE[kind]
    bits = encode(matrix)
    half = matrix.shape[1] // 2
    lanes = np.zeros((32, 4, values), bits.dtype)
    for row, k in np.ndindex(matrix.shape):
        lanes[row % 8 * 4 + k % half // values, row // 8 + k // half * 2, k % values] = bits[row, k]
    return lanes.view(np.uint32)


def fragment_b(matrix: np.ndarray, kind: str) -> np.ndarray:
    """[K, 8] as two words a lane, or four."""
    encode, values = ENCODE[kind]
    bits = encode(matrix)
    lanes = np.zeros((32, len(matrix) // (4 * values), values), bits.dtype)
    for k, column in np.ndindex(matrix.shape):
        lanes[column * 4 + k % (4 * values) // values, k // (4 * values), k % values] = bits[k, column]
    return lanes.view(np.uint32)


def fragment_c(matrix: np.ndarray) -> np.ndarray:
    """[16, 8] as four words a lane."""
    lanes = np.zeros((32, 4), matrix.dtype)
    for row, column in np.ndindex(16, 8):
        lanes[row % 8 * 4 + column // 2, row // 8 * 2 + column % 2] = matrix[row, column]
    return lanes


KINDS = [("bf16", "bf16"), ("fp16", "fp16"), *((a, b) for a in ("int8", "uint8") for b in ("int8", "uint8"))]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("a", "b"), KINDS)
def test_mma(run: Run, a: str, b: str, exact: bool) -> None:
    for seed in SEEDS:
        left, right, c = operands(np.random.default_rng(seed), a, b, 32 if a.endswith("int8") else 16, exact)
        lanes = fragment_a(left, a), fragment_b(right, b), fragment_c(c)
        got = run(f"mma {a} {b}", *lanes, y=np.zeros((32, 4), c.dtype), seed=seed)
        check_product(got, fragment_c, left, right, c, exact)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("kind", "selector"), [("bf16", 0), ("bf16", 1), ("fp16", 0), ("fp16", 1), ("int8", 0)])
def test_mma_sparse(run: Run, kind: str, selector: int, exact: bool) -> None:
    k = 64 if kind == "int8" else 32
    for seed in SEEDS:
        draw = np.random.default_rng(seed)
        left, right, c = operands(draw, kind, kind, k, exact)
        left, places = sparse_rows(draw, left)
        lanes = fragment_a(compressed(left, places), kind), fragment_b(right, kind)
        rest = np.concatenate([fragment_c(c).view(np.uint32).ravel(), metadata(places, kind, selector)])
        got = run(f"mma_sparse {kind} {selector}", *lanes, rest, y=np.zeros((32, 4), c.dtype), seed=seed)
        check_product(got, fragment_c, left, right, c, exact)


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_mma_sparse_leaves_out_what_is_not_kept(run: Run, kind: str) -> None:
    """All 16 rows keep the same places, and what lies elsewhere is an infinity or a NaN."""
    for seed in SEEDS:
        draw = np.random.default_rng(seed)
        left, right, c = operands(draw, kind, kind, 32, exact=True)
        rows, places = sparse_rows(draw, left[:1])
        rows, places = rows.repeat(16, 0), places.repeat(16, 0)
        special = np.where(rows[0][:, None] != 0, right, draw.choice([np.inf, -np.inf, np.nan], right.shape))
        lanes = fragment_a(compressed(rows, places), kind), fragment_b(special, kind)
        rest = np.concatenate([fragment_c(c).view(np.uint32).ravel(), metadata(places, kind, 0)])
        got = run(f"mma_sparse {kind} 0", *lanes, rest, y=np.zeros((32, 4), c.dtype), seed=seed)
        check_product(got, fragment_c, rows, right, c, exact=True)


@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_metadata_lies_as_cutlass_stores_it(run: Run, kind: str) -> None:
    """PyTorch's converter makes the words that CUTLASS loads: four in a row for the four lanes of a group. Of 16-bit
    values they serve 32 rows: the first two words 16 of them, by selector 0, the last two the other 16, by 1."""
    dtype, k, selectors = (torch.int8, 64, 1) if kind == "int8" else (torch.float16, 32, 2)
    for seed in SEEDS:
        draw = np.random.default_rng(seed)
        rows, _ = sparse_rows(draw, draw.integers(-8, 9, (16 * selectors, 2 * k)))
        right, c = draw.integers(-8, 9, (k, 8)), np.zeros((16, 8), np.int32 if kind == "int8" else np.float32)
        values, meta = cutlass.sparse_semi_structured_from_dense_cutlass(torch.from_numpy(rows).to(dtype))
        per_step = meta.numpy().view(np.uint32).reshape(2, 32)  # of k values each: a word a lane
        for step in range(2):
            for selector in range(selectors):
                part = slice(selector * 16, selector * 16 + 16)
                stored = values.numpy()[part, step * k // 2 : (step + 1) * k // 2].astype(np.float64)
                lanes = fragment_a(stored, kind), fragment_b(right, kind)
                rest = np.concatenate([fragment_c(c).view(np.uint32).ravel(), per_step[step]])
                got = run(f"mma_sparse {kind} {selector}", *lanes, rest, y=np.zeros((32, 4), c.dtype), seed=seed)
                dense = rows[part, step * k : (step + 1) * k]
                assert np.array_equal(got, fragment_c((dense @ right).astype(c.dtype)))
