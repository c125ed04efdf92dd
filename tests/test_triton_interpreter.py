"""The interpreter's repairs are bit-equal to torch; and what the generated tests of the Triton kernels do not reach.

That is every tile of every architecture, all forward paths, the twins of ``csrc/math``, and the split of the backward's
operand.
"""

from __future__ import annotations

import math

import triton_interpreter

triton_interpreter.require()

import pytest  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from burnish import _math, dropout, registry  # noqa: E402
from burnish.kernels.common import numerics, philox, target, tiles  # noqa: E402
from burnish.kernels.lowrank import lora_linear, lora_linear_int8, lora_linear_split, lowrank_linear  # noqa: E402
from burnish.kernels.lowrank.lowrank_linear_sums import Dropout, Sums  # noqa: E402
from burnish.kernels.quant import int8_linear, int8_quantize_rows  # noqa: E402

ALL_TILES = sorted({tile for table in tiles.INT8_GEMM.values() for tile in table}, key=lambda tile: tile.name)
SPLIT_TILES = sorted({tile for table in tiles.SPLIT_GEMM.values() for tile in table}, key=lambda tile: tile.name)
HALF_TILES = sorted({tile for table in tiles.HALF_GEMM.values() for tile in table}, key=lambda tile: tile.name)
FULL_TILES = sorted({tile for table in tiles.FULL_GEMM.values() for tile in table}, key=lambda tile: tile.name)
FLOAT_TILES = [(tile, torch.bfloat16) for tile in HALF_TILES] + [(tile, torch.float32) for tile in FULL_TILES]
FUSED_TILES = [tile for tile in ALL_TILES if tile.block_m <= int8_linear.FUSED_MAX_ROWS]
ACTIVATIONS = range(5)


