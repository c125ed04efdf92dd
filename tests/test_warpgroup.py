"""Each instruction that CUDA kernels reach through ``warpgroup.cuh``, against what the PTX ISA says of it.

As ``test_instructions.py`` has those of ``ptx.cuh``: where each byte of a tile and each element of a product lies is
worked out here. With ``-m gpu`` the same tests judge a GPU of sm_90.
"""

from __future__ import annotations

import ctypes
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
from instructions import ENCODE, check_product, compressed, metadata, operands, sparse_rows, words

SOURCE = Path(planted.__file__).with_name("warpgroup.cu")
SEEDS = range(20)
LINES = [16, 32, 64, 128]  # bytes: each swizzle's
Run = Callable[..., np.ndarray]


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Run:
    """``run(name, a, b, c, y=zeros, how=(), seed=0)``: what a warpgroup makes of y."""
    device = request.param
    if device == "cuda" and not (torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)):
        pytest.skip("needs a GPU of sm_90")
    function = instructions.library(SOURCE, device, planted.shared_folder(tmp_path_factory, worker_id)).run_warpgroup

    def run(
        name: str, *inputs: np.ndarray, y: np.ndarray, how: tuple[int, ...] = (), seed: int = 0, skip: int = 0
    ) -> np.ndarray:
        numbers = (ctypes.c_int * 9)(*[0] * skip, *how)
        return instructions.call(function, name, numbers, seed, device, inputs, y)

    return run


# --- tiles


def place(line: int, row: int | np.ndarray, byte: int | np.ndarray) -> np.ndarray:
    """Where a byte of a row lies in shared memory: its unit of 16 bytes is exchanged by bits of the address above."""
    unit, rest = np.divmod(byte, 16)
    if line == 128:
        unit = unit ^ row % 8
    elif line == 64:
        unit = unit ^ row // 2 % 4
    elif line == 32:
        unit = unit ^ row // 4 % 2
    return np.asarray(row * line + unit * 16 + rest)


def image(rows: np.ndarray, line: int, first: int = 0) -> np.ndarray:
    """Lines of shared memory that hold rows of bytes, each from byte ``first`` of its line on; noise around them."""
    lines = np.random.default_rng(5).integers(0, 256, len(rows) * line).astype(np.uint8)
    lines[place(line, *np.meshgrid(*map(np.arange, rows.shape), indexing="ij") + np.array([[[0]], [[first]]]))] = rows
    return lines


#: rows, width and stride of a matrix, and of a tile its rows and the first byte and row
TILES = {
    "whole": (40, 256, 256, 32, 0, 0),
    "inside": (40, 256, 272, 24, 128, 9),
    "one row": (40, 256, 256, 1, 16, 39),
    "most rows": (300, 144, 160, 256, 16, 3),
    "past the last row": (40, 256, 256, 32, 0, 24),
    "past the width": (40, 136, 144, 16, 128, 0),
    "past the width within a unit": (40, 203, 208, 16, 192, 5),
    "before the first": (40, 256, 256, 32, -16, -3),
    "before and past": (5, 40, 48, 16, -32, -2),
    "all before": (40, 256, 256, 16, -128, -16),
    "all past": (40, 256, 256, 16, 256, 40),
    "far": (40, 256, 256, 16, 2**20, -(2**20)),
}


def window(matrix: np.ndarray, tile_rows: int, line: int, byte: int, row: int) -> np.ndarray:
    """A tile of a matrix, with zeros where that has nothing."""
    tile = np.zeros((tile_rows, line), np.uint8)
    for r in range(max(0, -row), min(tile_rows, len(matrix) - row)):
        for b in range(max(0, -byte), min(line, matrix.shape[1] - byte)):
            tile[r, b] = matrix[row + r, byte + b]
    return tile


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("tile", TILES)
def test_load_tile(run: Run, tile: str, line: int) -> None:
    rows, width, stride, tile_rows, byte, row = how = TILES[tile]
    for seed in SEEDS:
        matrix = np.random.default_rng(seed).integers(1, 256, (rows, stride)).astype(np.uint8)
        got = run(f"load_tile {line}", matrix, y=np.zeros(tile_rows * line, np.uint8), how=how, seed=seed)
        assert np.array_equal(got, image(window(matrix[:, :width], tile_rows, line, byte, row), line))


