"""int8_linear_pack, int8_linear_unpack: the run-time layouts of an int8 weight, and back.

========  =============================================  ==========================================
layout    tensor                                         who runs on it
========  =============================================  ==========================================
vnni      uint8 [round_up(N, 16), round_up(K, 4)]        CPU, every instruction set
rows      int8  [N, round_up(K, 16)]                     CUDA, Triton and C++
========  =============================================  ==========================================

``rows`` is the weight with its rows padded by zeros to 16 bytes. ``vnni`` holds w + 128 (padding: 128) in panels of 64
output channels, the last as narrow as N allows in steps of 16; a panel is contiguous ``[K/4][channel][4]``, the order
in which one 64-byte load feeds ``vpdpbusd`` with four products for each of 16 channels. Weights are the unsigned
operand so that the activation is the one an instruction can broadcast from memory; the offset costs 128 * sum(q) a row.

Packing is exact and so is its inverse: ``unpack(pack(w), N, K)`` is bit-equal to ``w``. No gradient.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from burnish import dispatch
from burnish.registry import Backend, Case, Cases, Cost, Impl, Invalid, OpSpec, dtype_name, register

__all__ = ["int8_linear_pack", "int8_linear_unpack"]

LAYOUTS = ("vnni", "rows")
PANEL = 64


def round_up(size: int, multiple: int) -> int:
    return (size + multiple - 1) // multiple * multiple


def reference(weight: torch.Tensor, layout: str) -> torch.Tensor:
    rows, width = weight.shape
    if layout == "rows":
        return F.pad(weight, (0, round_up(width, 16) - width))
    padded = F.pad(weight, (0, round_up(width, 4) - width, 0, round_up(rows, 16) - rows))
    panels = [
        panel.reshape(panel.shape[0], padded.shape[1] // 4, 4)
        .transpose(0, 1)
        .reshape(-1)  # [channels, K/4, 4] -> [K/4, channels, 4]
        for panel in padded.split(PANEL)
    ]
    return (torch.cat(panels).view(padded.shape).to(torch.int16) + 128).to(torch.uint8)


def fake(weight: torch.Tensor, layout: str) -> torch.Tensor:
    torch._check(
        weight.dtype == torch.int8, lambda: f"int8_linear_pack: weight is {dtype_name(weight.dtype)}, expected int8"
    )
    torch._check(
        weight.dim() == 2, lambda: f"int8_linear_pack: weight has shape {tuple(weight.shape)}, expected [N, K]"
    )
    torch._check(layout in LAYOUTS, lambda: f"int8_linear_pack: layout is {layout!r}, expected 'vnni' or 'rows'")
    rows, width = weight.shape
    if layout == "rows":
        return weight.new_empty((rows, round_up(width, 16)))
    return weight.new_empty((round_up(rows, 16), round_up(width, 4)), dtype=torch.uint8)


def make_weight(case: Case, seed: int) -> torch.Tensor:
    """Canonical int8 weight [N, K]: ``extreme`` is all -128 and 127, ``integers`` are in [-8, 8]."""
    generator = torch.Generator().manual_seed(seed + 1)
    shape = (case.dims["N"], case.dims["K"])
    if case.values == "extreme":
        weight = torch.randint(0, 2, shape, generator=generator) * 255 - 128
    elif case.values == "integers":
        weight = torch.randint(-8, 9, shape, generator=generator)
    else:
        weight = torch.randint(-127, 128, shape, generator=generator)
    return weight.to(torch.int8)


def runtime_layout(backend: Backend) -> str:
    """The layout that a backend's int8_linear takes."""
    return "rows" if backend in ("triton", "native") else "vnni"


def make(case: Case, backend: Backend, seed: int) -> tuple[torch.Tensor, str]:
    return make_weight(case, seed), case.options["layout"]


def cost(case: Case) -> Cost:
    return Cost(ops=0.0, bytes=2.0 * case.dims["N"] * case.dims["K"], unit="int8")


def baseline(weight: torch.Tensor, layout: str) -> Callable[[], torch.Tensor]:
    return lambda: weight.clone()


_KERNELS = "burnish.kernels.quant.int8_linear_pack"
_EDGES = ((1, 1), (1, 64), (15, 17), (16, 4), (63, 100), (64, 64), (65, 129), (130, 0), (200, 37))

