"""grad_norm: the global norm of gradients and whether all of them are finite, in one read.

    norm = sqrt(sum over all elements of g ** 2) / grad_scale          found_inf = 1 if an element is not finite, else 0

==========  =============================  =====================================================
grads       list of tensors                fp32, bf16, fp16, mixed, any shapes and strides
grad_scale  one element, or None           fp32 or fp64: what the gradients were multiplied by
norm        []                             fp32, of the unscaled gradients
found_inf   []                             fp32, 0 or 1
==========  =============================  =====================================================

A square is exact in double and so nearly is their sum: nothing overflows on the way, and the result does not depend on
the number of threads or the instruction set. The norm is infinite or NaN where a gradient is. No gradient.

``torch.nn.utils.get_total_norm`` and ``torch.amp.GradScaler.unscale_`` together, without writing the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from burnish import dispatch
from burnish.checks import FLOATING, check_devices, check_floating, check_scalar
from burnish.registry import Backend, Case, Cases, Cost, Invalid, OpSpec, register
from burnish.step_op import native_impl, triton_impl

__all__ = ["grad_norm"]

#: tensors of a case, by its kind of values
TENSORS = {"normal": 3, "many": 100, "thousand": 1000}
#: a transformer's: layers of width N, and what has one small row each
LAYERS, SMALL, SMALL_SIZE = 8, 1000, 64


def reference(grads: list[torch.Tensor], grad_scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    total = torch.stack([grad.double().square().sum() for grad in grads]).sum()
    norm = total.sqrt() if grad_scale is None else total.sqrt() / grad_scale.reshape(()).double()
    kept = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
    return norm.to(kept), (~total.isfinite()).to(kept)


def fake(grads: list[torch.Tensor], grad_scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    torch._check(len(grads) > 0, lambda: "grad_norm: grads is empty, expected at least one tensor")
    for index, grad in enumerate(grads):
        check_floating("grad_norm", **{f"grads[{index}]": grad})
        check_devices("grad_norm", grads[0], **{f"grads[{index}]": grad})
    check_scalar("grad_norm", grad_scale=grad_scale)
    return grads[0].new_empty((), dtype=torch.float32), grads[0].new_empty((), dtype=torch.float32)


def shapes(case: Case) -> list[tuple[int, ...]]:
    """Of the tensors of a case: of N elements and fewer, with an empty one among many, or a transformer's."""
    size = case.dims["N"]
    if case.values == "transformer":
        layer = [(4 * size, size), (size, 4 * size), *[(size, size)] * 4]
        return layer * LAYERS + [(SMALL_SIZE,)] * SMALL
    if case.values == "thousand":
        return [(size,)] * TENSORS["thousand"]
    count = TENSORS.get(case.values, TENSORS["normal"])
    ragged = [(max(size - index, 0),) for index in range(count)]
    return [(2, (size + 1) // 2) if size > 1 else (size,), *ragged[1:]]


def make(case: Case, backend: Backend, seed: int) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """``large`` gradients are about 1e30, whose squares fp32 cannot hold."""
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(shape, generator=generator) for shape in shapes(case)]
    if case.values == "large":
        grads = [grad * 1e30 for grad in grads]
    scale = torch.tensor(1024.0) if case.options.get("scaled") else None
    dtypes = [case.dtype, torch.bfloat16] if case.options.get("mixed") else [case.dtype]
    return [grad.to(dtypes[index % len(dtypes)]) for index, grad in enumerate(grads)], scale


def elements(case: Case) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes(case))


def cost(case: Case) -> Cost:
    return Cost(ops=2.0 * elements(case), bytes=float(elements(case) * case.dtype.itemsize), unit="fp32")


def baseline(grads: list[torch.Tensor], grad_scale: torch.Tensor | None) -> Callable[[], tuple[torch.Tensor, None]]:
    def run() -> tuple[torch.Tensor, None]:
        norm = torch.nn.utils.get_total_norm(grads)
        return (norm if grad_scale is None else norm / grad_scale), None

    return run


_EDGES = (0, 1, 7, 33, 65, 255, 257, 1000, 16385)

SPEC = register(
    OpSpec(
        name="grad_norm",
        schema="(Tensor[] grads, Tensor? grad_scale) -> (Tensor, Tensor)",
        reference=reference,
        fake=fake,
        autograd=None,
        impls=(native_impl("grad_norm"), triton_impl("grad_norm")),
        cases=Cases(
            test=(
                *(Case({"N": size}, dtype) for dtype in FLOATING for size in _EDGES),
                *(Case({"N": size}, torch.float32, "large") for size in (1, 1000)),
                *(Case({"N": size}, torch.float32, options={"scaled": True}) for size in (7, 65, 1000)),
                *(Case({"N": size}, torch.float32, options={"mixed": True}) for size in (7, 65, 1000)),
                Case({"N": 120}, torch.float16, "many"),
            ),
            bench=(
                Case({"N": 768}, torch.float32, "transformer"),
                Case({"N": 768}, torch.bfloat16, "transformer"),
                Case({"N": 64}, torch.float32, "thousand"),
            ),
            invalid=(
                Invalid("int32 gradient", lambda g, s: ([*g, g[0].int()], s), r"grads\[3\] is int32, expected"),
                Invalid("fp64 gradient", lambda g, s: ([g[0].double()], s), r"grads\[0\] is fp64, expected"),
                Invalid("complex gradient", lambda g, s: ([g[0].cfloat()], s), r"grads\[0\] is complex64, expected"),
                Invalid("int scale", lambda g, s: (g, torch.tensor(1)), "grad_scale is int64, expected fp32 or fp64"),
                Invalid("long scale", lambda g, s: (g, torch.ones(2)), "grad_scale has shape .*expected one element"),
            ),
        ),
        make=make,
        cost=cost,
        baseline=baseline,
    )
)


def grad_norm(
    grads: Sequence[torch.Tensor], grad_scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The global norm of ``grads`` and whether one of them is not finite; reads each once, on their device.

    Args:
        grads: at least one tensor, fp32, bf16 or fp16, mixed, any shapes and strides, on one device.
        grad_scale: fp32 or fp64, one element: what the gradients were multiplied by (``GradScaler``'s scale).

    Returns:
        ``norm`` fp32 ``[]``, of the gradients divided by ``grad_scale``, and ``found_inf`` fp32 ``[]``, 0 or 1.

    Raises:
        RuntimeError: another dtype, tensors on different devices, no tensor.
    """
    if not grads:
        raise RuntimeError("grad_norm: grads is empty, expected at least one tensor")
    if dispatch.overrides:
        return dispatch.call(SPEC, (list(grads), grad_scale), needs_grad=False)
    return _op(list(grads), grad_scale)


_op = SPEC.entry