@pytest.mark.parametrize("tile_rows", [8, 128])
def test_load_tile_to_all(run: Run, tile_rows: int) -> None:
    """Each of two clusters: both halves for both blocks, in two rounds, the last of them past the matrix."""
    for seed in SEEDS:
        matrix = np.random.default_rng(seed).integers(1, 256, (4 * tile_rows - 3, 192)).astype(np.uint8)
        y = np.zeros((4, 2, 2 * tile_rows * 128), np.uint8)
        got = run("load_tile_to_all", matrix, y=y, how=(len(matrix), 192, 192, tile_rows, 128, 0), seed=seed)
        for round in range(2):
            expected = image(window(matrix, 2 * tile_rows, 128, 128, 2 * round * tile_rows), 128)
            assert (got[:, round] == expected).all()


@pytest.mark.parametrize("tile_rows", [8, 64])
def test_load_tile_to(run: Run, tile_rows: int) -> None:
    """Both halves for both blocks of each pair, the last past the matrix."""
    for seed in SEEDS:
        matrix = np.random.default_rng(seed).integers(1, 256, (4 * tile_rows - 3, 192)).astype(np.uint8)
        y = np.zeros((4, 2 * tile_rows * 128), np.uint8)
        got = run("load_tile_to", matrix, y=y, how=(len(matrix), 192, 192, tile_rows, 128, 0), seed=seed)
        for rank in range(4):
            halves = [window(matrix, tile_rows, 128, 128, (rank % 2 + half) * tile_rows) for half in (0, 2)]
            assert np.array_equal(got[rank], image(np.concatenate(halves), 128))


def test_a_tile_of_what_another_block_stored(run: Run) -> None:
    """By grid_arrive and grid_wait, by other threads than those that stored."""
    for seed in SEEDS:
        a = words(np.random.default_rng(seed), 4, 128)
        y = np.zeros(2 * 4 * 128 + 4, np.uint32)
        for turn in (1, 0):
            y = run("load_stored", a, y=y, how=(4 * 32, 16, 16, 32), seed=seed)
            stored, fetched = y[: 2 * 4 * 128].reshape(2, 4, 128)
            assert np.array_equal(stored, a)
            assert np.array_equal(fetched, np.roll(a, -1, 0))
            assert y[-4] == turn << 31


def test_a_tile_that_another_block_stored(run: Run) -> None:
    """In the shared memory from which it is copied."""
    for seed in SEEDS:
        a = words(np.random.default_rng(seed), 2, 2, 128)
        got = run("store_remote", a, y=np.zeros_like(a), how=(4 * 32, 16, 16, 32, 0), seed=seed)
        assert np.array_equal(got, a[:, ::-1])


def test_what_another_block_tells(run: Run) -> None:
    for seed in SEEDS:
        a = words(np.random.default_rng(seed), 2, 2, 128, 8)
        got = run("tell_remote", a, y=np.zeros_like(a), seed=seed)
        assert np.array_equal(got, a[:, ::-1])


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("tile", TILES)
def test_store_tile(run: Run, tile: str, line: int) -> None:
    """Bytes beside the tile, past the width and around the matrix stay what they were."""
    rows, width, stride, tile_rows, byte, row = how = TILES[tile]
    for seed in SEEDS:
        draw = np.random.default_rng(seed)
        new, old = (draw.integers(0, 256, shape).astype(np.uint8) for shape in ((tile_rows, line), (rows, stride)))
        got = run(f"store_tile {line}", image(new, line), y=old, how=how, seed=seed)
        expected = old.copy()
        for r in range(max(0, -row), min(tile_rows, rows - row)):
            for b in range(max(0, -byte), min(line, width - byte)):
                expected[row + r, byte + b] = new[r, b]
        assert np.array_equal(got, expected)


@pytest.mark.parametrize(
    "wrong",
    [(0, 64, 64, 8), (8, 0, 64, 8), (8, 64, 72, 8), (8, 80, 64, 8), (8, 64, 64, 0), (8, 64, 64, 257)],
    ids=["no rows", "no width", "stride", "wider than its stride", "no rows of a tile", "too many of a tile"],
)
def test_a_map_that_cannot_be_is_a_message(run: Run, wrong: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError, match=r"tiles|cuTensorMapEncodeTiled"):
        run("load_tile 64", np.zeros((8, 80), np.uint8), y=np.zeros(512, np.uint8), how=(*wrong, 0, 0))


