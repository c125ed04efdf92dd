"""The Triton kernels of the optimizers, interpreted: they have the reference's bits, case by case and special values
included, and sums to the last bits of fp64; the twins of csrc/math that they are made of; and the tables by which they
find their tensors."""

from __future__ import annotations

import math

import triton_interpreter

triton_interpreter.require()

import burnish  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from burnish import dispatch, dropout, moments, registry, rounding  # noqa: E402
from burnish.arguments import map_tensors, places, put  # noqa: E402
from burnish.kernels.common import lists  # noqa: E402
from burnish.kernels.common import moments as moment_twins  # noqa: E402
from burnish.kernels.common import rounding as twins  # noqa: E402
from burnish.kernels.optim import lamb_squares  # noqa: E402
from burnish.registry import Case, OpSpec  # noqa: E402
from burnish.testing import calls  # noqa: E402
from optimizers import OPTIMIZERS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NumPy's, of NaN and infinities

STEPS = [
    spec
    for name, spec in registry.all_ops().items()
    if name.endswith(("_step", "_squares")) and any(impl.backend == "triton" for impl in spec.impls)
]
CASES = [(spec, case) for spec in STEPS for case in spec.cases.test]
IDS = [f"{spec.stem}-{case.id}" for spec, case in CASES]
each_case = pytest.mark.parametrize(("spec", "case"), CASES, ids=IDS)
SPECIAL = (math.nan, math.inf, -math.inf, -0.0, 1e-45, -1e-40, 3e38, 1e-6, 6e4)
TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
each_type = pytest.mark.parametrize("dtype", TYPES, ids=registry.dtype_name)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> None:
    """Equal values, or NaN in the same places."""
    assert left.dtype == right.dtype
    if not left.is_floating_point():
        assert torch.equal(left, right)
        return
    assert torch.equal(left.isnan(), right.isnan())
    integer = {2: torch.int16, 4: torch.int32}[left.element_size()]
    kept = ~left.isnan()
    assert torch.equal(left[kept].view(integer), right[kept].view(integer))


def compare(spec: OpSpec, args: calls.Args) -> None:
    for one, two in zip(calls.run(spec, "triton", args), calls.eager(spec, args), strict=True):
        if two.dtype == torch.float64:
            # sums, of squares alone: their order is not the reference's
            torch.testing.assert_close(one, two, rtol=1e-14, atol=0, equal_nan=True)
        else:
            same_bits(one, two)


@each_case
def test_a_step_has_the_references_bits(spec: OpSpec, case: Case) -> None:
    args = spec.make(case, "triton", 1)
    compare(spec, args)
    first, *_ = args[0]
    if case.options.get("skip") or first.numel() < 2 * len(SPECIAL):
        return
    spoilt = map_tensors(torch.clone, args)
    generator = torch.Generator().manual_seed(len(SPECIAL))
    for (_, *item), tensor in places(spoilt).items():
        if item == [0] and tensor.is_floating_point() and tensor.shape == first.shape:
            flat = tensor.view(-1)
            at = torch.randperm(flat.numel(), generator=generator)
            flat[at[: len(SPECIAL)]] = torch.tensor(SPECIAL).to(flat.dtype)
    compare(spec, spoilt)


