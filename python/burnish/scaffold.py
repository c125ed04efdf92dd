"""The two files that a new op starts from, behind ``burnish new-op NAME``.

They are a working op, y = x / (1 + |x|) element by element: after ``python setup.py build_native`` it passes the
generated tests and is timed by ``burnish bench NAME``. Put your formula where that one is.
"""

from __future__ import annotations

import re
from pathlib import Path

from burnish.registry import all_ops

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")

_RECORD = '''"""@NAME@: y = x / (1 + |x|), element by element.

=======  =====  ==========================
x        [...]  fp32, bf16, fp16; any strides
y        [...]  x's dtype
=======  =====  ==========================

The arithmetic is fp32 with one rounding at the end. Deterministic; no gradient and no GPU kernel yet:
tests/example_op/softcap_ops is a small op with a gradient and a kernel in CUDA C++, int8_quantize_rows one with a
Triton kernel too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from burnish import dispatch
from burnish.checks import FLOATING, check_floating
from burnish.registry import Backend, Case, Cases, Cost, Invalid, OpSpec, register

__all__ = ["@NAME@"]


def reference(x: torch.Tensor) -> torch.Tensor:
    """The definition; in float64 the oracle."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide / (1 + wide.abs())).to(x.dtype)


def fake(x: torch.Tensor) -> torch.Tensor:
    """Shape and dtype of the result, and every constraint with the message that users see."""
    check_floating("@NAME@", x=x)
    return x.new_empty(x.shape)


def make(case: Case, backend: Backend, seed: int) -> tuple[torch.Tensor]:
    shape = (case.dims["M"], case.dims["K"])
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (x.to(case.dtype),)


def cost(case: Case) -> Cost:
    size = case.dims["M"] * case.dims["K"]
    return Cost(ops=2.0 * size, bytes=2.0 * size * case.dtype.itemsize, unit="fp32")


def baseline(x: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: F.softsign(x)


_EDGES = ((0, 16), (1, 1), (3, 17), (5, 64), (17, 100), (33, 1), (129, 97))

SPEC = register(
    OpSpec(
        name="@NAME@",
        schema="(Tensor x) -> Tensor",
        reference=reference,
        fake=fake,
        autograd=None,
        impls=(),
        cases=Cases(
            test=tuple(Case({"M": rows, "K": width}, dtype) for dtype in FLOATING for rows, width in _EDGES),
            bench=tuple(Case({"M": rows, "K": 4096}, torch.bfloat16) for rows in (1, 64, 4096)),
            invalid=(
                Invalid("int32 x", lambda x: (x.to(torch.int32),), "x is int32, expected"),
                Invalid("float64 x", lambda x: (x.double(),), "x is fp64, expected"),
            ),
        ),
        make=make,
        cost=cost,
        baseline=baseline,
    )
)


def @NAME@(x: torch.Tensor) -> torch.Tensor:
    """x / (1 + abs(x)).

    Args:
        x: ``[...]``, fp32, bf16 or fp16.

    Returns:
        ``[...]`` of x's dtype.

    Raises:
        RuntimeError: x has another dtype.
    """
    if dispatch.overrides:
        return dispatch.call(SPEC, (x,), needs_grad=False)
    return _op(x)


_op = SPEC.entry
'''

_KERNEL = """// @NAME@ on the CPU: see burnish/ops/@NAME@.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>

#include "cpu/arguments.h"
#include "cpu/parallel.h"
#include "math/half.h"

namespace burnish {
namespace {

constexpr int64_t kElementsPerTask = 32768;  // some microseconds: what a second thread must be worth

float @NAME@_step(float x) { return x / (1.0f + std::fabs(x)); }

template <class T>
void run(const Tensor& x, Tensor& y) {
  const auto* from = static_cast<const T*>(x.const_data_ptr());
  auto* to = static_cast<T*>(y.mutable_data_ptr());
  parallel_for(0, x.numel(), kElementsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = from_float<T>(@NAME@_step(to_float(from[i])));
  });
}

Tensor @NAME@(const Tensor& x) {
  check_floating("@NAME@", "x", x);
  const Tensor dense = torch::stable::contiguous(x);
  Tensor y = torch::stable::new_empty(x, x.sizes());
  switch (x.scalar_type()) {
    case ScalarType::BFloat16:
      run<bf16>(dense, y);
      break;
    case ScalarType::Half:
      run<fp16>(dense, y);
      break;
    default:
      run<float>(dense, y);
  }
  return y;
}

}  // namespace
}  // namespace burnish

STABLE_TORCH_LIBRARY_IMPL(burnish, CPU, m) { m.impl("@NAME@", TORCH_BOX(&burnish::@NAME@)); }
"""


def write(name: str, root: Path) -> list[Path]:
    """Write the record and the CPU kernel of op ``name`` into the checkout at ``root``; returns the files.

    Raises:
        ValueError: the name is outside the grammar or taken, or ``root`` is no checkout. Nothing is written.
        FileExistsError: one of the files is there. Nothing is written.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"op name {name!r}: expected lower-case words joined by '_', like row_softmax")
    if name in all_ops():
        raise ValueError(f"an op named {name!r} exists")
    files = {
        root / "python" / "burnish" / "ops" / f"{name}.py": _RECORD,
        root / "csrc" / "cpu" / f"{name}.cpp": _KERNEL,
    }
    if not all(path.parent.is_dir() for path in files):
        raise ValueError(f"{root} is not a checkout of burnish: it has no python/burnish/ops or no csrc/cpu")
    for path in files:
        if path.exists():
            raise FileExistsError(f"{path} exists")
    for path, text in files.items():
        path.write_text(text.replace("@NAME@", name))
    return list(files)
