"""What the optimizers' ops promise beyond the kit's rules: trajectories (N6), rounding without bias, steps that are
skipped, layouts."""

from __future__ import annotations

import math
from typing import Any

import burnish
import pytest
import torch
from burnish import moments, native, ops, registry, rounding
from burnish.registry import Case, OpSpec
from burnish.testing.calls import on_copies
from optimizers import Calls
from torch._subclasses.fake_tensor import FakeTensorMode

SPECS = {name: spec for name, spec in registry.all_ops().items() if spec.schema.startswith("(Tensor(a!)[] params")}
STEPS = 100
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = ((257, 9), (33,), (1000,))


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(shape, generator=generator) for shape in SIZES]


def start(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SIZES]


def torchs(dtype: torch.dtype, given: torch.dtype, amsgrad: bool, decoupled: bool) -> list[torch.Tensor]:
    """STEPS of torch.optim's foreach in ``dtype``, on gradients and parameters that ``given`` holds."""
    params = [p.to(dtype).requires_grad_() for p in start(given)]
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind(params, lr=1e-2, weight_decay=0.05, amsgrad=amsgrad, foreach=True)
    for step in range(STEPS):
        for param, grad in zip(params, gradients(step), strict=True):
            param.grad = grad.to(given).to(dtype)
        optimizer.step()
    return [p.detach() for p in params]


def ours(dtype: torch.dtype, amsgrad: bool, decoupled: bool, master: str | None = None) -> list[torch.Tensor]:
    params, masters = start(dtype), []
    if master == "fp32":
        masters = [p.float() for p in params]
    elif master == "split":
        masters = [torch.zeros_like(p, dtype=torch.uint8) for p in params]
    state = torch.float32 if master else dtype
    first, second, greatest = ([torch.zeros_like(p, dtype=state) for p in params] for _ in range(3))
    steps = [torch.zeros(()) for _ in params]
    for step in range(STEPS):
        grads = [grad.to(dtype) for grad in gradients(step)]
        ops.adam_step(
            params,
            grads,
            steps,
            first,
            second,
            greatest if amsgrad else [],
            masters=masters,
            lr=torch.tensor(1e-2, dtype=torch.float64),
            weight_decay=0.05,
            decoupled=decoupled,
        )
    assert all(float(step) == STEPS for step in steps)
    if master == "split":
        return [rounding.join(p, low) for p, low in zip(params, masters, strict=True)]
    return masters or params


def deviations(params: list[torch.Tensor], exact: list[torch.Tensor]) -> list[float]:
    """The greatest of each parameter."""
    return [float((p.double() - e).abs().max()) for p, e in zip(params, exact, strict=True)]


@pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "coupled"])
@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_hundred_steps_stay_as_close_to_float64_as_torchs(dtype: torch.dtype, amsgrad: bool, decoupled: bool) -> None:
    exact = torchs(torch.float64, dtype, amsgrad, decoupled)
    theirs = deviations(torchs(dtype, dtype, amsgrad, decoupled), exact)
    mine = deviations(ours(dtype, amsgrad, decoupled), exact)
    assert all(0 < own <= 2 * other for own, other in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(("master", "bits"), [("fp32", 24), ("split", 16)])
def test_masters_of_bf16_parameters_follow_float64(master: str, bits: int) -> None:
    """A hundred roundings of as many bits as the master has, and of the moments' fp32."""
    exact = torchs(torch.float64, torch.bfloat16, False, True)
    got = ours(torch.bfloat16, False, True, master)
    largest = max(float(e.abs().max()) for e in exact)
    assert max(deviations(got, exact)) <= STEPS * largest * 2.0**-bits


each_step = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def arguments(spec: OpSpec, seed: int = 0, **options: Any) -> tuple[Any, ...]:
    """Of a case with the options of the op's first."""
    dtype = options.pop("dtype", torch.bfloat16)
    return spec.make(Case({"N": 1000}, dtype, options={**spec.cases.test[0].options, **options}), "cpu", seed)


def place(spec: OpSpec, name: str) -> int:
    return [argument.name for argument in spec.overload()._schema.arguments].index(name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stochastic_rounding_is_unbiased(dtype: torch.dtype) -> None:
    """Over a million draws the mean is the value, within three standard errors of a Bernoulli variable."""
    draws, value = 2**20, 1 + 0.3 * float(torch.finfo(dtype).eps)
    params, zeros = [torch.full((draws,), value, dtype=torch.float32)], torch.zeros(draws)
    below, above = 1.0, 1 + float(torch.finfo(dtype).eps)
    for seed in range(3):
        # a step of nothing from an average of the value: lr 0, so the parameter is rounded alone
        low = [params[0].to(dtype)]
        ops.adam_step(
            low, [torch.full((draws,), -0.3, dtype=torch.float32)], [torch.zeros(())], [zeros.clone()], [zeros.clone()],
            lr=torch.tensor(0.3 * float(torch.finfo(dtype).eps), dtype=torch.float64), eps=0.0, seed=seed,
        )  # fmt: skip
        assert set(low[0].float().unique().tolist()) == {below, above}
        share = float((low[0].float() == above).double().mean())
        assert abs(share - 0.3) <= 3 * math.sqrt(0.3 * 0.7 / draws) + 2.0**-13


@each_step
def test_rounding_differs_by_seed_parameter_and_moment_and_by_nothing_else(spec: OpSpec) -> None:
    args = arguments(spec, state="bf16", stochastic=True)
    call = on_copies(spec, spec.entry)
    first, again = call(*args), call(*args)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    other = call(*args[:-1], args[-1] + 1)
    assert not torch.equal(first[0], other[0])
    streams = [rounding.random_bits(1, tensor, stream, 64) for tensor in (0, 1) for stream in (1, 2)]
    assert len({tuple(bits.tolist()) for bits in streams}) == 4


@pytest.mark.parametrize("seed", [None, 1])
def test_a_nan_stays_one_whatever_its_bits(seed: int | None) -> None:
    """Each of bf16's in every tensor of a step, and one of fp32 that random bits, added to it, would carry away."""
    names, each = ("param", "grad", "first", "second", "greatest"), 2 * 127
    patterns = torch.cat([torch.arange(sign + 1, sign + 128) for sign in (0x7F80, 0xFF80)])
    for name in names:
        tensors = {other: torch.full((each + 5,), 0.5, dtype=torch.bfloat16) for other in names}
        tensors[name][:each] = (patterns - (patterns >> 15 << 16)).to(torch.int16).view(torch.bfloat16)
        param, grad, first, second, greatest = ([tensor] for tensor in tensors.values())
        ops.adam_step(
            param,
            grad,
            [torch.zeros(())],
            first,
            second,
            greatest,
            lr=torch.tensor(0.1, dtype=torch.float64),
            seed=seed,
        )
        reached = {"grad": names, "first": ("param", "first"), "second": ("param", "second", "greatest")}
        for other in reached.get(name, ("param", name)):
            assert tensors[other].isnan().tolist() == [True] * each + [False] * 5, f"{name} to {other}"
    nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    for scalars in ({"lr": nan}, {"lr": torch.tensor(0.1), "grad_scale": nan}):
        param, grad, first, second = ([torch.full((each,), 0.5, dtype=torch.bfloat16)] for _ in range(4))
        ops.adam_step(param, grad, [torch.zeros(())], first, second, **scalars, seed=seed)
        assert bool(param[0].isnan().all())


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
@pytest.mark.parametrize("tensor", [0, 2**32 - 1])
def test_random_bits_are_the_same_in_python_and_in_cpp(seed: int, tensor: int) -> None:
    math_ = pytest.importorskip("burnish._math", reason="it is built where Python.h is installed")
    for group in (0, 1, 31):
        words = math_.rounding_words(seed, tensor, group)
        halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
        assert rounding.random_bits(seed, tensor, 1, 8 * group + 8).tolist()[-8:] == halves


def test_bits_of_one_element_and_of_one_stream_are_independent() -> None:
    """Means of 2 ** 20 draws and their correlations, within four standard errors of what they stand for."""
    draws, limit = 2**20, 4 * 2.0**-10
    streams = torch.stack([rounding.random_bits(5, 3, stream, draws) for stream in (1, 2, 3, 4)]).double()
    centred = (streams - 32767.5) * math.sqrt(12) / 65536
    assert (centred.mean(1).abs() <= limit).all()
    of_one_element = centred @ centred.t() / draws
    assert (of_one_element - torch.eye(4)).abs().max() <= limit
    for distance in range(1, 9):
        assert ((centred[:, distance:] * centred[:, :-distance]).mean(1).abs() <= limit).all()


@each_step
@pytest.mark.parametrize("item", [0, 1, 2])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("options", [{"amp": True}, {"amp": True, "state": "int8", "master": "split", "mask": True}])
def test_a_gradient_that_is_not_finite_changes_nothing(
    spec: OpSpec, options: dict[str, Any], item: int, bad: float
) -> None:
    args = list(arguments(spec, **options))
    args[1][item].view(-1)[-1] = bad
    norm, found = ops.grad_norm(args[1], args[place(spec, "grad_scale")])
    args[place(spec, "grad_norm")], args[place(spec, "found_inf")] = norm, found
    assert found == 1
    done = on_copies(spec, spec.entry)(*args)
    kept = on_copies(spec, lambda *_: None)(*args)
    assert len(done) == len(kept)
    assert all(torch.equal(one, two) for one, two in zip(done, kept, strict=True))


@each_step
def test_an_infinite_norm_beside_found_inf_changes_nothing(spec: OpSpec) -> None:
    args = list(arguments(spec, amp=True))
    args[place(spec, "grad_norm")] = torch.tensor(math.inf)
    kept = on_copies(spec, lambda *_: None)(*args)
    assert all(torch.equal(a, b) for a, b in zip(on_copies(spec, spec.entry)(*args), kept, strict=True))


@each_step
def test_any_dense_order_of_dimensions_is_stepped(spec: OpSpec) -> None:
    plain, turned = arguments(spec, dtype=torch.float32), arguments(spec, dtype=torch.float32)
    laid = [i for i in range(place(spec, "scales")) if i != place(spec, "steps")]
    turned = tuple([t.t().contiguous().t() for t in arg] if i in laid else arg for i, arg in enumerate(turned))
    call = on_copies(spec, spec.entry)
    assert all(torch.equal(a, b) for a, b in zip(call(*plain), call(*turned), strict=True))


@each_step
def test_gaps_and_other_strides_are_refused(spec: OpSpec) -> None:
    args = arguments(spec, dtype=torch.float32)
    wide = torch.zeros(2, 1000)[:, ::2]
    with pytest.raises(RuntimeError, match=rf"{spec.name}: params\[0\] has gaps or overlaps"):
        spec.entry([wide, *args[0][1:]], *args[1:])
    with pytest.raises(RuntimeError, match=rf"{spec.name}: grads\[0\] has other strides than params\[0\]"):
        spec.entry(args[0], [args[1][0].t().contiguous().t(), *args[1][1:]], *args[2:])


def test_autograd_learns_of_the_change() -> None:
    param = torch.ones(3)
    before = param._version
    zeros = [torch.zeros(3)], [torch.zeros(3)]
    ops.adam_step([param], [torch.ones(3)], [torch.zeros(())], *zeros, lr=torch.tensor(0.1))
    assert param._version > before


def test_the_kernel_for_gpus_is_called_without_a_way_through_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(native.missing, native.CUDA_LIBRARY, raising=False)
    monkeypatch.delenv("BURNISH_EMULATE_CUDA", raising=False)
    with FakeTensorMode():
        lists = [[torch.ones(3, device="cuda")] for _ in range(4)]
        steps, rate = [torch.ones((), device="cuda")], torch.ones((), device="cuda")
        with Calls() as called:
            ops.adam_step(lists[0], lists[1], steps, lists[2], lists[3], lr=rate)
            with burnish.use_backend("native"):
                ops.adam_step(lists[0], lists[1], steps, lists[2], lists[3], lr=rate)
    assert called.seen == ["burnish.adam_step.native", "burnish.adam_step.default"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_split_float_keeps_24_bits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(100_000, generator=generator) * torch.exp2(
        torch.randint(-13, 14, (100_000,), generator=generator)
    )
    high, low = rounding.split(value, dtype)
    bits = 15 if dtype == torch.bfloat16 else 18
    lost = (rounding.join(high, low) - value).abs()
    assert (lost <= value.abs() * 2.0 ** -(bits + 1) + torch.finfo(dtype).tiny * 2.0 ** -(bits + 1)).all()
    distance, least = ((one.double() - value.double()).abs() for one in (high, value.to(dtype)))
    assert (distance <= least * (1 + 2.0**-6)).all()
    again = rounding.split(rounding.join(high, low), dtype)
    assert torch.equal(high, again[0])
    assert torch.equal(low, again[1])


def test_codes_of_moments_are_as_near_as_they_promise() -> None:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(10_000, generator=generator)
    root = first.abs().sqrt()
    got = moments.decode(*moments.encode(first, True))
    largest = torch.nn.functional.pad(root, (0, -10_000 % 256)).view(-1, 256).amax(1).repeat_interleave(256)[:10_000]
    assert ((got.abs().sqrt() - root).abs() <= largest / 254 * 1.001).all()
    second = moments.decode(*moments.encode(first.square() * 1e-30 + 1e-44, False))
    assert (second > 0).all()


@pytest.mark.parametrize("exponent", [-140, -120, -71, -20, 0, 31])
def test_codes_beside_the_middle_of_two_are_the_nearest(exponent: int) -> None:
    generator = torch.Generator().manual_seed(exponent + 200)
    count, size = 400, 256 * 400 - 37
    limit = torch.tensor([127, 255]).repeat_interleave(256 * count // 2)[:size]
    middle = (torch.randint(0, 127, (size,), generator=generator) + 0.5) / limit
    near = middle.square().view(torch.int32) + torch.randint(-4, 5, (size,), generator=generator, dtype=torch.int32)
    grad = torch.ldexp(near.view(torch.float32), torch.tensor(exponent))
    grad[torch.rand(size, generator=generator) < 0.1] = 0
    grad[torch.rand(size, generator=generator) < 0.5] *= -1
    grad[:: 256 + 1] = 2.0**exponent
    first, second = torch.zeros(size, dtype=torch.int8), torch.zeros(size, dtype=torch.uint8)
    scales, rate = torch.zeros(2, count), torch.tensor(0.0)
    ops.adam_step(
        [torch.zeros(size)], [grad], [torch.zeros(())], [first], [second], scales=[scales], lr=rate, beta1=0, beta2=0
    )
    for codes, scale, value in zip((first, second), scales, (grad, grad.square()), strict=True):
        expected, expected_scale = moments.encode(value, codes.dtype == torch.int8)
        assert torch.equal(codes, expected)
        assert torch.equal(scale, expected_scale)
