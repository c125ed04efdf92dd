"""The optimizers' CUDA C++ kernels on the CPU: their bits are the CPU kernels', and their table follows the tensors.

``BURNISH_EMULATE_CUDA=1 pytest tests/test_step_kernels.py``; what they do by themselves is the conformance kit's
business (test_ops.py), which runs the same cases against the reference.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import burnish
import pytest
import torch
from burnish import dispatch, native, registry
from burnish.arguments import map_tensors
from burnish.registry import Case, Invalid, OpSpec
from burnish.testing import calls

pytestmark = pytest.mark.skipif(not native.emulating(), reason="needs BURNISH_EMULATE_CUDA=1")

STEPS = [spec for spec in registry.all_ops().values() if spec.stem.endswith(("_step", "_squares"))]
NATIVE = [spec for spec in STEPS if spec.impls]
CASES = [(spec, case) for spec in NATIVE for case in spec.cases.test]
ADAM, LAMB, SQUARES = (registry.get(name) for name in ("adam_step", "lamb_step", "lamb_squares"))
#: more than a block takes, not a multiple of what a warp or a lane does
LONG = 2 * 16384 + 300 + 3


def cpu(spec: OpSpec, args: tuple[Any, ...]) -> calls.Outputs:
    return calls.on_copies(spec, spec.entry)(*args)


def emulated(spec: OpSpec, args: tuple[Any, ...], seed: int = 0) -> calls.Outputs:
    torch.ops.burnish.emulation_seed(seed)
    return calls.on_copies(spec, spec.overload("native"))(*args)


def assert_same_bits(outputs: calls.Outputs, expected: calls.Outputs) -> None:
    for place, (one, two) in enumerate(zip(outputs, expected, strict=True)):
        assert one.dtype == two.dtype
        assert torch.equal(one.reshape(-1).view(torch.uint8), two.reshape(-1).view(torch.uint8)), place


@pytest.mark.parametrize(("spec", "case"), CASES, ids=lambda value: getattr(value, "stem", None) or value.id)
def test_bits_are_the_cpu_kernels(spec: OpSpec, case: Case) -> None:
    for seed in range(2):
        args = spec.make(case, "native", seed)
        assert_same_bits(emulated(spec, args, seed), cpu(spec, args))


INVALID = [(spec, bad) for spec in [*NATIVE, registry.get("grad_norm")] for bad in spec.cases.invalid]


@pytest.mark.parametrize(("spec", "bad"), INVALID, ids=lambda value: getattr(value, "stem", None) or value.label)
def test_bad_calls_are_refused_by_the_kernel_alone(spec: OpSpec, bad: Invalid) -> None:
    def fake(*_: Any) -> None:
        raise AssertionError("the record's checks ran too")

    args = bad.change(*spec.make(spec.cases.test[0], "native", 0))
    with burnish.use_backend("native"), pytest.raises(RuntimeError, match=f"^{spec.stem}: {bad.match}"):
        dispatch.call(replace(spec, fake=fake), args, needs_grad=False)


LONG_OPTIONS: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {"amp": True, "ema": True, "mask": True}),
    (torch.float32, {"state": "int8"}),
    (torch.bfloat16, {"stochastic": True}),
    (torch.bfloat16, {"state": "bf16", "stochastic": True}),
    (torch.bfloat16, {"master": "split", "state": "int8"}),
]


@pytest.mark.parametrize(("dtype", "options"), LONG_OPTIONS, ids=str)
@pytest.mark.parametrize("spec", [ADAM, LAMB, SQUARES], ids=lambda spec: spec.stem)
def test_blocks_share_a_tensor_and_its_step(spec: OpSpec, dtype: torch.dtype, options: dict[str, Any]) -> None:
    args = spec.make(Case({"N": LONG}, dtype, options=options), "native", 0)
    expected = cpu(spec, args)
    for seed in range(4):
        assert_same_bits(emulated(spec, args, seed), expected)


def test_sums_are_of_all_chunks() -> None:
    """More chunks than a block has threads; all of equal sums, but for the last ones."""
    count, (param, grad, first, second) = 130 * 16384, torch.zeros(4, 130 * 16384)
    param.fill_(1.0)
    param[-20_000:] = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    grad.copy_(param)
    args = SQUARES.make(Case({"N": 1}, torch.float32), "native", 0)
    lists = [[param], [grad], args[2][:1], [first], [second]]
    ours, wanted = (run(SQUARES, (*lists, *args[5:])) for run in (emulated, cpu))
    assert_same_bits(ours, wanted)
    assert wanted[0][0, 0] > count - 20_000


@pytest.mark.parametrize("offset", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "options"), LONG_OPTIONS[1:], ids=str)
@pytest.mark.parametrize("spec", [ADAM, LAMB], ids=lambda spec: spec.stem)
def test_a_tensor_may_begin_anywhere(spec: OpSpec, dtype: torch.dtype, options: dict[str, Any], offset: int) -> None:
    args = spec.make(Case({"N": 600}, dtype, options=options), "native", 0)

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor.new_zeros(offset), tensor.reshape(-1)])[offset:].view(tensor.shape)

    moved = map_tensors(lambda tensor: shifted(tensor) if tensor.numel() > 1 else tensor, args)
    ours = calls.on_copies(spec, spec.overload("native"), lambda tensor: shifted(tensor))(*moved)
    assert_same_bits(ours, cpu(spec, args))


def test_the_table_follows_the_tensors() -> None:
    """The same tensors again and again, then others of the same sizes, then the first ones."""
    cases = [ADAM.make(Case({"N": 1000}, torch.float32), "native", seed) for seed in range(2)]
    ours = [map_tensors(calls.twin, args) for args in cases]
    wanted = [map_tensors(calls.twin, args) for args in cases]
    for which in (0, 0, 1, 0, 1, 1):
        ADAM.overload("native")(*ours[which])
        ADAM.entry(*wanted[which])
        assert_same_bits(calls.outcome(ADAM, ours[which], None), calls.outcome(ADAM, wanted[which], None))


def test_a_gradient_that_moves_is_found() -> None:
    ours, wanted = (list(ADAM.make(Case({"N": 300}, torch.float32), "native", 0)) for _ in range(2))
    for seed in range(4):
        fresh = ADAM.make(Case({"N": 300}, torch.float32), "native", seed)[1]
        ours[1], wanted[1] = [grad.clone() for grad in fresh], fresh
        ADAM.overload("native")(*ours)
        ADAM.entry(*wanted)
    assert_same_bits(calls.outcome(ADAM, tuple(ours), None), calls.outcome(ADAM, tuple(wanted), None))


def kernels_of(spec: OpSpec, case: Case) -> list[str]:
    torch.ops.burnish.emulation_count(True)
    try:
        calls.on_copies(spec, spec.overload("native"))(*spec.make(case, "native", 0))
        found = json.loads(torch.ops.burnish.emulation_counters())
    finally:
        torch.ops.burnish.emulation_count(False)
    return [launch["kernel"].partition("<")[0] for launch in found]


def test_lamb_takes_two_launches_and_one_where_it_needs_no_sums() -> None:
    case = Case({"N": 120}, torch.bfloat16, "many")
    assert kernels_of(LAMB, case) == ["lamb_squares_fwd_kernel", "lamb_step_fwd_kernel"]
    for options in ({"given": True}, {"unadapted": True}):
        assert kernels_of(LAMB, replace(case, options=options)) == ["lamb_step_fwd_kernel"]
    assert kernels_of(SQUARES, case) == ["lamb_squares_fwd_kernel"]


def test_a_step_takes_one_launch_and_the_norm_one() -> None:
    args = ADAM.make(Case({"N": 120}, torch.bfloat16, "many"), "native", 0)
    torch.ops.burnish.emulation_count(True)
    try:
        calls.on_copies(ADAM, ADAM.overload("native"))(*args)
        torch.ops.burnish.grad_norm.native(args[1], None)
        found = torch.ops.burnish.emulation_counters()
    finally:
        torch.ops.burnish.emulation_count(False)
    assert found.count('"kernel": "adam_step_fwd_kernel') == found.count('"kernel": "grad_norm_fwd_kernel') == 1
    assert found.count('"kernel"') == 2


def test_fp32_is_read_and_written_by_whole_lines() -> None:
    """Of 16384 fp32 elements a request of a warp takes 512 bytes, 16 sectors: the lanes lie side by side."""
    args = list(ADAM.make(Case({"N": 2}, torch.float32), "native", 0))
    whole = [torch.zeros(16384) for _ in range(4)]
    args[:5] = [whole[:1], whole[1:2], args[2][:1], whole[2:3], whole[3:4]]
    torch.ops.burnish.emulation_count(True)
    try:
        ADAM.overload("native")(*args)
        (launch,) = json.loads(torch.ops.burnish.emulation_counters())
    finally:
        torch.ops.burnish.emulation_count(False)
    stored = 3 * 16384 * 4
    assert launch["global_store_bytes"] == stored + 4 + 4
    assert launch["global_store_sectors"] == stored // 32 + 2
    assert launch["global_store_requests"] == stored // 512 + 2
