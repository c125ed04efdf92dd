"""The gate of the benchmarks for ops that write into their arguments, and peers of such an op in a run."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from burnish import bench, registry
from burnish.bench import machine, roofline
from burnish.bench.gate import Gate
from burnish.registry import Case, Cases, Cost, OpSpec
from torch import Tensor

STEP = 2.0**-10
FP32, BF16 = (Case({"N": 4000}, dtype) for dtype in (torch.float32, torch.bfloat16))


def reference(xs: list[Tensor], ys: list[Tensor]) -> None:
    for x, y in zip(xs, ys, strict=True):
        x.copy_(x + y * STEP)


def make(case: Case, backend: str, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    xs, ys = ([torch.randn(case.dims["N"], generator=draw) for _ in range(2)] for _ in range(2))
    return [x.to(case.dtype) for x in xs], ys


@pytest.fixture(scope="module")
def writing() -> Iterator[OpSpec]:
    """An op of an outside package that adds a little of ``ys`` to ``xs``."""
    spec = registry.register(
        OpSpec(
            name="toy::writing",
            schema="(Tensor(a!)[] xs, Tensor[] ys) -> ()",
            reference=reference,
            fake=lambda xs, ys: None,
            autograd=None,
            impls=(),
            cases=Cases(test=(Case({"N": 8}, torch.float32),), bench=(FP32, BF16)),
            make=make,
            cost=lambda case: Cost(ops=8.0, bytes=64.0, unit="fp32"),
        )
    )
    registry._libraries[-1].impl(spec.stem, reference, "CPU")
    yield spec
    del registry._specs["toy::writing"]


def each(change: Any, xs: list[Tensor], ys: list[Tensor]) -> str:
    for x, y in zip(xs, ys, strict=True):
        change(x, y)
    return "a loss, which is nobody's business"


def at_random(x: Tensor, y: Tensor) -> None:
    """Off by up to half an ulp of bf16."""
    draw = torch.rand(x.shape, generator=torch.Generator().manual_seed(9)) - 0.5
    x.copy_(x + y * STEP + draw * 2.0**-8 * x.abs())


PEERS = {
    "right": (lambda x, y: x.add_(y * STEP), None, None),
    "near": (lambda x, y: x.add_(y * STEP * 1.02), None, None),
    "rounded": (at_random, "relative error", None),
    "nothing": (lambda x, y: None, "relative error 1, allowed 0.05", "relative error 0."),
    "twice": (lambda x, y: x.add_(y * 2 * STEP), "relative error 1, allowed 0.05", "relative error 0."),
    "backwards": (lambda x, y: x.sub_(y * STEP), "relative error 2, allowed 0.05", "relative error 0."),
    "raising": (lambda x, y: x.add_(y[:5]), "RuntimeError: The size of", "RuntimeError: The size of"),
}


@pytest.mark.parametrize(("change", "fp32", "bf16"), PEERS.values(), ids=PEERS)
@pytest.mark.parametrize("case", [FP32, BF16], ids=["fp32", "bf16"])
def test_a_peer_is_judged_by_the_change_to_an_ulp(
    writing: OpSpec, change: Any, fp32: str | None, bf16: str | None, case: Case
) -> None:
    gate, expected = Gate(writing, writing.make(case, "cpu", 0)), fp32 if case is FP32 else bf16
    own = gate.copies()
    reason = gate.peer_objection(partial(each, change, *own), own, 0.05)
    assert reason == expected if expected is None else str(reason).startswith(expected)


@pytest.mark.parametrize("error", [1e6, float("nan")])
@pytest.mark.parametrize(("wrong", "refused"), [(8, False), (9, True)])
def test_a_share_of_the_elements_may_be_left_out(writing: OpSpec, wrong: int, refused: bool, error: float) -> None:
    def change(xs: list[Tensor], ys: list[Tensor]) -> None:
        each(PEERS["right"][0], xs, ys)
        xs[0][:wrong] += error

    gate = Gate(writing, writing.make(FP32, "cpu", 0))  # of 8000 elements
    for spared, expected in ((0.0, True), (1e-3, refused)):
        own = gate.copies()
        assert (gate.peer_objection(partial(change, *own), own, 0.05, spared) is not None) == expected


def test_nobody_is_judged_on_what_another_has_written(writing: OpSpec) -> None:
    args = writing.make(FP32, "cpu", 0)
    gate = Gate(writing, args)
    for _ in range(2):
        own = gate.copies()
        assert own[0][0].data_ptr() != args[0][0].data_ptr()
        assert own[1][0].data_ptr() == args[1][0].data_ptr()
        call = partial(writing.entry, *own)
        assert gate.objection(call, own) is None
        assert str(gate.objection(call, own)).startswith("N1")
    assert all(map(torch.equal, args[0], writing.make(FP32, "cpu", 0)[0]))


def test_peers_are_timed_beside_ours(writing: OpSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "last_level_cache", lambda device="cpu": 512)
    monkeypatch.setattr(roofline, "probes", lambda *_: {"read": lambda: 1e9})
    peers = tuple(
        bench.Peer(name, "1", lambda op, case: None, lambda op, args, name=name: partial(each, PEERS[name][0], *args))
        for name in ("right", "nothing")
    )
    plan = bench.Plan(bench.select_cases(["toy::writing"]), peers=peers, rounds=3, min_ms=0.05)
    rows = bench.run(plan, command="test").rows
    assert [(row.case, row.impl, row.timed) for row in rows] == [
        (case, impl, impl != "peer:nothing")
        for case in ("N4000-fp32", "N4000-bf16")
        for impl in ("cpu", "peer:right", "peer:nothing")
    ]