@pytest.mark.parametrize("op", ["adam_step", "lamb_step", "lamb_squares"])
@pytest.mark.parametrize("name", ["lr", "grad_norm", "grad_scale", "found_inf"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=registry.dtype_name)
def test_scalars_have_the_references_effect(op: str, name: str, value: float, dtype: torch.dtype) -> None:
    spec = registry.get(op)
    args = spec.make(Case({"N": 33}, torch.float32, options={"amp": True}), "triton", 0)
    names = [argument.name for argument in spec.overload()._schema.arguments]
    changed = list(args)
    changed[names.index(name)] = torch.tensor([value], dtype=dtype)
    compare(spec, tuple(changed))


SUMS = (0.0, 1e-300, 0.25, 1.0, 9.0, 1e300, math.inf, math.nan, -1.0)


@pytest.mark.parametrize("options", [{}, {"clip": True}, {"unadapted": True}], ids=str)
def test_given_squares_have_the_references_effect(options: dict[str, bool]) -> None:
    spec = registry.get("lamb_step")
    args = spec.make(Case({"N": 1}, torch.float32, options={"given": True, **options}), "triton", 0)
    pairs = torch.cartesian_prod(*[torch.tensor(SUMS, dtype=torch.float64)] * 2)
    count = len(args[0])
    place = [argument.name for argument in spec.overload()._schema.arguments].index("squares")
    for squares in torch.nn.functional.pad(pairs, (0, 0, 0, -len(pairs) % count), value=1.0).split(count):
        compare(spec, put(args, (place,), squares.contiguous()))


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "masked"])
def test_squares_are_of_every_chunk(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of no chunk and of many, whose dtypes and sizes take them to various launches, in another order."""
    monkeypatch.setattr(lamb_squares, "CHUNK", 2048)
    monkeypatch.setattr(lamb_squares, "SUM_BLOCK", 2)
    generator = torch.Generator().manual_seed(3)
    sizes = (1, 2048, 0, 2049, 10_300, 16, 6144)
    dtypes = [(torch.float32, torch.bfloat16, torch.float16)[size % 3] for size in sizes]

    def draw(spread: float) -> list[torch.Tensor]:
        return [torch.randn(size, generator=generator) * spread for size in sizes]

    params = [one.to(dtype) for one, dtype in zip(draw(2.0), dtypes, strict=True)]
    lists = (params, draw(1.0), [torch.tensor(4.0) for _ in sizes], draw(0.1), [one.square() for one in draw(0.5)])
    masks = [] if whole else [one > 0 for one in draw(1.0)]
    results = []
    for backend in ("cpu", "triton"):
        copies = map_tensors(torch.clone, lists)
        with burnish.use_backend(backend):
            squares = burnish.ops.lamb_squares(*copies, masks=masks, weight_decay=0.25)
            burnish.ops.lamb_step(*copies, masks=masks, weight_decay=0.25, lr=torch.tensor(0.5))
        results.append((squares, [one for tensors in copies for one in tensors]))
    (expected, stepped), (squares, interpreted) = results
    torch.testing.assert_close(squares, expected, rtol=1e-14, atol=0)
    for one, two in zip(interpreted, stepped, strict=True):
        same_bits(one, two)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_steps_as_on_the_cpu(name: str) -> None:
    """What the class hands over runs on either backend, with the same bits after some steps."""
    entry = OPTIMIZERS[name]
    results = []
    for backend in ("cpu", "triton"):
        generator = torch.Generator().manual_seed(5)
        params = [
            torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
            for shape, dtype in (((33, 9), torch.bfloat16), ((7,), torch.float32), ((), torch.float32))
        ]
        optimizer = entry.ours(
            params, lr=0.1, weight_decay=0.25, state_dtype="int8", master_weights="split", ema_decay=0.5,
            max_grad_norm=1.0, **entry.options,
        )  # fmt: skip
        with burnish.use_backend(backend):
            for _ in range(3):
                for parameter in params:
                    parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
                optimizer.step()
        results.append([*params, *(value for state in optimizer.state.values() for value in state.values())])
    for cpu, interpreted in zip(*results, strict=True):
        same_bits(interpreted.detach(), cpu.detach())


def patterns(count: int) -> torch.Tensor:
    """fp32 of every exponent, NaN, infinities and subnormals among them."""
    generator = torch.Generator().manual_seed(7)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator, dtype=torch.int64).to(torch.int32)
    values = bits.view(torch.float32)
    values[::3] = torch.randn(values[::3].shape, generator=generator) * 2.0**-13
    values[: len(SPECIAL)] = torch.tensor(SPECIAL)
    return values


@triton.jit
def rounding_kernel(
    value_ptr, random_ptr, rounded_ptr, high_ptr, low_ptr, joined_ptr, TYPE: tl.constexpr, N: tl.constexpr
):
    at = tl.arange(0, N)
    value = tl.load(value_ptr + at)
    tl.store(rounded_ptr + at, twins.round_random(value, tl.load(random_ptr + at), TYPE))
    high, low = twins.split(value, TYPE)
    tl.store(high_ptr + at, high)
    tl.store(low_ptr + at, low.to(tl.uint8, bitcast=True))
    tl.store(joined_ptr + at, twins.join(high, low))


@each_type
def test_rounding_has_the_bits_of_its_definition(dtype: torch.dtype) -> None:
    value = patterns(1 << 14)
    random = rounding.random_bits(11, 0, 1, value.numel())
    rounded, high = (torch.empty(value.shape, dtype=dtype) for _ in range(2))
    low, joined = torch.empty(value.shape, dtype=torch.uint8), torch.empty(value.shape)
    rounding_kernel[(1,)](value, random, rounded, high, low, joined, TYPE=TYPES[dtype], N=value.numel())
    same_bits(rounded, rounding.round_random(value, dtype, random))
    for mine, defined in zip((high, low), rounding.split(value, dtype), strict=True):
        same_bits(mine, defined)
    same_bits(joined, rounding.join(high, low))


@triton.jit
def halves_kernel(halves_ptr, seed, tensor, group, STREAM: tl.constexpr, GROUPS: tl.constexpr):
    groups = group.to(tl.int64) + tl.arange(0, GROUPS)[None, :]
    halves = twins.rounding_halves(seed, tensor, STREAM, groups)
    tl.store(halves_ptr + tl.arange(0, GROUPS * 8)[None, :], halves)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**62 + 3, 2**63 - 1])
@pytest.mark.parametrize("group", [0, 2**32 - 8])
def test_random_bits_are_those_of_their_definition(seed: int, group: int) -> None:
    count = torch.arange(group, group + 16)
    fixed = (torch.full_like(count, 5), torch.ones_like(count))
    key = (torch.tensor(seed & 0xFFFFFFFF), torch.tensor(seed >> 32))
    words = dropout.philox((count & 0xFFFFFFFF, count >> 32, *fixed), key, rounding.ROUNDS)
    for stream in (1, 2, 3, 4):
        halves = torch.empty(128, dtype=torch.int32)
        halves_kernel[(1,)](halves, seed, 5, group, STREAM=stream, GROUPS=16)
        turned = words[stream - 1 :] + words[: stream - 1]
        expected = torch.stack([half for word in turned for half in (word & 0xFFFF, word >> 16)], -1).view(-1)
        assert torch.equal(halves.long(), expected)
        if group == 0:
            assert torch.equal(halves, rounding.random_bits(seed, 5, stream, 128))


@triton.jit
def moments_kernel(
    moment_ptr, code_ptr, scale_ptr, decoded_ptr, SIGNED: tl.constexpr, BLOCKS: tl.constexpr, N: tl.constexpr
):
    row = tl.arange(0, BLOCKS)
    at = row[:, None] * 256 + tl.arange(0, 256)[None, :]
    code, scale = moment_twins.encode_moment(tl.load(moment_ptr + at), at < N, SIGNED)
    tl.store(code_ptr + at, code)
    tl.store(scale_ptr + row, scale)
    tl.store(decoded_ptr + at, moment_twins.decode_moment(code, scale, SIGNED))


@pytest.mark.parametrize("signed", [True, False], ids=["first", "second"])
def test_codes_of_moments_are_those_of_their_definition(signed: bool) -> None:
    """Blocks of every magnitude, one of zeros, some with what is not finite, the last one short."""
    count, blocks = 63 * 256 + 100, 64
    moment = patterns(blocks * 256)
    moment = torch.where(moment.isfinite(), moment, 1.0)
    moment = (moment if signed else moment.abs()).view(blocks, 256)
    moment[1], moment[2] = 0.0, moment[2].clamp(-1e-12, 1e-12)
    moment[3, 7], moment[4, 8], moment[5, 9] = math.nan, math.inf, -1.0
    code, scale = torch.empty(blocks * 256, dtype=torch.int8), torch.empty(blocks)
    decoded = torch.empty(blocks * 256)
    moments_kernel[(1,)](moment, code, scale, decoded, SIGNED=signed, BLOCKS=blocks, N=count)
    expected, scales = moments.encode(moment.view(-1)[:count], signed)
    same_bits(scale, scales)
    assert torch.equal(code[:count].view(expected.dtype), expected)
    same_bits(decoded[:count], moments.decode(expected, scales))


@triton.jit
def walk_kernel(starts_ptr, found_ptr, first, count, before):
    item, block = lists.item_of(starts_ptr, first, count, before + tl.program_id(0))
    tl.store(found_ptr + tl.program_id(0) * 2, item)
    tl.store(found_ptr + tl.program_id(0) * 2 + 1, block)


each_sizes = pytest.mark.parametrize("sizes", [[5], [0, 5], [5, 0, 0], [0, 17, 0, 8, 1, 0, 40, 0], [16] * 33])


def walk(table: lists.Table, starts: torch.Tensor, launch: lists.Launch, programs: int, before: int) -> list[list[int]]:
    """The items' places in the lists, and their blocks, that a launch of so many programs finds."""
    found = torch.full((programs, 2), -1, dtype=torch.int32)
    if programs:
        walk_kernel[(programs,)](starts, found, launch.first, launch.count, before)
    index = table.rows[2 * table.items : 3 * table.items].tolist()
    return [[index[item], block] for item, block in found.tolist()]


@each_sizes
def test_every_block_is_found(sizes: list[int]) -> None:
    table = lists.table(8, ([torch.zeros(size) for size in sizes],))
    assert table.blocks == sum(-(-size // 8) for size in sizes)
    walked = [one for launch in table.launches for one in walk(table, table.rows, launch, launch.blocks, 0)]
    assert sorted(walked) == [[item, block] for item, size in enumerate(sizes) for block in range(-(-size // 8))]


@each_sizes
def test_every_chunk_is_found(sizes: list[int]) -> None:
    """By the table's last row, whose starts count through all launches."""
    table = lists.table(4, ([torch.zeros(size) for size in sizes],), chunk=8)
    walked: list[list[int]] = []
    for launch in table.launches:
        walked += walk(table, table.rows[-table.items :], launch, launch.chunks, len(walked))
    assert table.chunks == len(walked)
    assert sorted(walked) == [[item, chunk] for item, size in enumerate(sizes) for chunk in range(-(-size // 8))]


def test_a_table_is_kept_until_a_tensor_moves() -> None:
    tensors = [torch.zeros(64) for _ in range(3)]
    table = lists.table(32, (tensors,))
    assert lists.table(32, (list(tensors),)) is table
    moved = [tensors[0].clone(), *tensors[1:]]
    assert lists.table(32, (moved,)) is not table
    assert lists.table(32, ([tensors[0][:32], *tensors[1:]],)) is not table
    assert lists.numbers((1.0, 2.0), torch.device("cpu")) is lists.numbers((1.0, 2.0), torch.device("cpu"))


def test_launches_differ_in_dtype_and_alignment() -> None:
    whole = torch.zeros(64, dtype=torch.float16)
    tensors = [whole, torch.zeros(64), whole[1:33], torch.zeros(63), torch.zeros(64)]
    launches = lists.table(32, (tensors,)).launches
    assert [(one.types, one.aligned, one.count) for one in launches] == [
        ((tl.float16,), True, 1),
        ((tl.float32,), True, 2),
        ((tl.float16,), False, 1),
        ((tl.float32,), False, 1),
    ]


@pytest.mark.parametrize(
    ("op", "name", "place"),
    [
        ("adam_step", "steps", (2, 1)),
        ("adam_step", "scales", (6, 0)),
        ("adam_step", "lr", (10,)),
        ("adam_step", "found_inf", (21,)),
        ("lamb_step", "squares", (17,)),
    ],
)
def test_tensors_elsewhere_are_declined(op: str, name: str, place: tuple[int, ...]) -> None:
    spec = registry.get(op)
    options = {"state": "int8", "amp": True, "given": True}
    args = spec.make(Case({"N": 7}, torch.float32, options=options), "triton", 0)
    changed = put(args, place, places(args)[place].to("meta"))
    reason = dispatch.objection(next(impl for impl in spec.impls if impl.backend == "triton"), changed)
    assert reason is not None
    assert reason.startswith(name)
    assert "on meta, expected cpu" in reason
