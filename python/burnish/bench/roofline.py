"""The limits of this machine, measured between the rows they judge.

A row's roofline is ``max(bytes / bandwidth, operations / rate)``. Both ceilings move from minute to minute on a shared
host, so each round of a case measures them once, in the same shuffled order as the contestants.

=======  ==========================================================  ====================================
kind     CPU (``burnish::cpu_peak``, all threads)                    CUDA
=======  ==========================================================  ====================================
read     a stream of loads over memory, B/s                          copy of 1 GiB, read + write, B/s
int8     ``vpdpbusd`` or what the level has, in registers, op/s      ``torch._int_mm``, 8192 cubed
bf16     ``vdpbf16ps`` or what the level has, in registers           ``torch.mm``, 8192 cubed
fp32     fma in registers                                            ``torch.mm`` without TF32, 4096 cubed
=======  ==========================================================  ====================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch

from burnish import native
from burnish.registry import Cost

#: long enough for the cores to reach their sustained clock, short beside a round
PROBE_MILLIS = 10


def probes(device: str, unit: str, operations: float) -> dict[str, Callable[[], float]]:
    """What to measure each round for a case: ``read``, and the rate of ``unit`` if the case computes. Empty where the
    machine cannot be measured: the native library is missing."""
    kinds = ["read", *([unit] if operations else [])]
    if device == "cuda":
        return {kind: partial(_cuda_peak, kind) for kind in kinds}
    if "_native.so" in native.missing:
        return {}
    return {kind: partial(torch.ops.burnish.cpu_peak, kind, PROBE_MILLIS) for kind in kinds}


def floor(cost: Cost, peaks: Mapping[str, float]) -> float | None:
    """Seconds below which no implementation can go, by the ceilings in ``peaks``; None if one was not measured."""
    if "read" not in peaks or (cost.ops and cost.unit not in peaks):
        return None
    return max(cost.bytes / peaks["read"], cost.ops / peaks[cost.unit] if cost.ops else 0.0)


def share(cost: Cost, peaks: Mapping[str, Sequence[float]], seconds: Sequence[float]) -> float | None:
    """The median over rounds of floor / time, each round judged by its own ceilings."""
    shares = []
    for index, time in enumerate(seconds):
        limit = floor(cost, {kind: values[index] for kind, values in peaks.items()})
        if limit is None:
            return None
        shares.append(limit / time)
    return sorted(shares)[len(shares) // 2] if shares else None


@cache
def _cuda_operands(kind: str) -> tuple[Any, ...]:
    if kind == "read":
        return tuple(torch.empty(1 << 28, dtype=torch.float32, device="cuda") for _ in range(2))
    side, dtype = {"int8": (8192, torch.int8), "bf16": (8192, torch.bfloat16), "fp32": (4096, torch.float32)}[kind]
    first = torch.randn(side, side, device="cuda").mul_(40).to(dtype)  # equal numbers would take less power
    operands = first, first.t().contiguous().t()
    _product(kind)(*operands)  # the first call of a kind loads the library
    return operands


def _product(kind: str) -> Callable[..., Any]:
    return torch._int_mm if kind == "int8" else torch.mm


def _cuda_peak(kind: str) -> float:
    first, second = _cuda_operands(kind)
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    if kind == "read":
        first.copy_(second)
        work = 2.0 * first.nbytes
    else:
        _product(kind)(first, second)
        work = 2.0 * first.shape[0] ** 3
    stop.record()
    stop.synchronize()
    return work / (start.elapsed_time(stop) / 1e3)