def patterns(count: int = 1 << 14) -> torch.Tensor:
    """fp32 values: random bit patterns with every exponent, NaN, infinities, subnormals, and ties of bf16 rounding."""
    generator = torch.Generator().manual_seed(7)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator, dtype=torch.int64).to(torch.int32)
    ties = (bits[: count // 4] & -0x10000) | 0x8000
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 3.4e38, -3.4e38, 7.94, 448.0, 464.0]
    moderate = torch.randn(count // 4, generator=generator) * 8
    return torch.cat([bits.view(torch.float32), ties.view(torch.float32), torch.tensor(special), moderate])


def same_bits(left: torch.Tensor, right: torch.Tensor) -> None:
    """Equal values, or NaN in the same places."""
    assert left.dtype == right.dtype
    assert torch.equal(left.isnan(), right.isnan())
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[left.element_size()]
    kept = ~left.isnan()
    assert torch.equal(left[kept].view(integer), right[kept].view(integer))


@triton.jit
def convert_kernel(source_ptr, result_ptr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    values = tl.load(source_ptr + index, mask=index < COUNT)
    tl.store(result_ptr + index, values.to(result_ptr.dtype.element_ty), mask=index < COUNT)


@triton.jit
def dot_kernel(a_ptr, b_ptr, result_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    offsets = index[:, None] * BLOCK + index[None, :]
    product = tl.dot(tl.load(a_ptr + offsets), tl.load(b_ptr + offsets), out_dtype=tl.float32)
    tl.store(result_ptr + offsets, product)


def converted(source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    result = torch.empty(source.shape, dtype=dtype)
    block = triton.next_power_of_2(source.numel())
    convert_kernel[(1,)](source, result, COUNT=source.numel(), BLOCK=block)
    return result


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=lambda dtype: str(dtype)[6:]
)
def test_narrowing_from_fp32_is_torchs(dtype: torch.dtype) -> None:
    same_bits(converted(patterns(), dtype).float(), patterns().to(dtype).float())


def test_widening_of_bf16_is_torchs() -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    same_bits(converted(every, torch.float32), every.float())


def test_integers_convert_to_bf16_as_in_torch() -> None:
    every = torch.arange(-128, 128).to(torch.int8)
    same_bits(converted(every, torch.bfloat16), every.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda dtype: str(dtype)[6:])
def test_dot_is_torchs(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randint(-64, 65, (32, 32), generator=generator).to(dtype) / 8 for _ in range(2))
    result = torch.empty(32, 32)
    dot_kernel[(1,)](a, b, result, BLOCK=32)
    assert torch.equal(result, (a.double() @ b.double()).float())


@triton.jit
def activation_kernel(z_ptr, value_ptr, slope_ptr, COUNT: tl.constexpr, BLOCK: tl.constexpr, ACTIVATION: tl.constexpr):
    index = tl.arange(0, BLOCK)
    z = tl.load(z_ptr + index, mask=index < COUNT)
    tl.store(value_ptr + index, numerics.activate(z, ACTIVATION), mask=index < COUNT)
    tl.store(slope_ptr + index, numerics.activation_slope(z, ACTIVATION), mask=index < COUNT)


@pytest.mark.parametrize("activation", [1, 2, 3, 4])
def test_activations_are_the_bits_of_csrc_math(activation: int) -> None:
    z = torch.cat([patterns(2048), torch.linspace(-20, 20, 2001), torch.linspace(-90, -86, 101)])
    value, slope = torch.empty_like(z), torch.empty_like(z)
    block = triton.next_power_of_2(z.numel())
    activation_kernel[(1,)](z, value, slope, COUNT=z.numel(), BLOCK=block, ACTIVATION=activation)
    same_bits(value, torch.tensor([_math.activate(v, activation) for v in z.tolist()]))
    same_bits(slope, torch.tensor([_math.activation_slope(v, activation) for v in z.tolist()]))


def test_quantisation_is_the_bits_of_csrc_math() -> None:
    x = patterns(1024)[:1024].reshape(32, 32)
    q, scale = int8_quantize_rows.int8_quantize_rows(x)
    for row, q_row, row_scale in zip(x, q, scale, strict=True):
        largest = math.nan if row.isnan().any() else row.abs().max().item()
        amax, inverse, expected = _math.row_scale(largest)
        same_bits(row_scale, torch.tensor(expected))
        assert q_row.tolist() == [_math.quantize(value, amax, inverse) for value in row.tolist()]


@pytest.mark.parametrize("width", [1, 127, 128, 129, 1024, 1025, 4097, 8192, 8193, 16400])
def test_every_block_of_the_quantisation(width: int) -> None:
    x = torch.randn(3, width, generator=torch.Generator().manual_seed(width)).to(torch.bfloat16)
    for got, expected in zip(
        int8_quantize_rows.int8_quantize_rows(x), registry.get("int8_quantize_rows").reference(x), strict=True
    ):
        assert torch.equal(got, expected)


def integers(m: int, n: int, k: int) -> tuple[torch.Tensor, ...]:
    """x with scale 1, a packed weight, unit scales and a bias: the result is exact in fp32."""
    generator = torch.Generator().manual_seed(m + n + k)
    x = torch.randint(-8, 9, (m, k), generator=generator).float()
    x[:, 0] = 127
    weight = torch.randint(-8, 9, (n, k), generator=generator).to(torch.int8)
    packed = torch.nn.functional.pad(weight, (0, -k % 16))
    return x, packed, torch.ones(n), torch.randint(-8, 9, (n,), generator=generator).float()


@pytest.mark.parametrize("even", [True, False], ids=["even", "ragged"])
@pytest.mark.parametrize("tile", ALL_TILES, ids=lambda tile: tile.name)
def test_every_forward_tile_is_exact(tile: tiles.Tile, even: bool) -> None:
    k = 2 * tile.block_k if even else tile.block_k + 7
    x, weight, scale, bias = integers(tile.block_m + 3, tile.block_n + 5, k)
    expected = (x.double() @ weight[:, :k].double().T + bias).float()
    paths = [int8_linear.forward_split] + [int8_linear.forward_fused] * (tile in FUSED_TILES)
    for path in paths:
        y = torch.full_like(expected, math.nan)
        path(x, weight, scale, bias, 0, y, tile)
        assert torch.equal(y, expected), path.__name__


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("tile", SPLIT_TILES, ids=lambda tile: tile.name)
def test_every_backward_tile_is_exact(tile: tiles.Tile, dtype: torch.dtype) -> None:
    dz, n, k = torch.empty(tile.block_m + 3, tile.block_k + 5), tile.block_k + 5, tile.block_n + 7
    _, weight, scale, _ = integers(1, n, k)
    dz.random_(-8, 9, generator=torch.Generator().manual_seed(1))
    dx = torch.full((dz.shape[0], k), math.nan, dtype=dtype)
    int8_linear.input_gradient(dz.to(dtype), weight, scale, dx, tile)
    assert torch.equal(dx, (dz.double() @ weight[:, :k].double()).to(dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_both_forward_paths_give_the_same_bits(dtype: torch.dtype, activation: int) -> None:
    generator = torch.Generator().manual_seed(activation)
    x = torch.randn(19, 150, generator=generator)
    x[3, 7], x[5, 9], x[6, 1] = math.nan, math.inf, -math.inf
    _, weight, _, bias = integers(1, 45, 150)
    scale, x = torch.rand(45, generator=generator) / 64, x.to(dtype)
    results = []
    for path in (int8_linear.forward_split, int8_linear.forward_fused):
        results.append(torch.empty(19, 45, dtype=dtype))
        path(x, weight, scale, bias.to(dtype), activation, results[-1], FUSED_TILES[0])
    same_bits(*results)
    expected = registry.get("int8_linear").reference(x.double(), weight, scale, bias, activation, torch.float64)
    assert torch.equal(results[0].isnan(), expected.isnan())
    assert torch.equal(results[0].isinf(), expected.isinf())


@pytest.mark.parametrize("n", [1, 2, 30, int8_linear.TWO_PARTS_MIN_N - 1, int8_linear.TWO_PARTS_MIN_N])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_the_split_keeps_the_elementwise_bound_under_cancellation(dtype: torch.dtype, n: int) -> None:
    """Rows of w that nearly cancel: the bound of rule N2 without a term of what is stored, but for dz * scale of a bf16
    dz, which is bf16."""
    generator = torch.Generator().manual_seed(n)
    dz = torch.randn(33, n, generator=generator)
    weight = torch.randint(-128, 128, (n, 48), generator=generator).to(torch.int8)
    dz[:, n - n // 2 :] = -dz[:, : n // 2]  # opposite halves, nearly equal scales
    weight[n - n // 2 :] = weight[: n // 2]
    scale = torch.ones(n) + torch.rand(n, generator=generator) * 1e-3
    dz = dz.to(dtype)
    dx, _ = int8_linear.int8_linear_backward(dz, None, weight, scale, None, 48, 0, False)
    v = dz.double() * scale.double() if dtype != torch.bfloat16 else (dz.float() * scale).bfloat16().double()
    exact, magnitude = v @ weight.double(), v.abs() @ weight.double().abs()
    bound = 2 * ((n + 2) * 2.0**-23 * magnitude + torch.finfo(dtype).eps * exact.abs()) + 1e-30
    assert ((dx.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_infinite_gradients_stay_infinite(dtype: torch.dtype) -> None:
    dz = torch.tensor([[math.inf, 1.0], [-math.inf, 1.0], [math.nan, 1.0], [3e38, 1.0]], dtype=dtype)
    weight = torch.tensor([[2, -3, 0], [1, 1, 1]], dtype=torch.int8)
    packed = torch.nn.functional.pad(weight, (0, 13))
    dx, _ = int8_linear.int8_linear_backward(dz, None, packed, torch.ones(2), None, 3, 0, False)
    expected = dz.float() @ weight.float()
    assert torch.equal(dx.isnan(), expected.isnan())
    assert torch.equal(dx.isinf(), expected.isinf())
    assert torch.equal(dx[~dx.isnan()].sign(), expected[~expected.isnan()].sign())


@pytest.mark.parametrize("m", [0, 1, 31, 256, 257, 700])
def test_bias_gradients_sum_every_row_once(m: int) -> None:
    dz = torch.randint(-8, 9, (m, 150), generator=torch.Generator().manual_seed(m)).float()
    assert torch.equal(int8_linear.column_sums(dz), dz.sum(0))


@triton.jit
def keep_kernel(seed_ptr, result_ptr, first_m, first_k, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    m, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    mask = philox.keep(tl.load(seed_ptr), tl.load(first_m) + m, first_k, threshold, ROWS, COLUMNS)
    tl.store(result_ptr + m[:, None] * COLUMNS + k[None, :], mask)


def kept(seed: int, first_m: int, first_k: int, p: float, rows: int, columns: int) -> torch.Tensor:
    result = torch.empty(rows, columns, dtype=torch.int32)
    keep_kernel[(1,)](
        *(torch.tensor([seed]), result, torch.tensor(first_m), first_k, dropout.threshold(p)),
        ROWS=rows,
        COLUMNS=columns,
    )
    return result != 0


@pytest.mark.parametrize("p", [1e-5, 0.1, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("seed", [0, 42, -1, 2**63 - 1, -(2**63), 0x1234567890ABCDEF])
def test_the_dropout_mask_is_the_same_bits(seed: int, p: float) -> None:
    expected = dropout.keep(torch.tensor([seed]), 48, 192, p)
    assert torch.equal(kept(seed, 16, 64, p, 32, 128), expected[16:, 64:])


@pytest.mark.parametrize("row", [2**31 - 8, 2**32 - 8, 5 * 2**32 + 3])
def test_the_dropout_mask_goes_on_beyond_32_bits_of_rows(row: int) -> None:
    rows, groups, zero = torch.arange(row, row + 16)[:, None], torch.arange(4), torch.zeros(16, 4, dtype=torch.int64)
    words = dropout.philox((groups + zero, (rows & 0xFFFFFFFF) + zero, (rows >> 32) + zero, zero), (zero + 7, zero))
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], -1).reshape(16, 32)
    assert torch.equal(kept(7, row, 0, 0.3, 16, 32), halves >= dropout.threshold(0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_what_is_dropped_is_zero_even_if_it_was_nan(dtype: torch.dtype) -> None:
    x = torch.full((16, 32), math.nan, dtype=dtype)
    seed = torch.tensor([3])
    y = torch.empty(16, 32, dtype=dtype)
    drop_kernel[(1,)](x, seed, y, dropout.threshold(0.5), ROWS=16, COLUMNS=32)
    assert torch.equal(y.isnan(), dropout.keep(seed, 16, 32, 0.5))
    assert (y[~y.isnan()] == 0).all()


@triton.jit
def drop_kernel(x_ptr, seed_ptr, y_ptr, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    m, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    offsets = m[:, None] * COLUMNS + k[None, :]
    y = philox.kept(tl.load(x_ptr + offsets), tl.load(seed_ptr), m.to(tl.int64), 0, threshold)
    tl.store(y_ptr + offsets, y)


def adapter(m: int, n: int, rank: int, dtype: torch.dtype) -> tuple[Sums, torch.Tensor, torch.Tensor]:
    """Integer sums in two splits whose total is halved, the other factor [N, R], and their product."""
    generator = torch.Generator().manual_seed(m + n + rank)
    data = torch.randint(-4, 5, (2, m, -(-rank // 16) * 16), generator=generator).float() * 2
    B = torch.randint(-4, 5, (n, rank), generator=generator).to(dtype)
    return Sums(data, rank, 0.5), B, data.sum(0)[:, :rank].double() / 2 @ B.double().T


@pytest.mark.parametrize(("tile", "dtype"), FLOAT_TILES, ids=lambda value: getattr(value, "name", str(value)[6:]))
def test_every_tile_over_a_float_base_is_exact(tile: tiles.Tile, dtype: torch.dtype) -> None:
    """The forward of one kernel and of two, and the backward's product under a mask; ranks take two blocks."""
    m, n, k = tile.block_m + 3, tile.block_n + 5, 2 * tile.block_k
    x, weight, _, bias = integers(m, n, k)
    x, weight, bias = x.clamp(-8, 8).to(dtype), weight[:, :k].to(dtype), bias.to(dtype)
    sums, B, low = adapter(m, n, 20 if dtype == torch.float32 else 70, dtype)
    base = x.double() @ weight.double().T
    y = torch.full((m, n), math.nan, dtype=dtype)
    lora_linear.multiply(x, weight.T, sums, B.T, bias, None, y, tile)
    assert torch.equal(y, (base + low + bias.double()).to(dtype))
    if tile.block_m <= lora_linear_split.MATRIX_ROWS:
        parts, _ = lora_linear_split.split(x, weight.T, None, tile, 2)
        assert len(parts) == 2
        lora_linear_split.join(parts, sums, B.T, bias, None, y.fill_(math.nan))
        assert torch.equal(y, (base + low + bias.double()).to(dtype))
    mask, ragged = Dropout(torch.tensor([5]), 30000), x[:, :-5]
    columns, thin = weight.T[:-5].contiguous(), B.T.contiguous()
    lora_linear.multiply(ragged, columns, sums, thin, None, mask, y.fill_(math.nan), tile)
    keep = dropout.keep(mask.seed, m, n, 30000 / 65536)
    assert torch.equal(y, (ragged.double() @ columns.double() + torch.where(keep, low, 0.0)).to(dtype))


@pytest.mark.parametrize("tile", ALL_TILES, ids=lambda tile: tile.name)
def test_every_forward_tile_over_an_int8_base_is_exact(tile: tiles.Tile) -> None:
    m, n, k = tile.block_m + 3, tile.block_n + 5, tile.block_k + 7
    x, weight, scale, bias = integers(m, n, k)
    sums, B, low = adapter(m, n, 20, torch.float32)
    y = torch.full((m, n), math.nan)
    lora_linear_int8.multiply(x, weight, scale, bias, sums, B.T, y, tile)
    assert torch.equal(y, (x.double() @ weight[:, :k].double().T + low + bias).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("tile", SPLIT_TILES, ids=lambda tile: tile.name)
def test_every_backward_tile_over_an_int8_base_is_exact(tile: tiles.Tile, dtype: torch.dtype) -> None:
    m, n, k = tile.block_m + 3, tile.block_k + 5, tile.block_n + 7
    dy = torch.randint(-8, 9, (m, n), generator=torch.Generator().manual_seed(n)).to(dtype)
    _, weight, scale, _ = integers(1, n, k)
    sums, A, low = adapter(m, k, 20, dtype)
    mask = Dropout(torch.tensor([-5]), 30000)
    dx = torch.full((m, k), math.nan, dtype=dtype)
    lora_linear_int8.pull_back(dy, weight, scale, sums, A.T.contiguous(), mask, dx, tile)
    keep = dropout.keep(mask.seed, m, k, 30000 / 65536)
    assert torch.equal(dx, (dy.double() @ weight[:, :k].double() + torch.where(keep, low, 0.0)).to(dtype))


@pytest.mark.parametrize("rank", [5, 40, 100, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_every_path_through_a_pair_of_factors_is_exact(dtype: torch.dtype, rank: int) -> None:
    x, A, B, bias = (t.to(dtype) for t in factors(70, 70, 90, rank))
    expected = ((x.double() @ A.double().T) @ B.double().T + bias.double()).to(dtype)
    y = torch.full((70, 70), math.nan, dtype=dtype)
    lowrank_linear.forward_split(x, A, B, bias, y)
    assert torch.equal(y, expected)
    arches = target.ARCHITECTURES if rank <= lowrank_linear.MAX_FUSED_RANK[dtype.itemsize] else ()
    for tile in {tile for arch in arches for tile in lowrank_linear.fused_tiles(arch, rank, dtype.itemsize)}:
        lowrank_linear.forward_fused(x, A, B, bias, y.fill_(math.nan), tile)
        assert torch.equal(y, expected), tile.name


def factors(m: int, n: int, k: int, rank: int) -> tuple[torch.Tensor, ...]:
    """x, A, B and a bias of integers; A has few in a row, so that a bf16 holds x A^T."""
    generator = torch.Generator().manual_seed(rank)
    A = torch.zeros(rank, k).scatter_(1, torch.randint(k, (rank, 4), generator=generator), 1.0)
    x, B = (torch.randint(-8, 9, shape, generator=generator).float() for shape in ((m, k), (n, rank)))
    return x, A, B, torch.randint(-8, 9, (n,), generator=generator).float()


def test_objections_name_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, scale, _ = integers(2, 16, 16)
    assert int8_linear.supports(x, weight, scale, None, 0, None) is None
    assert "vnni layout" in str(int8_linear.supports(x, weight.to(torch.uint8), scale, None, 0, None))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "on the CPU" in str(target.objection(x))


def test_tiles_fill_the_device() -> None:
    table = tiles.INT8_GEMM["sm_90"]
    assert tiles.pick(table, 4096, 4096, 132) == table[0]
    assert tiles.pick(table, 1, 4096, 132).block_m == 16
    small = tiles.pick(table, 128, 384, 132)
    assert small.block_m * small.block_n == min(t.block_m * t.block_n for t in table)