# --- barriers


def test_tile_barriers(run: Run) -> None:
    for seed in SEEDS:
        a = words(np.random.default_rng(seed), 8, 64)
        assert np.array_equal(run("tile_barriers", a, y=np.zeros((8, 64), np.uint32), seed=seed), a[:, ::-1])


def test_tile_barriers_count_bytes(run: Run) -> None:
    for seed in SEEDS:
        matrix = np.random.default_rng(seed).integers(0, 256, (192, 64)).astype(np.uint8)
        got = run("tile_bytes", matrix, y=np.zeros(192 * 64, np.uint8), how=(192, 64, 64, 32), seed=seed)
        assert np.array_equal(got, image(matrix, 64))


def test_registers_keep_what_they_hold(run: Run) -> None:
    a = words(np.random.default_rng(0), 128)
    assert np.array_equal(run("registers", a, y=np.zeros(128, np.uint32)), a)


# --- matrices


def test_store_matrix_transposed(run: Run) -> None:
    """From the element of a column, of which a lane's word has two, to the line; and back by load_matrix_transposed."""
    for seed in SEEDS:
        draw = np.random.default_rng(seed)
        tiles, order = draw.integers(0, 2**16, (4, 8, 8)).astype(np.uint16), draw.permutation(32)
        lanes = np.zeros((32, 4, 2), np.uint16)
        for tile, row, column in np.ndindex(4, 8, 8):
            lanes[column * 4 + row // 2, tile, row % 2] = tiles[tile, row, column]
        got = run("store_matrix_transposed", lanes, order.astype(np.uint32), y=np.zeros((64, 8), np.uint16), seed=seed)
        assert np.array_equal(got[order], tiles.reshape(32, 8))
        assert np.array_equal(got[32:], lanes.reshape(32, 8))


def spread(matrix: np.ndarray) -> np.ndarray:
    """[64, N] as N / 2 words a thread."""
    row, column = np.meshgrid(*map(np.arange, matrix.shape), indexing="ij")
    lanes = np.zeros((128, matrix.shape[1] // 2), matrix.dtype)
    lanes[row // 16 * 32 + row % 8 * 4 + column % 8 // 2, column // 8 * 4 + row // 8 % 2 * 2 + column % 2] = matrix
    return lanes


def lines_of(matrix: np.ndarray, kind: str, line: int, first: int) -> np.ndarray:
    bits = np.ascontiguousarray(ENCODE[kind][0](matrix))
    return image(bits.view(np.uint8).reshape(len(matrix), -1), line, first)


def multiply(run: Run, name: str, stored: np.ndarray, right: np.ndarray, c: np.ndarray, kept: np.ndarray,
             at: tuple[int, int] = (0, 0), add: bool = True, seed: int = 0) -> np.ndarray:  # fmt: skip
    """``stored`` [64, K / 2] and ``right`` [K, N] from byte ``at`` of their lines on; ``kept`` a word a thread."""
    kind, line = name.split()[1], int(name.split()[-1])
    shared = np.zeros(64 * 128 + right.shape[1] * 128, np.uint8)
    shared[: 64 * line] = lines_of(stored, kind, line, at[0])
    shared[64 * 128 :] = lines_of(np.ascontiguousarray(right.T), kind, 128, at[1])
    return run(name, shared, spread(c), kept, y=np.zeros_like(spread(c)), how=(add, *at), skip=6, seed=seed)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("columns", [32, 64, 128, 256])
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_warpgroup_mma(run: Run, kind: str, columns: int, exact: bool) -> None:
    """Added to the sums or not, from every 32 bytes of either's lines."""
    starts = [(a, b) for a in range(0, 128, 32) for b in range(0, 128, 32)]
    for seed in range(2 * len(starts)):
        draw = np.random.default_rng(seed)
        left, right, c = operands(draw, kind, kind, 16, exact, 64, columns)
        at, add = starts[seed // 2], seed % 2 == 0
        if not add:
            c[draw.random(c.shape) < 0.1] = np.nan  # what is not added to is not read
        rows = (lines_of(left, kind, 128, at[0]), lines_of(np.ascontiguousarray(right.T), kind, 128, at[1]))
        how = (add, *at)
        got = run(
            f"mma {kind} {columns}", np.concatenate(rows), spread(c), y=np.zeros_like(spread(c)), how=how, skip=6,
            seed=seed,
        )  # fmt: skip
        check_product(got, spread, left, right, c if add else np.zeros_like(c), exact)


PRODUCTS = [
    "mma_sparse bf16 0 128 64",
    "mma_sparse bf16 1 128 64",
    "mma_sparse bf16 0 176 64",
    "mma_sparse bf16 1 176 128",
    "mma_sparse fp16 0 128 64",
    "mma_sparse fp16 1 128 128",
    "mma_sparse fp16 0 176 64",
    "mma_sparse fp16 1 176 64",
    "mma_sparse int8 0 128 64",
    "mma_sparse int8 0 128 128",
    "mma_sparse int8 0 176 64",
]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", PRODUCTS)
def test_warpgroup_mma_sparse(run: Run, name: str, exact: bool) -> None:
    """Added to the sums or not, from every 32 bytes of a line of values and either half of a line of x."""
    kind, selector, columns, line = name.split()[1], *map(int, name.split()[2:])
    k = 64 if kind == "int8" else 32
    starts = [(a, b) for a in range(0, line, 32) for b in (0, 64)]
    for seed in range(2 * len(starts)):
        draw = np.random.default_rng(seed)
        left, right, c = operands(draw, kind, kind, k, exact, 64, columns)
        left, places = sparse_rows(draw, left)
        kept = np.concatenate([metadata(places[r : r + 16], kind, selector) for r in range(0, 64, 16)])
        at, add = starts[seed // 2], seed % 2 == 0
        if not add and c.dtype != np.int32:
            c[draw.random(c.shape) < 0.1] = np.nan  # what is not added to is not read
        got = multiply(run, name, compressed(left, places), right, c, kept, at, add, seed)
        check_product(got, spread, left, right, c if add else np.zeros_like(c), exact)


@pytest.mark.parametrize("name", [name for name in PRODUCTS if "int8" not in name])
def test_warpgroup_mma_sparse_leaves_out_what_is_not_kept(run: Run, name: str) -> None:
    """All 64 rows keep the same places, and what lies elsewhere is an infinity or a NaN."""
    kind, selector, columns, _ = name.split()[1], *map(int, name.split()[2:])
    for seed in range(4):
        draw = np.random.default_rng(seed)
        left, right, c = operands(draw, kind, kind, 32, True, 64, columns)
        rows, places = sparse_rows(draw, left[:1])
        rows, places = rows.repeat(64, 0), places.repeat(64, 0)
        special = np.where(rows[0][:, None] != 0, right, draw.choice([np.inf, -np.inf, np.nan], right.shape))
        kept = np.tile(metadata(places[:16], kind, selector), 4)
        got = multiply(run, name, compressed(rows, places), special, c, kept, seed=seed)
        check_product(got, spread, rows, right, c, exact=True)


@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_warpgroup_metadata_lies_as_cutlass_stores_it(run: Run, kind: str) -> None:
    """A warp's lanes take the words of its 16 rows as for mma_sparse: of 16-bit values, 32 words serve 32 rows, so that
    by selector 0 two warps multiply the upper 16 of such rows and by 1 the lower."""
    dtype, k, selectors = (torch.int8, 64, 1) if kind == "int8" else (torch.float16, 32, 2)
    for seed in range(4):
        draw = np.random.default_rng(seed)
        rows, _ = sparse_rows(draw, draw.integers(-8, 9, (64 * selectors, 2 * k)))
        right, c = draw.integers(-8, 9, (k, 128)), np.zeros((64, 128), np.int32 if kind == "int8" else np.float32)
        values, meta = cutlass.sparse_semi_structured_from_dense_cutlass(torch.from_numpy(rows).to(dtype))
        # a word a lane, for each 16 or 32 rows and each step of k values
        per_warp = meta.numpy().view(np.uint32).reshape(2, 4, 32)
        for step in range(2):
            for selector in range(selectors):
                parts = [(warp * selectors + selector) * 16 + np.arange(16) for warp in range(4)]
                mine = np.concatenate(parts)
                stored = values.numpy()[mine, step * k // 2 : (step + 1) * k // 2].astype(np.float64)
                name = f"mma_sparse {kind} {selector} 128 {128 if selector else 64}"
                got = multiply(run, name, stored, right, c, per_warp[step], seed=seed)
                check_product(got, spread, rows[mine, step * k : (step + 1) * k], right, c, exact=True)