SPEC = register(
    OpSpec(
        name="int8_linear_pack",
        schema="(Tensor weight, str layout) -> Tensor",
        reference=reference,
        fake=fake,
        autograd=None,
        impls=(Impl("triton", f"{_KERNELS}:int8_linear_pack", f"{_KERNELS}:supports_pack"),),
        cases=Cases(
            test=tuple(
                Case({"N": rows, "K": width}, torch.int8, values, {"layout": layout})
                for layout in LAYOUTS
                for rows, width in _EDGES
                for values in ("normal", "extreme")
            ),
            bench=(Case({"N": 4096, "K": 4096}, torch.int8, options={"layout": "vnni"}),),
            invalid=(
                Invalid("float weight", lambda w, s: (w.float(), s), "weight is fp32, expected int8"),
                Invalid("1-d weight", lambda w, s: (w[0], s), r"weight has shape .*expected \[N, K\]"),
                Invalid("layout", lambda w, s: (w, "tiles"), "layout is 'tiles', expected"),
            ),
        ),
        make=make,
        cost=cost,
        baseline=baseline,
    )
)


def unpack_reference(packed: torch.Tensor, N: int, K: int) -> torch.Tensor:
    if packed.dtype == torch.int8:
        return packed[:, :K].clone()
    signed = (packed.to(torch.int16) - 128).to(torch.int8)
    panels = [
        panel.reshape(panel.shape[1] // 4, panel.shape[0], 4).transpose(0, 1).reshape(panel.shape)
        for panel in signed.split(PANEL)
    ]
    return torch.cat(panels)[:N, :K].clone()


def unpack_fake(packed: torch.Tensor, N: int, K: int) -> torch.Tensor:
    check_packed("int8_linear_unpack: packed", packed, N, K)
    return packed.new_empty((N, K), dtype=torch.int8)


def check_packed(what: str, packed: torch.Tensor, N: int, K: int) -> None:
    """Raise RuntimeError unless ``packed`` is a run-time layout of an [N, K] weight; ``what`` names it."""
    torch._check(
        packed.dtype in (torch.int8, torch.uint8),
        lambda: f"{what} is {dtype_name(packed.dtype)}, expected uint8 (vnni) or int8 (rows) from int8_linear_pack",
    )
    if packed.dtype == torch.uint8:
        expected = (round_up(N, 16), round_up(K, 4))
    else:
        expected = (N, round_up(K, 16))
    torch._check(
        packed.dim() == 2 and packed.shape[0] == expected[0] and packed.shape[1] == expected[1],
        lambda: (
            f"{what} has shape {tuple(packed.shape)}, expected {expected} for N={N}, K={K}: pack it by int8_linear_pack"
        ),
    )
    torch._check(packed.is_contiguous(), lambda: f"{what} is not contiguous, expected int8_linear_pack's result")


def make_unpack(case: Case, backend: Backend, seed: int) -> tuple[torch.Tensor, int, int]:
    return reference(make_weight(case, seed), case.options["layout"]), case.dims["N"], case.dims["K"]


UNPACK = register(
    OpSpec(
        name="int8_linear_unpack",
        schema="(Tensor packed, int N, int K) -> Tensor",
        reference=unpack_reference,
        fake=unpack_fake,
        autograd=None,
        impls=(Impl("triton", f"{_KERNELS}:int8_linear_unpack", f"{_KERNELS}:supports_unpack"),),
        cases=Cases(
            test=SPEC.cases.test,
            bench=SPEC.cases.bench,
            invalid=(
                Invalid("shape", lambda p, n, k: (p, n + 64, k), "packed has shape .*expected"),
                Invalid("K", lambda p, n, k: (p, n, k + 64), "packed has shape .*expected"),
                Invalid("dtype", lambda p, n, k: (p.float(), n, k), "packed is fp32, expected"),
                Invalid("1-d", lambda p, n, k: (p.flatten(), n, k), "packed has shape .*expected"),
            ),
        ),
        make=make_unpack,
        cost=cost,
        baseline=lambda packed, N, K: packed.clone,
    )
)


def int8_linear_pack(weight: torch.Tensor, layout: str | None = None) -> torch.Tensor:
    """Bring a canonical int8 weight ``[N, K]`` into the layout int8_linear runs on; see the module for the layouts.

    Args:
        weight: int8 ``[N, K]``, any strides.
        layout: ``vnni``, ``rows``, or None for the layout of the weight's device.

    Raises:
        RuntimeError: not an int8 matrix, or an unknown layout.
    """
    if layout is None:
        layout = "rows" if weight.is_cuda else "vnni"
    if dispatch.overrides:
        return dispatch.call(SPEC, (weight, layout), needs_grad=False)
    return _pack(weight, layout)


def int8_linear_unpack(packed: torch.Tensor, N: int, K: int) -> torch.Tensor:
    """The canonical int8 weight ``[N, K]`` that :func:`int8_linear_pack` packed; exact.

    Raises:
        RuntimeError: ``packed`` is not a packed ``[N, K]`` weight.
    """
    if dispatch.overrides:
        return dispatch.call(UNPACK, (packed, N, K), needs_grad=False)
    return _unpack(packed, N, K)


_pack, _unpack = SPEC.entry, UNPACK.entry
